# shellcheck shell=bash
# What the sbatch scripts of this folder share: how ranks start, and what the job does when they end.
#
#   launch launcher/kd.py --preset hypenet-9b ...    # one rank a GPU, or one a node where the job has no GPUs
#
# Ranks end with 0 (done), 2 (a mistake of the user's: one line), 75 (stopped by a signal, and saved), or another status.
# After 75 the job queues again and resumes from there. After another status each node is checked: if one is sick, the job
# queues again without it; if all are well, the job has failed.

set -euo pipefail

# What is special about a cluster (slurm/site_example.sh). It may also load modules.
# shellcheck source=slurm/site_example.sh
[[ ! -f slurm/site.sh ]] || source slurm/site.sh

PYTHON=${HALO_PYTHON:-.venv/bin/python}
CHECK=${HALO_CHECK:-'! command -v nvidia-smi || nvidia-smi'} # fails on a node whose GPUs do not answer

fail() {
  echo "error: $1" >&2
  exit 2
}

# From a launcher's options sets `run`, the run's folder (the last --run, else where HALO_RUNS keeps the last --preset's),
# `preset_file`, and `taken`, the words after --from (a run's folder, then stages).
find_run() {
  local word before="" option="" preset=""
  run="" taken=""
  for word in "$@"; do
    case $before in --run) run=$word ;; --preset) preset=$word ;; esac
    case $word in --run=*) run=${word#*=} ;; --preset=*) preset=${word#*=} ;; esac
    [[ $word != --* ]] || option=$word
    [[ $option != --from || $word == --from ]] || taken+=" $word"
    before=$word
  done
  [[ -n $preset ]] || fail "no preset: add --preset hypenet-9b, or another"
  run=${run:-${HALO_RUNS:-runs}/$(basename "$preset" .toml)}
  [[ $preset == *.toml ]] || preset=halo/presets/$preset.toml
  # shellcheck disable=SC2034 # table2.sh reads it, and `taken`
  preset_file=$preset
}

launch() {
  local nodes ranks options logs status=0
  find_run "$@"
  claim_run
  logs=$run/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID
  mkdir -p "$logs"
  read -ra options <<<"${HALO_SRUN:-}"
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  ranks=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  ranks=${ranks##*:} # a kind of GPU may stand before: h100:8
  export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) LOCAL_WORLD_SIZE=$ranks

  echo "$(date '+%F %T') $1: ${#nodes[@]} x $ranks ranks on $SLURM_JOB_NODELIST, each with a log in $logs"
  # --wait: if one rank ends, the others have a minute to end by themselves, with a status and a line of their own.
  srun --ntasks=$((${#nodes[@]} * ranks)) --ntasks-per-node="$ranks" --cpus-per-task=$((SLURM_CPUS_ON_NODE / ranks)) \
    --kill-on-bad-exit=0 --wait=60 --output="$logs/rank-%t.log" --open-mode=append "${options[@]}" \
    bash slurm/rank.sh "$PYTHON" "$@" --run "$run" || status=$?
  echo "$(date '+%F %T') $1: status $status"

  case $status in
    0) return ;;
    2) show_error "$logs" ;;
    75) requeue "stopped and saved" ;;
    *) find_failed_nodes "$logs" "${nodes[@]}" ;;
  esac
  exit "$status"
}

# Two jobs must not write to one run's folder at the same time.
claim_run() {
  local other=""
  mkdir -p "$run/slurm"
  [[ ! -f $run/slurm/job ]] || other=$(<"$run/slurm/job")
  if [[ -n $other && $other != "$SLURM_JOB_ID" && $(state_of "$other") == RUNNING ]]; then
    fail "job $other works on $run: wait for its end, or scancel $other"
  fi
  echo "$SLURM_JOB_ID" >"$run/slurm/job"
}

state_of() {
  squeue --noheader --jobs="$1" --format=%T 2>/dev/null || true # squeue does not know a job that ended long ago
}

show_error() {
  grep -h '^error: ' "$1"/rank-*.log | tail -n 1 >&2 || true
}

# Whether this script still speaks for its job: it was not cancelled, and Slurm has not itself started it elsewhere.
# Asked three times: a busy controller may not answer at once, and the job would be lost.
is_ours() {
  for _ in 1 2 3; do
    [[ $(state_of "$SLURM_JOB_ID") != RUNNING || $(job_field Restarts) != "${SLURM_RESTART_COUNT:-0}" ]] || return 0
    sleep 1
  done
  return 1
}

job_field() {
  scontrol --oneliner show job "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p"
}

# Queue this job again. Arguments: why, and nodes to do without.
requeue() {
  local excluded
  if ! is_ours; then
    echo "$1; the job was cancelled, or is queued again already"
    return
  fi
  trap '' TERM # it comes with requeuing
  if [[ -z ${2:-} ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    excluded=$(job_field ExcNodeList)
    [[ $excluded != "(null)" ]] || excluded=""
    scontrol requeuehold "$SLURM_JOB_ID" # a running job's list cannot be changed
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$2${excluded:+,$excluded}"
    scontrol release "$SLURM_JOB_ID"
  fi
  echo "$1: queued again"
}

# Check all nodes at once, and queue the job again without those that are sick. A node that does not answer is left to
# Slurm: it queues the job again once it notices. A job that queues itself before finds its GPUs miscounted (22.05).
# Arguments: a folder for the nodes' answers, and the nodes.
find_failed_nodes() {
  local logs=$1 node silent="" sick=()
  shift
  is_ours || return 0
  for node in "$@"; do
    timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
      bash -c "($CHECK) && echo well || echo sick" >"$logs/check-$node.log" 2>&1 &
  done
  wait
  for node in "$@"; do
    case $(tail -n 1 "$logs/check-$node.log") in well) ;; sick) sick+=("$node") ;; *) silent+=" $node" ;; esac
  done
  if [[ -n $silent ]]; then
    echo "no answer from$silent: waiting for Slurm to notice"
    for _ in {1..90}; do # its SlurmdTimeout: 5 minutes, as a rule
      is_ours || return 0
      sleep 10
    done
  elif ((${#sick[@]} && ($# == 1 || ${#sick[@]} < $#))); then # all of many: it is the check
    requeue "failed: ${sick[*]}" "$(IFS=, && echo "${sick[*]}")"
  else
    echo "${#sick[@]} of $# nodes failed the check: see the logs"
  fi
}
