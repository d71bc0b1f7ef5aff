#!/bin/bash
# AnyMAL's alignment pre-training on Llama-3 70B:
#   sbatch slurm/pretrain_70b.sh [key=value ...]
# Options of sbatch go before the script's name and override those below: sbatch --nodes=8 --time=12:00:00 slurm/...
# common.sh documents the environment variables and what happens when a job is stopped.
#SBATCH --job-name=pretrain_70b
#SBATCH --nodes=32
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

VERB=pretrain
CONFIG=pretrain_70b_image

# Slurm runs a copy of this file, so common.sh is located relative to the submission folder.
# shellcheck source=slurm/common.sh
source "${ANYMAL_HOME:=$SLURM_SUBMIT_DIR}/slurm/common.sh" || {
    echo "error: $ANYMAL_HOME has no slurm/common.sh. Submit from the repository's folder, or set ANYMAL_HOME to it." >&2
    exit 2
}
run_job "$@"
