#!/usr/bin/env bash
# Layer selection of Qwen3-4B to HypeNet-5B: which layers stay attention.
#SBATCH --job-name=hypenet-5b-selection --nodes=1 --gpus-per-node=8 --time=8:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/selection.py --preset hypenet-5b "$@"
