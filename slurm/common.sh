# shellcheck shell=bash
# What every sbatch script of this folder shares: how the ranks of a job are started.

# Fifteen minutes before its time is over (--signal), a job is told to stop: ranks finish their step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-840}"

# Run a launcher on all nodes of the job, one rank a GPU (or one rank a node where the job has no GPUs).
#   launch launcher/kd.py --preset hypenet-9b
launch() {
  local hosts
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    .venv/bin/torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 40000))" \
    --rdzv_id="$SLURM_JOB_ID" \
    -- "$@" # without the dashes, torchrun would take the launcher's --run for an abbreviation of its own
}
