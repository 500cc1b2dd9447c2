#!/usr/bin/env bash
# Example: two machines with eight GPUs each. Adapt the #SBATCH lines and run: sbatch scripts/slurm_example.sh
#SBATCH --job-name=clbench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
set -euo pipefail

GPUS_PER_NODE=8
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_ADDRESS GPUS_PER_NODE

# One launcher per machine; each starts a rank for every GPU.
srun bash -c '
    source .venv/bin/activate
    accelerate launch --config_file configs/accelerate/ddp.yaml \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 \
        -m clbench.cli train --model dit_dec_tiny --algo clare --dataset metaworld_cw10 --resume
'
