#!/usr/bin/env bash
# One rank: srun's names for it, in torch's. The environment has the rest (slurm/common.sh).
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
