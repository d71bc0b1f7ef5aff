#!/bin/bash
# Indexes a folder of shards, or makes one from a manifest or a data set, in PARTS tasks of a job array; a further job,
# which waits for all of them, joins the parts:
#   bash slurm/prepare.sh PARTS --index-only FOLDER --tokenizer FOLDER [option of anymal prepare ...]
#   bash slurm/prepare.sh PARTS --manifest FILE --out FOLDER --tokenizer FOLDER [option of anymal prepare ...]
#   bash slurm/prepare.sh PARTS --from LAYOUT PATH --out FOLDER --tokenizer FOLDER [option of anymal prepare ...]
# It submits both jobs and prints their numbers. Options of sbatch, written with =, go before PARTS:
#   bash slurm/prepare.sh --partition=cpu --time=4:00:00 64 ...
# A task that reaches its time limit or loses its node is requeued, and continues with its missing shards. If tasks
# fail, the joining job is cancelled. Run them again, then join the parts:
#   sbatch --array=3,7 slurm/prepare.sh PARTS ... (as before)
#   sbatch slurm/prepare.sh --merge FOLDER [--max-bad-share SHARE]
# common.sh documents the environment variables ANYMAL_*.
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append

# Read by common.sh.
# shellcheck disable=SC2034
VERB=prepare CONFIG=""
# A task that is requeued more often than this makes no progress.
MOST_RESTARTS=20

# Slurm runs a copy of this file, so common.sh is located relative to the submission folder.
# shellcheck source=slurm/common.sh
source "${ANYMAL_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh" || {
    echo "error: $ANYMAL_HOME has no slurm/common.sh. Run this in the repository's folder, or set ANYMAL_HOME to it." >&2
    exit 2
}

# Submits the array and the joining job. Each exits with the code of `anymal prepare`.
submit() {
    local parts folder="" options=() of_parts=() of_merge=() array merge script=$ANYMAL_HOME/slurm/prepare.sh
    while [[ ${1:-} == --*=* ]]; do options+=("$1"); shift; done
    parts=${1:-}
    [[ $parts =~ ^[1-9][0-9]{0,6}$ ]] || refuse "'$parts' is not a number of parts. Give one before the options of anymal prepare"
    shift
    while (( $# )); do
        case $1 in
            --part | --part=* | --merge | --merge=*) refuse "$1 is set for each job. Leave it out" ;;
            --max-bad-share) of_merge+=("$1" "${2:-}"); shift ;;
            --max-bad-share=*) of_merge+=("$1") ;;
            --from) [[ ${2:-} != img2dataset ]] || folder=${3:-}; of_parts+=("$1" "${2:-}" "${3:-}"); shift 2 ;;
            --index-only | --out) folder=${2:-}; of_parts+=("$1" "${2:-}"); shift ;;
            --index-only=* | --out=*) folder=${1#*=}; of_parts+=("$1") ;;
            *) of_parts+=("$1") ;;
        esac
        shift
    done
    [[ $folder ]] || refuse "the folder is missing: --index-only FOLDER, or --manifest FILE or --from LAYOUT PATH with --out FOLDER"
    array=$(sbatch --parsable "${options[@]}" --array="1-$parts" "$script" "$parts" "${of_parts[@]}") || exit 2
    merge=$(sbatch --parsable "${options[@]}" --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
        --cpus-per-task=1 --job-name=prepare_merge "$script" --merge "$folder" "${of_merge[@]}") || exit 2
    echo "parts: job ${array%%;*} (1-$parts); joined by job ${merge%%;*}"
}

refuse() {
    echo "error: $1." >&2
    exit 2
}

# Runs one step and exits with its code. If the time limit is near, requeues the job.
run_prepare() {
    local code
    exec 3>&1
    job=$SLURM_JOB_ID
    [[ ! ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    export PYTHONPATH=$ANYMAL_HOME${PYTHONPATH:+:$PYTHONPATH}
    trap on_time_limit USR1
    choose_python
    in_step --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${python[@]}" -m megatron_anymal prepare "$@"
    code=$?
    if [[ $time_is_up ]] && (( code != 0 && code != 2 )); then requeue_part; fi
    exit "$code"
}

on_time_limit() {
    [[ ! $time_is_up ]] || return
    time_is_up=1
    say "the time limit is near: stopping"
    end_steps
}

requeue_part() {
    (( ${SLURM_RESTART_COUNT:-0} < MOST_RESTARTS )) || mistake "restarted $MOST_RESTARTS times. Use more parts, or raise the time limit."
    say "requeueing, to continue with the remaining shards"
    scontrol requeue "$job" || mistake "scontrol requeue failed. Submit the job again to continue."
    # Slurm kills this script while it waits.
    sleep 60 &
    wait $!
    exit 75
}

time_is_up=""
if [[ ${1:-} == --merge ]]; then
    run_prepare "$@"
elif [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run_prepare --workers="${SLURM_CPUS_PER_TASK:-1}" "${@:2}" --part="$SLURM_ARRAY_TASK_ID/$1"
else
    submit "$@"
fi
