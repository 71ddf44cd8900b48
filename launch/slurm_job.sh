# The body of a batch job of Slurm: the launcher puts `#SBATCH` lines and the LAUNCH_ variables of start_worker.sh in
# front of it, and `first` (the number of the first attempt), `retries`, `seconds` (all hours) and `grace`.
# shellcheck shell=sh disable=SC2154,SC2317

set -u
umask 077
restarts=${SLURM_RESTART_COUNT:-0}
LAUNCH_ATTEMPT=$((first + restarts))
export LAUNCH_ATTEMPT
say() { printf '%s job %s attempt %s: %s\n' "$(date -u +%FT%TZ)" "$SLURM_JOB_ID" "$LAUNCH_ATTEMPT" "$*"; }
echo "$LAUNCH_ATTEMPT" >"$LAUNCH_FOLDER/attempt.$$" && mv "$LAUNCH_FOLDER/attempt.$$" "$LAUNCH_FOLDER/attempt"

if [ -e "$LAUNCH_FOLDER/stop" ]; then
    say "the launch was told to stop"
    exit 130
fi
if [ "$restarts" -gt "$retries" ]; then
    say "$retries retries: enough"
    exit 76
fi
# A job that comes from the queue again has its whole time limit again; all attempts together have the hours.
if [ -s "$LAUNCH_FOLDER/started" ]; then
    began=$(cut -d . -f 1 "$LAUNCH_FOLDER/started")
    left=$(((began + seconds - $(date +%s) + 59) / 60))
    [ "$left" -gt 0 ] && scontrol update "JobId=$SLURM_JOB_ID" "TimeLimit=$left"
else
    began=$(date +%s)
    echo "$began" >"$LAUNCH_FOLDER/started"
fi

# The address of the first node as Slurm has it, since not every node's name resolves.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
LAUNCH_ADDRESS=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)
export LAUNCH_ADDRESS

# Slurm sends SIGTERM to this shell before the time is over, up to a minute early: it is not a preemption then. srun's
# answer to SIGTERM would be to kill, so the tasks are told by scancel, which leaves this shell alone.
tell() {
    if [ "$(date +%s)" -ge $((began + seconds - grace - 90)) ]; then
        mkdir -p "$LAUNCH_FOLDER/attempt-$LAUNCH_ATTEMPT"
        : >"$LAUNCH_FOLDER/attempt-$LAUNCH_ATTEMPT/late"
    fi
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap tell TERM
say "on $SLURM_JOB_NODELIST"
# shellcheck disable=SC2016  # each task has its own number and node
srun --export=ALL --kill-on-bad-exit=0 --wait=0 sh -c '
    export LAUNCH_WORKER="$SLURM_PROCID" LAUNCH_HOST_NAME="$SLURMD_NODENAME"
    exec sh "$LAUNCH_FOLDER/start_worker.sh"' &
task=$!
while kill -0 "$task" 2>/dev/null; do
    wait "$task"
done
trap '' TERM

found=$(python3 -S "$LAUNCH_FOLDER/judge_attempt.py" "$LAUNCH_FOLDER" "$LAUNCH_ATTEMPT" "$LAUNCH_WORKERS")
say "$found"
status=$(printf '%s' "$found" | sed -n 's/.*"status": \([0-9]*\).*/\1/p')
case $found in
*'"retry": true'*)
    if [ "$restarts" -lt "$retries" ]; then
        # Where Slurm itself has put it into the queue already (a preemption), this is refused, and rightly so.
        scontrol requeue "$SLURM_JOB_ID" || say "not put into the queue by this script"
    else
        say "$retries retries: enough"
    fi
    ;;
esac
exit "${status:-76}"
