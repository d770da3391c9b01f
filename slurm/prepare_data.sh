#!/usr/bin/env bash
# Text to token shards, on a node without GPUs. Options are those of data/prepare_text.py:
#   sbatch slurm/prepare_data.sh --source fineweb_edu/align --tokenizer Qwen/Qwen3-8B --out shards/align --seq_len 512
#SBATCH --job-name=hypenet-data --nodes=1 --time=1-00:00:00
#SBATCH --exclusive --mem=0 --open-mode=append
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
read -ra options <<<"${HALO_SRUN:-}"
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" "${options[@]}" "$PYTHON" data/prepare_text.py "$@"
