#!/usr/bin/env bash
# Layer selection of Qwen3-1.7B to HypeNet-2B: which layers stay attention.
#SBATCH --job-name=hypenet-2b-selection --nodes=1 --gpus-per-node=8 --time=4:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/selection.py --preset hypenet-2b "$@"
