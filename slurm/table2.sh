#!/usr/bin/env bash
# Submit a whole conversion, from stage 1 to Table 2, each job after the one before. Prints their ids.
#   bash slurm/table2.sh 8b --align.shards shards/align --distill.shards shards/distill ...
# Options go on to every launcher. A stage that is finished is left out. AFTER=17:18 has the first job wait for others.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source slurm/common.sh || exit 2

declare -A presets=([2b]=hypenet-2b [4b]=hypenet-5b [8b]=hypenet-9b)
size=${1:-}
[[ -n $size && -n ${presets[$size]:-} ]] || fail "say which teacher: bash slurm/table2.sh 2b, 4b or 8b"
options=(--preset "${presets[$size]}" "${@:2}")
find_run "${options[@]}"

before=${AFTER:-}
submit() { # a stage, and its script
  if [[ -f $run/$1/stage.json ]]; then
    echo "$1: done already, in $run/$1"
    return
  fi
  before=$(sbatch --parsable ${before:+--dependency="afterok:$before" --kill-on-invalid-dep=yes} "$2" "${options[@]}")
  before=${before%%;*} # a cluster's name may follow
  echo "$1: job $before"
}

submit align "slurm/stage1_$size.sh"
submit selection "slurm/select_$size.sh"
submit distill "slurm/stage2_$size.sh"
submit finetune "slurm/stage3_$size.sh"
submit export slurm/export.sh
submit eval slurm/eval_niah.sh
