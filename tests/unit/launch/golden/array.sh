#!/bin/bash
#SBATCH --job-name=hr-paragraphs-1f2e-r0
#SBATCH --array=0-63%8
#SBATCH --output=/scratch/me/run/logs/%A_%a.out
#SBATCH --error=/scratch/me/run/logs/%A_%a.err
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=8G
#SBATCH --time=02:00:00
#SBATCH --account=proj

umask 077
unset ${!SBATCH_@}  # they would override the next round's script
export SLURM_EXPORT_ENV=ALL SUBMITIT_EXECUTOR=slurm
export HPCRESUME_TASK="$SLURM_ARRAY_TASK_ID"
export HPCRESUME_ROUND=0


run=/scratch/me/run
folder=/scratch/me/run/rounds/0
pickle="$folder"/round.pkl
element="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
mine="$folder/${element}_submitted.pkl"

# A node on which nothing starts would be given one task after the other.
leave() {
    [ "$SECONDS" -ge 30 ] || sleep "$((30 - SECONDS))"
    exit "$1"
}
refuse() {
    printf 'hpcresume: %s\n' "$1" >&2
    leave 16
}

# Loading a pickle runs what it says, so nobody else may have written it.  Root squash and
# identity mapping change owners: "ours" is whoever owns a file that this job makes there.
copy=$(mktemp "$folder/.copy.XXXXXXXXXX") || refuse "$folder is not writable from $HOSTNAME"
us=$(stat -L -c %u -- "$copy")
# Who can write the directory above the run's could put another one in its place; a group that
# has its owner's name is its owner's own.
check_above() {
    local owner mode user group
    read -r owner mode user group < <(stat -L -c '%u %a %U %G' -- "$1")
    [ "$owner" = "$us" ] || [ "$owner" = 0 ] || refuse "$1, which holds $run, is owned by user $owner"
    case "$mode" in
        [1357]???) return ;;
        *[2367]?) [ "$user" = "$group" ] && [ "$user" != UNKNOWN ] || mode=2 ;;
    esac
    case "$mode" in
        *[2367]) refuse "$1, which holds $run, can be written by other users: chmod go-w it" ;;
    esac
}
check() {
    local owner mode
    read -r owner mode < <(stat -L -c '%u %a' -- "$1")
    [ -n "$owner" ] || refuse "$1 is missing"
    [ "$owner" = "$us" ] || refuse "$1 is owned by user $owner, not by $us"
    case "$mode" in
        *[2367] | *[2367]?) refuse "$1 can be written by other users (mode $mode): chmod go-w it" ;;
    esac
}
check "$run"
check_above "$(dirname -- "$(readlink -f -- "$run")")"
check "$folder"
check "$pickle"
if cmp -s -- "$pickle" "$mine"; then  # an earlier attempt of this element copied it
    rm -f -- "$copy"
else
    cp -- "$pickle" "$copy" && mv -f -- "$copy" "$mine" || refuse "cannot write $mine"
fi
check "$mine"

# Without a trap this shell would die of a signal that srun and Python still work through.
trap : TERM USR2
# Python dies of a USR2 that comes before it has a handler, as it does under a short time limit.
srun --nodes=1 --ntasks=1 --cpus-per-task=1 --unbuffered --kill-on-bad-exit=1 \
    /bin/sh -c 'trap "" USR2; exec "$@"' sh /opt/venv/bin/python -u -P -m submitit.core._submit "$folder"
status=$?

case "$status" in
    0 | 76 | 85) exit "$status" ;;  # the task has said how it ended
    *) leave "$status" ;;
esac
