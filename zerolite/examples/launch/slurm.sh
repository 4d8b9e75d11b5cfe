#!/bin/bash
# Several machines of a Slurm cluster: one torchrun on each, which starts as many ranks as it has GPUs.
#
#     sbatch zerolite/examples/launch/slurm.sh train_medqa.py --stage 3 --output_dir /shared/medqa
#     sbatch zerolite/examples/launch/slurm.sh train_medqa.py --resume /shared/medqa        # goes on after a kill
#
# zerolite reads torchrun's variables and no other. Slurm sends SIGTERM before a time limit: the run saves and ends.
#SBATCH --job-name=zerolite
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -eu

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PET_NNODES=$SLURM_JOB_NUM_NODES
export PET_NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-1}
export PET_SHUTDOWN_TIMEOUT=280  # seconds for ranks that were told to stop, and save; torchrun's own are 30
export PET_MASTER_ADDR=$first
export PET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # another one for each job of a machine
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # where a machine has several networks

exec srun --kill-on-bad-exit=1 bash -c 'PET_NODE_RANK=$SLURM_NODEID exec torchrun "$@"' torchrun "$@"
