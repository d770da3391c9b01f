#!/usr/bin/env bash
# The choice of the logits-scaling base, and the hybrid as a Hugging Face folder: sbatch slurm/export.sh --preset hypenet-9b
#SBATCH --job-name=hypenet-export --nodes=1 --gpus-per-node=8 --time=12:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/scaling.py "$@"
launch launcher/export.py "$@"
