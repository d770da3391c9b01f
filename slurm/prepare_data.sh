#!/usr/bin/env bash
# Text to every stage's token shards, on nodes without GPUs, which share the work. Options are those of
# data/prepare_fineweb_edu.py. Typed again, it resumes:
#   sbatch slurm/prepare_data.sh --preset hypenet-9b --out shards
#SBATCH --job-name=hypenet-data --nodes=1 --array=0-3 --time=12:00:00
#SBATCH --exclusive --mem=0 --requeue --open-mode=append
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}" && source slurm/common.sh || exit 2
read -ra options <<<"${HALO_SRUN:-}"
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" "${options[@]}" "$PYTHON" data/prepare_fineweb_edu.py "$@" \
  --task "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" --tasks "$SLURM_ARRAY_TASK_COUNT"
