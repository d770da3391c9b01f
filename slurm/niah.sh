#!/usr/bin/env bash
# Needle in a haystack over lengths, Table 2: sbatch slurm/niah.sh --preset hypenet-9b
#SBATCH --job-name=hypenet-niah --nodes=1 --gpus-per-node=8 --time=2-00:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/niah.py "$@"
