#!/usr/bin/env bash
# Stage 2 of Qwen3-4B to HypeNet-5B: end-to-end distillation. Options are passed to the launcher: --distill.lr 5e-5
#SBATCH --job-name=hypenet-5b-stage2 --nodes=1 --gpus-per-node=8 --time=1-00:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@900
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
launch launcher/kd.py --preset hypenet-5b --ds_config ds_configs/zero3.json "$@"
