#!/usr/bin/env bash
# Stage 2 of Qwen3-8B to HypeNet-9B: end-to-end distillation under ZeRO-3. Submit from the root of the repository:
#   sbatch slurm/stage2_8b.sh
# Arguments go on to the launcher (--distill.lr 2e-5), and sbatch's own options override the lines below:
#   sbatch --nodes=4 --partition=gpu slurm/stage2_8b.sh --run /scratch/hypenet-9b
#SBATCH --job-name=hypenet-9b-stage2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --signal=TERM@900
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the root of the repository}"
source slurm/common.sh
launch launcher/kd.py --preset hypenet-9b --ds_config ds_configs/zero3.json "$@"
