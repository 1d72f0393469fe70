# What every training script shares; it sources this file, names its recipe, and calls
#   take NAME=DEFAULT NAME:MEANING ... -- "$@"   positional arguments into variables, more flags
#   start [FLAG ...]                             main.py with recipe, FLAGs, arguments, more flags
#   asked NAME                                   whether an argument of true or false is true
# A sweep calls `attempt WORDS...` for each run of its neighbour run_single.sh, then `conclude`.
# Later flags win: those after the positional arguments over all others, the recipe loses to all.
#
# From the environment:
#   HOSTFILE   of the multi_node scripts, as `deepspeed --hostfile` reads it (/job/hostfile)
#   PYTORCH_CUDA_ALLOC_CONF   settings of torch's allocator, by default expandable_segments:True
#   LAUNCHER   in place of `deepspeed` and its options: "torchrun --nproc_per_node 8", python

TRAINING="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
SCRIPT="$(readlink -f "${BASH_SOURCE[1]}")"
STEP="${SCRIPT#"$TRAINING/"}"
STEP="${STEP%%/*}"
ACTOR_MODEL_PATH="" CRITIC_MODEL_PATH="" ZERO_STAGE="" ACTOR_ZERO_STAGE="" CRITIC_ZERO_STAGE=""

fail() {
  echo "error: ${SCRIPT##*/}: $1" >&2
  exit 2
}

# NAME=DEFAULT takes a word, where it is missing or empty the default; NAME:MEANING needs one.
# What is left over becomes MORE.
take() {
  local -a names=()
  local spec name
  while [ "$1" != -- ]; do
    names+=("$1")
    shift
  done
  shift
  for spec in "${names[@]}"; do
    name="${spec%%[=:]*}"
    if [ -n "${1:-}" ]; then
      printf -v "$name" '%s' "$1"
    elif [ "$spec" != "${spec#"$name="}" ]; then
      printf -v "$name" '%s' "${spec#*=}"
    else
      fail "$name is missing: give ${spec#*:}"
    fi
    shift "$(($# < 1 ? 0 : 1))"
  done
  MORE=("$@")
}

# The program that starts main.py on the recipe's hardware, into COMMAND.
choose_launcher() {
  if [ -n "${LAUNCHER:-}" ]; then
    read -ra COMMAND <<< "$LAUNCHER"
    return
  fi
  COMMAND=(deepspeed --log_level warning)
  case "$RECIPE" in
    */single_gpu/*) COMMAND+=(--num_gpus 1) ;;
    */multi_node/*)
      HOSTFILE="${HOSTFILE:-/job/hostfile}"
      [ -f "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE: no such file; name one, with a line \`host slots=8\` for each node"
      COMMAND+=(--hostfile "$HOSTFILE")
      ;;
    quickstart/*) COMMAND=(python) ;;
  esac
  # Step 3 leaves the usual port to a step that runs beside it.
  case "$STEP:$RECIPE" in
    step3*:*/single_node/* | step3*:*/multi_node/*) COMMAND+=(--master_port 12346) ;;
  esac
}

# A flag and its value, where there is one, into COMMAND; without one the recipe's value holds.
add() {
  if [ -n "${2:-}" ]; then
    COMMAND+=("$1" "$2")
  fi
}

start() {
  choose_launcher
  # Blocks of memory that grow: rows of ever other lengths leave no gaps that nothing fits into.
  if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  fi
  COMMAND+=("$TRAINING/$STEP/main.py" --config "${TRAINING%/*}/dschat/recipes/$RECIPE" "$@")
  add --actor_model_name_or_path "${ACTOR_MODEL_PATH:-}"
  add --critic_model_name_or_path "${CRITIC_MODEL_PATH:-}"
  add --zero_stage "${ZERO_STAGE:-}"
  add --actor_zero_stage "${ACTOR_ZERO_STAGE:-}"
  add --critic_zero_stage "${CRITIC_ZERO_STAGE:-}"
  mkdir -p "$OUTPUT"
  # It takes the place of this shell, and passes signals on to the ranks.
  exec python -m dschat.train.launch --log "$OUTPUT/training.log" \
    "${COMMAND[@]}" --output_dir "$OUTPUT" ${MORE[@]+"${MORE[@]}"}
}

asked() {
  case "${!1}" in
    true) return 0 ;;
    false) return 1 ;;
    *) fail "$1 is ${!1}: give true or false" ;;
  esac
}

# A run that fails is counted and does not stop the others; a signal stops the run, which then says
# with what code, and with it the sweep. In its foreground bash would keep the signal to itself.
FAILED=0 RUN="" SIGNAL="" SIGNALS=0
pass_on() {
  SIGNAL="$1" SIGNALS=$((SIGNALS + 1))
  [ -z "$RUN" ] || kill -s "$SIGNAL" "$RUN" 2> /dev/null || true
}

attempt() {
  local code name seen
  for name in TERM INT USR1 HUP; do
    trap "pass_on $name" "$name"
  done
  echo "== run_single.sh $*"
  # A background process ignores SIGINT, unless that is undone in it.
  (trap - INT && exec bash "${SCRIPT%/*}/run_single.sh" "$@") &
  RUN=$!
  [ -z "$SIGNAL" ] || pass_on "$SIGNAL"
  while :; do # a signal ends the waiting, not the run
    seen="$SIGNALS" code=0
    wait "$RUN" || code=$?
    [ "$seen" != "$SIGNALS" ] || break
  done
  RUN=""
  [ -z "$SIGNAL" ] || [ "$code" != 0 ] || code=75
  [ "$code" != 75 ] && [ "$code" -lt 128 ] || exit "$code"
  [ "$code" = 0 ] || FAILED=$((FAILED + 1))
}

conclude() {
  [ "$FAILED" = 0 ] || fail "$FAILED of the runs failed; each has its training.log"
}
