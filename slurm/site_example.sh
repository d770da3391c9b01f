# shellcheck shell=bash
# What is special about your cluster: copy this to slurm/site.sh, uncomment and change what you need.
# The jobs read it, and table2.sh. Before you type sbatch yourself: source slurm/site.sh
# You may also set all of it in the environment.

# Slurm's own names for sbatch's options.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_GPUS_PER_NODE=4

# The interface between nodes (ip -brief address lists them), for NCCL and for gloo.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# Shared by all nodes: runs' folders, and Hugging Face's cache.
# export HALO_RUNS=/scratch/$USER/runs
# export HF_HOME=/scratch/$USER/huggingface

# Where slurm/table2.sh prepares shards, on how many nodes (default: 4), and more options for that, such as your own text.
# export HALO_SHARDS=/scratch/$USER/shards
# export HALO_DATA_TASKS=16
# export HALO_DATA="--source /scratch/$USER/texts --whole"

# Modules, and another Python than .venv's.
# module load cuda
# export HALO_PYTHON=/shared/venv/bin/python

# More options for srun, such as a container (pyxis).
# export HALO_SRUN="--container-image=/shared/hypenet.sqsh --container-mounts=/scratch,$PWD --container-workdir=$PWD"

# Run on each node when ranks fail; a node where it fails is excluded. Default: nvidia-smi, where there is one.
# export HALO_CHECK="rocm-smi"
