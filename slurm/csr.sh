#!/usr/bin/env bash
# Common-sense reasoning, zero-shot, Figure 1: sbatch slurm/csr.sh --preset hypenet-9b
#SBATCH --job-name=hypenet-csr --nodes=1 --gpus-per-node=8 --time=06:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/csr.py "$@"
