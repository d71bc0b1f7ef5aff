# shellcheck shell=bash
# shellcheck disable=SC2154  # VERB, CONFIG and ANYMAL_HOME are set by the script that sources this file.
#
# Shared code of pretrain_70b.sh, sft_70b.sh and dpo_70b.sh; prepare.sh uses some of its functions.
#
# A job checks every node (megatron_anymal.launcher.preflight.command), starts `anymal launch` on each and waits. Before
# the time limit, Slurm sends USR1 to this script, which forwards it: the ranks write a checkpoint and exit with 75.
# The job is then requeued, and resumes from that checkpoint when it starts again. If a node fails, the job is requeued
# as well, by Slurm or by this script. With any other exit code, the job ends with that code.
#
# Environment variables:
#   ANYMAL_CONTAINER       container image: for pyxis (image.sqsh or registry/name:tag) if srun has it, else apptainer
#   ANYMAL_MOUNTS          folders to mount into the container, as A:A,B:B. Default: submission folder and repository
#   ANYMAL_VENV            virtual environment, if no container is used. Default: .venv in the repository
#   ANYMAL_HOME            the repository. Default: the submission folder. Relative paths start at the submission folder
#   ANYMAL_PROCS_PER_NODE  processes per node. Default: the number of its GPUs. To rehearse without GPUs:
#                          ANYMAL_PROCS_PER_NODE=2 sbatch --nodes=2 --gpus-per-node=0 slurm/pretrain_70b.sh ...
#   ANYMAL_GRACE_SECONDS   how long a stop may take before the job is requeued regardless. Default: 270, a little less
#                          than the lead time of --signal
# With spare nodes, a run survives the loss of a node without a requeue, continuing from copies in memory:
#   sbatch --no-kill --nodes=34 slurm/pretrain_70b.sh --spare-nodes=2 ...
# trains on 32 nodes while two wait with everything imported. The first node cannot be replaced.
# To use another configuration than the script's, add --config-name=NAME --config-path=FOLDER after the script's name.
#
# To stop a job with a checkpoint and requeue it: scancel --batch --signal=USR1 JOB. To end it: scancel JOB.
# Each task of a job array (sbatch --array=0-3) needs its own run folder; a second one in the same folder exits with 80.
# A job's time limit must be longer than the lead time of --signal; otherwise it exits at once with code 2.
# In the run's folder, slurm.log has the history of all jobs, and logs/slurm_JOB/NODE.log the output of each node.

set -o pipefail

# The current job step, its start time, whether it can be asked to stop, and the process that asks it.
step="" step_began=0 launched="" asker=""
# Whether the current step, and every later one, must end.
steps_over=""
stop_requested="" terminated="" requeued=""
run_dir="" logs="" summary=/dev/null

run_job() {
    # Messages go to the job's own output, even while a step's output is redirected to a file.
    exec 3>&1
    # For a job array, use ARRAY_TASK: Slurm takes the job ID of one of its tasks for the whole array.
    job=$SLURM_JOB_ID
    [[ ! ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    trap on_stop_request USR1
    trap on_termination TERM
    export ANYMAL_HOME ANYMAL_GRACE_SECONDS=${ANYMAL_GRACE_SECONDS:-270}
    export PYTHONPATH=$ANYMAL_HOME${PYTHONPATH:+:$PYTHONPATH}
    check_time
    choose_python
    choose_spares "$@"
    choose_size "${overrides[@]}"
    arguments=("$VERB" "--config-name=$CONFIG" "${size[@]}" "${overrides[@]}")

    find_run_dir
    check_nodes
    [[ ! $stop_requested ]] || end 75
    launch
}

# Refuses a job that Slurm would ask to stop as soon as it starts. Sets time_limit (seconds; empty: unlimited or
# unknown). A job can query its time limit but not its --signal, which is assumed to be the grace period plus 30 s.
check_time() {
    local shown lead=$(( ANYMAL_GRACE_SECONDS + 30 ))
    time_limit=""
    shown=$(scontrol show job -o "$job" 2> /dev/null)
    [[ $shown =~ TimeLimit=([0-9]+-)?([0-9]+):([0-9]+):([0-9]+) ]] || return 0
    local days=${BASH_REMATCH[1]%-}
    time_limit=$(( ((10#${days:-0} * 24 + 10#${BASH_REMATCH[2]}) * 60 + 10#${BASH_REMATCH[3]}) * 60 + 10#${BASH_REMATCH[4]} ))
    (( time_limit > lead )) || mistake "the job's time limit is $time_limit s, and Slurm asks it to stop $lead s before its end (--signal=B:USR1@$lead): it would stop before it trains. Raise the time limit, as in sbatch --time=1:00:00, or have Slurm send the signal later: --signal=B:USR1@60 with ANYMAL_GRACE_SECONDS=30."
}

# Sets python (the command) and container (options of srun).
choose_python() {
    local mounts=${ANYMAL_MOUNTS:-$PWD:$PWD,$ANYMAL_HOME:$ANYMAL_HOME}
    container=()
    if [[ ! ${ANYMAL_CONTAINER:-} ]]; then
        python=("${ANYMAL_VENV:-$ANYMAL_HOME/.venv}/bin/python")
        [[ -x ${python[0]} ]] || mistake "there is no ${python[0]}. Create it with \`make venv\`, or set ANYMAL_VENV or ANYMAL_CONTAINER."
    elif [[ $(srun --help) == *--container-image* ]]; then
        container=("--container-image=$ANYMAL_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
        python=(python)
    elif command -v apptainer > /dev/null; then
        python=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$ANYMAL_CONTAINER" python)
    else
        mistake "ANYMAL_CONTAINER is set, but this cluster has neither pyxis (srun --container-image) nor apptainer. Use ANYMAL_VENV."
    fi
}

# Sets spares (their number) and overrides (the other arguments).
choose_spares() {
    local word
    spares=0 overrides=()
    for word in "$@"; do
        if [[ $word == --spare-nodes=* ]]; then spares=${word#*=}; else overrides+=("$word"); fi
    done
    [[ $spares =~ ^[0-9]+$ ]] || mistake "--spare-nodes=$spares is not a number."
    (( spares == 0 || SLURM_JOB_NUM_NODES - spares > 1 )) || mistake "--spare-nodes=$spares leaves $(( SLURM_JOB_NUM_NODES - spares )) of $SLURM_JOB_NUM_NODES node(s) to train on, and the first one cannot be replaced. Give sbatch more --nodes."
}

# Sets nodes, processes (per node) and size (the overrides for both, unless they are given).
choose_size() {
    local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE##*:}}
    local given_nodes given_processes
    given_nodes=$(given trainer.num_nodes "$@")
    given_processes=$(given trainer.devices "$@")
    nodes=$(( SLURM_JOB_NUM_NODES - spares ))
    processes=${given_processes:-${ANYMAL_PROCS_PER_NODE:-${gpus:-0}}}
    (( processes > 0 )) || mistake "the job has no GPUs on its nodes. Request some (sbatch --gpus-per-node=8), or set ANYMAL_PROCS_PER_NODE."
    (( ${given_nodes:-$nodes} == nodes )) || mistake "trainer.num_nodes=$given_nodes, but the job has $nodes node(s) to train on. Leave it out, or give sbatch --nodes=$(( given_nodes + spares ))."
    size=()
    [[ $given_nodes ]] || size+=("trainer.num_nodes=$nodes")
    [[ $given_processes ]] || size+=("trainer.devices=$processes")
}

# Prints the value of an override among the arguments; the last one wins. Empty if it is not given.
given() {
    local key=$1 value="" word
    for word in "${@:2}"; do
        [[ $word =~ ^\+{0,2}"$key"=(.*)$ ]] && value=${BASH_REMATCH[1]}
    done
    echo "$value"
}

# Sets run_dir and, in it, logs and summary. An invalid setting ends the job here, before anything is started.
find_run_dir() {
    local answer
    answer=$(mktemp)
    in_step --nodes=1 --ntasks=1 "${python[@]}" -m megatron_anymal.launcher.preflight.command --run-dir "${arguments[@]}" > "$answer"
    local code=$?
    run_dir=$(tail -n 1 "$answer")
    rm -f "$answer"
    (( code == 0 )) || end "$code"
    logs=$run_dir/logs/slurm_$SLURM_JOB_ID
    mkdir -p "$logs" || mistake "the run's folder $run_dir cannot be written on $SLURMD_NODENAME. Choose another one (exp_manager.explicit_log_dir)."
    summary=$run_dir/slurm.log
    local shown="$nodes node(s)"
    (( spares == 0 )) || shown+=" and $spares spare node(s)"
    say "start ${SLURM_RESTART_COUNT:-0} on $shown ($SLURM_JOB_NODELIST) x $processes process(es):$(printf ' %q' "${arguments[@]}")"
}

check_nodes() {
    local ranks=$(( SLURM_JOB_NUM_NODES * processes )) code
    in_step --ntasks="$ranks" --ntasks-per-node="$processes" --distribution=block --overcommit --wait=30 \
        "${python[@]}" -m megatron_anymal.launcher.preflight.command --address="$(head_address)" --port="$(port 1)" \
        --nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" "${arguments[@]}" \
        > "$logs/preflight.log"
    code=$?
    tee -a "$summary" < "$logs/preflight.log" >&3
    (( code == 0 )) || end "$code"
}

launch() {
    # Slurm signals every process of a step: those that do not handle USR1 must ignore it.
    # shellcheck disable=SC2016  # expands on the node
    local on_node='trap "" USR1; exec >> "$1/$SLURMD_NODENAME.log" 2>&1; logs=$1 nodes=$2 spares=$3; shift 3
        echo "--- start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURMD_NODENAME"
        position=--spare
        (( SLURM_NODEID >= nodes )) || position=--node-rank=$SLURM_NODEID
        set -- "${@/#--node-rank=/$position}"
        (( spares && SLURM_NODEID == 0 )) || exec "$@"
        "$@"
        code=$?
        echo "$code" > "$logs/exit_code"
        exit "$code"'
    # After one node has ended, the others get time to shut down cleanly. With spares, a lost node does not end the others.
    local lasting=("--wait=$ANYMAL_GRACE_SECONDS") code
    (( spares == 0 )) || lasting=(--wait=0 --no-kill)
    launched=1
    rm -f "$logs/exit_code"
    in_step --ntasks-per-node=1 "${lasting[@]}" bash -c "$on_node" launch "$logs" "$nodes" "$spares" \
        "${python[@]}" -m megatron_anymal launch --nproc-per-node="$processes" --nnodes="$nodes" --node-rank= \
        --rdzv-endpoint="$(head_address):$(port 0)" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --grace-seconds="$ANYMAL_GRACE_SECONDS" "${arguments[@]}"
    code=$?
    # If a node was replaced, the step fails because of it; the first node has the run's own exit code.
    if (( spares )) && [[ -s $logs/exit_code ]]; then code=$(< "$logs/exit_code"); fi
    end "$code"
}

# Runs a job step and returns its exit code; signals that arrive in the meantime are handled at once. After end_steps,
# returns 143 and starts nothing.
in_step() {
    local code
    [[ ! $steps_over ]] || return 143
    srun "${container[@]}" --cpu-bind=none "$@" &
    step=$! step_began=$SECONDS
    # A signal that arrived while srun was being started found no step.
    [[ ! $steps_over ]] || end_steps
    [[ ! $stop_requested ]] || ask_to_stop
    while :; do
        wait "$step"
        code=$?
        # A signal handled by this script interrupts `wait`, not the step.
        if (( code <= 128 )) || ! kill -0 "$step" 2> /dev/null; then break; fi
    done
    wait "$step"
    code=$?
    step=""
    return "$code"
}

end_steps() {
    steps_over=1
    [[ ! $step ]] || kill -TERM "$step" 2> /dev/null
}

on_stop_request() {
    [[ ! $stop_requested ]] || return
    stop_requested=1
    say "asked to stop: the ranks have $ANYMAL_GRACE_SECONDS s to write a checkpoint"
    ask_to_stop
}

# Before the launch there is nothing to save: the job ends after the current step.
ask_to_stop() {
    [[ $launched && $step && ! $asker ]] || return
    keep_asking "$step" $(( SECONDS - step_began )) &
    asker=$!
}

# Repeats the request, since a process that is just starting misses it.
keep_asking() {
    local step=$1 age=$2 waited
    # A signal that arrives before srun has started its tasks would kill srun itself.
    (( age > 5 )) || sleep 5
    for (( waited = 0; waited < ANYMAL_GRACE_SECONDS; waited += 10 )); do
        kill -USR1 "$step" 2> /dev/null || return
        sleep 10
    done
    say "did not stop within $ANYMAL_GRACE_SECONDS s: requeueing the job, to resume from the last checkpoint"
    scontrol requeue "$job"
}

# scancel, time limit, preemption or a failed node: Slurm decides what happens to the job, and signals its steps too.
on_termination() {
    [[ ! $terminated && ! $requeued ]] || return
    terminated=1
    say "terminated from outside (scancel, the time limit, preemption or a failed node)"
    if [[ ! $stop_requested && $time_limit ]] && (( SECONDS >= time_limit - 30 )); then
        say "the time limit was reached without a USR1 in time to write a checkpoint: submit with --signal=B:USR1@$(( ANYMAL_GRACE_SECONDS + 30 ))"
    fi
    end_steps
}

# Exits with a code, or requeues the job.
end() {
    local code=$1 why lost=""
    [[ ! $asker ]] || kill "$asker" 2> /dev/null
    # A failed node takes its processes with it, which may be visible here before Slurm notices the failure.
    if (( code == 1 || code > 128 )); then lost=$(lost_node); fi
    if [[ ! $terminated && ( $code == 75 || $lost ) ]]; then
        if progressed; then requeue "$lost"; else code=79; fi
    fi
    why=$(last_error)
    say "ended with code $code: $(meaning "$code")${why:+; $why}"
    exit "$code"
}

# Prints a node of the job that does not respond or is out of service; empty if all are healthy.
lost_node() {
    sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format="%N %T" |
        awk '$2 ~ /\*|down|fail|drain|error/ { print "node " $1 " is " $2; exit }'
}

requeue() {
    requeued=1
    say "${1:-stopped} at $(newest_checkpoint): requeueing the job"
    if scontrol requeue "$job"; then
        # Slurm kills this script while it waits.
        sleep 60 &
        wait $!
        exit 75
    fi
    say "scontrol requeue failed: submit the job again to continue"
}

# Whether the run made progress between the last three stops of this job.
progressed() {
    [[ $run_dir ]] || return 0
    echo "$SLURM_JOB_ID $(newest_checkpoint)" >> "$run_dir/logs/stops"
    [[ $(tail -n 3 "$run_dir/logs/stops" | uniq -c) != *" 3 $SLURM_JOB_ID "* ]]
}

newest_checkpoint() {
    local folder newest="no checkpoint"
    for folder in "$run_dir"/checkpoints/step_*; do
        [[ ! -d $folder ]] || newest=${folder##*/}
    done
    echo "$newest"
}

# Prints the last error of this start from the nodes' logs.
last_error() {
    local log
    [[ $logs ]] || return
    for log in "$logs"/*.log; do
        [[ ! -f $log ]] || awk '/^--- start/ { last = "" } /^error/ { last = $0 } END { if (last) print last }' "$log"
    done | tail -n 1
}

# Meanings of the exit codes in megatron_anymal/resilience/exit_codes.py.
meaning() {
    case $1 in
        0) echo "the run is complete" ;;
        1) echo "it failed; see $logs" ;;
        2) echo "a setting, data or a checkpoint cannot be used; restarting will not help" ;;
        75) echo "stopped with a checkpoint; submit the job again to continue" ;;
        76) echo "a process made no progress" ;;
        77) echo "too many steps in a row without a finite gradient" ;;
        78) echo "there are checkpoints, but none is valid" ;;
        79) echo "restarted several times without progress" ;;
        80) echo "another job is using the run's folder" ;;
        81) echo "the last checkpoint could not be written" ;;
        *) echo "$( (( $1 > 128 )) && echo "signal $(( $1 - 128 ))" || echo "unknown"); see $logs" ;;
    esac
}

mistake() {
    say "error: $1"
    end 2
}

# Prints the address by which Slurm itself reaches the first node, since node names need not be hostnames.
head_address() {
    local first node
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    node=$(scontrol show node -o "$first")
    [[ $node =~ NodeAddr=([^ ]+) ]] && echo "${BASH_REMATCH[1]}" || echo "$first"
}

# Prints one of the job's two ports, which lie below the ephemeral range: 0 for the launcher, 1 for the checks.
port() {
    echo $(( 10000 + SLURM_JOB_ID % 10000 * 2 + $1 ))
}

say() {
    echo "$(date '+%Y-%m-%d %H:%M:%S') job $job: $1" | tee -a "$summary" >&3
}
