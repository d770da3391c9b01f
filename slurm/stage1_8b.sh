#!/usr/bin/env bash
# Stage 1 of Qwen3-8B to HypeNet-9B: alignment of the RNN layers.
#SBATCH --job-name=hypenet-9b-stage1 --nodes=1 --gpus-per-node=8 --time=12:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/align.py --preset hypenet-9b --ds_config ds_configs/zero1.json "$@"
