#!/bin/bash
#SBATCH --job-name=hr-paragraphs-1f2e-m0
#SBATCH --dependency=afterany:12
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=/scratch/me/run/logs/merge_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00

umask 077
unset ${!SBATCH_@}  # they would override the next round's script


/opt/venv/bin/python -u -P -m hpcresume merge /scratch/me/run --requeue \
    --patience 1200.0
status=$?

exit "$status"
