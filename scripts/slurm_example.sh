#!/usr/bin/env bash
# Example: two machines with eight GPUs each. Adapt the #SBATCH lines and run: sbatch scripts/slurm_example.sh
#SBATCH --job-name=clbench
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

# One task per GPU: each is a rank. Three minutes before the time is up, SLURM sends them SIGTERM; they save and exit
# with status 75, and the job is requeued, to be resumed. A rank that fails ends the others.
code=0
srun --kill-on-bad-exit=1 bash -c '
    source .venv/bin/activate
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec clbench train --model dit_dec_tiny --algo clare --dataset metaworld_cw10 --resume
' || code=$?
if [[ $code == 75 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
