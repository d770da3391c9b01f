#!/usr/bin/env bash
# Submit a whole conversion, from text to Table 2, each job after the one before. Prints their ids.
#   bash slurm/table2.sh 8b
# Options are passed to every launcher. Stages that are finished, or that --from takes, are left out. AFTER=17:18 makes the
# first job wait for others. If neither options, preset nor run name shards or a corpus, shards are prepared first, in
# HALO_SHARDS, in HALO_DATA_TASKS tasks; HALO_DATA has more options for that (slurm/prepare_data.sh).
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source slurm/common.sh || exit 2

command -v "$PYTHON" >/dev/null || PYTHON=python3 # where it is in a container; this needs no package
graph() { "$PYTHON" -m halo.graph "$@"; }
size=${1:-}
preset=$(graph preset "$size") || exit 2
options=(--preset "$preset" "${@:2}")
find_run "${options[@]}"

before=${AFTER:-}
submit() { # a name, what there is once it is done, a script, and its options
  if [[ -f $2 ]]; then
    echo "$1: done already, in $(dirname "$2")"
    return
  fi
  before=$(sbatch --parsable ${before:+--dependency="afterok:$before" --kill-on-invalid-dep=yes} "${@:3}")
  before=${before%%;*} # a cluster's name may follow
  echo "$1: job $before"
}

has_data() {
  [[ " ${options[*]}" =~ \ --[a-z]+\.(shards|corpus\.source)[\ =] ]] ||
    grep -Eqs '(shards|source) = "[^"]' "$preset_file" "$run/config.toml"
}

if ! has_data; then
  shards=${HALO_SHARDS:-shards}
  read -ra data <<<"${HALO_DATA:-}"
  submit data "$shards/held_out/held_out.json" ${HALO_DATA_TASKS:+--array="0-$((HALO_DATA_TASKS - 1))"} \
    slurm/prepare_data.sh --out "$shards" "${data[@]}" "${options[@]}"
  for stage in $(graph training); do options=("--$stage.shards" "$shards/$stage" "${options[@]}"); done
  options=(--heldout "$shards/held_out" "${options[@]}") # one that was given comes later, and stays
fi

while read -r stage script; do
  if [[ " $taken " == *" $stage "* && ! -f $run/$stage/stage.json ]]; then
    echo "$stage: the first job takes it from another run"
  else
    submit "$stage" "$run/$stage/stage.json" "slurm/$script" "${options[@]}"
  fi
done < <(graph jobs "$size")
