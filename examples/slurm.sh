#!/usr/bin/env bash
#SBATCH --job-name=aligndistil
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
# Five minutes before the end SLURM sends SIGTERM (or USR1, if that is what it says above): the step is finished, a
# checkpoint saved, and the exit code is 143.
# Submitting the same script again continues from there.
#
#   sbatch examples/slurm.sh recipes/smollm2/ultrafeedback.yaml

set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500
# A process that ends with an error ends the others, also where they wait for it on a GPU.
srun --kill-on-bad-exit=1 aligndistil train "$@"
