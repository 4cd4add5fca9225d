#!/usr/bin/env bash
# From images in a bucket to a trained text tower on a TPU slice that may be deleted at any moment.
#
#   configs/cloud/tpu.sh [--dry-run] run      make the slice, run all stages, make it again whenever it is deleted
#   configs/cloud/tpu.sh [--dry-run] create   make the slice and install lit-fast
#   configs/cloud/tpu.sh [--dry-run] ssh COMMAND...   run a command on the first worker
#   configs/cloud/tpu.sh [--dry-run] delete   delete the slice
#
# --dry-run prints the commands. Everything may be repeated: what is complete is not done a second time. It runs in a
# checkout of the repository, on a machine that stays: it needs gcloud with an account, Python with pip, and no TPU.
set -euo pipefail

# --- Configuration; variables of the environment override it.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-central2-b}
BUCKET=${BUCKET:-my-bucket} # in the region of the zone
NAME=${NAME:-lit-fast}      # of the queued resource and of its node
ACCELERATOR=${ACCELERATOR:-v4-8}
RUNTIME=${RUNTIME:-tpu-ubuntu2204-base}
SPOT=${SPOT:-true} # false: on demand
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-lit-fast@$PROJECT.iam.gserviceaccount.com}
STAGES=${STAGES:-index embed tokenize train}
ATTEMPTS=${ATTEMPTS:-3}          # of a stage that fails although the slice is there
POLL_SECONDS=${POLL_SECONDS:-60} # between two looks at the slice

DATASET=gs://$BUCKET/pairs
RUN=gs://$BUCKET/runs/b8
INDEX=(lit-fast index "gs://$BUCKET/cc12m/{00000..02175}.tar" --out "$DATASET")
EMBED=(lit-fast embed "$DATASET" --tower augreg/B_8 --preprocess tf-squash --gelu tanh)
TOKENIZE=(lit-fast tokenize "$DATASET" --tokenizer "gs://$BUCKET/cc_en.model")
TRAIN=(lit-fast train siglit_b8_one_day --workdir "$RUN" --dataset "$DATASET")
# --- End of the configuration.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
location=("--project=$PROJECT" "--zone=$ZONE" --quiet)
dry_run=false
made=0          # slices that this process has requested
installed=false # whether lit-fast is on the workers

main() {
  if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    set -o noglob # prints patterns as they are
    shift
  fi
  case ${1:-} in
    run)
      local stage
      for stage in $STAGES; do
        run_stage "$stage"
      done
      delete_slice
      say "complete: $STAGES; see: lit-fast info $RUN"
      ;;
    create) prepare ;;
    ssh) on_workers 0 "export PATH=\$HOME/lit-fast/bin:\$PATH; $(quote "${@:2}")" ;;
    delete) delete_slice ;;
    *)
      sed -n '2,7s/^# \{0,1\}//p' configs/cloud/tpu.sh >&2
      exit 2
      ;;
  esac
}

# Run one stage until it succeeds, on as many slices as that takes.
run_stage() {
  local stage=$1 workers=0 failures=0 slices=$made status
  local -a command
  case $stage in
    index) command=("${INDEX[@]}") ;;
    embed) command=("${EMBED[@]}") workers=all ;; # each takes a share of the shards
    tokenize) command=("${TOKENIZE[@]}") ;;
    train) command=("${TRAIN[@]}") workers=all ;; # together
    *)
      say "stage $stage is unknown; give index, embed, tokenize or train in STAGES"
      exit 2
      ;;
  esac
  while true; do
    status=0
    if prepare; then
      on_workers "$workers" "bash on_vm.sh run $stage $(quote "${command[@]}")" || status=$?
      if ((status == 0)); then
        return
      fi
      say "stage $stage ended with status $status"
    fi
    if ((made > slices)); then # the failures before were another slice's
      slices=$made failures=0
    fi
    if [[ $(slice_state) == ACTIVE/READY || $status == 0 ]]; then
      failures=$((failures + 1))
    fi
    if ((failures >= ATTEMPTS)); then
      say "stage $stage failed $failures times; fix the cause and rerun the same command, or: configs/cloud/tpu.sh delete"
      exit 1
    fi
    sleep "$POLL_SECONDS"
  done
}

# Make the slice unless it is there, and install the checkout on all its workers.
prepare() {
  make_slice || return 1
  if $installed; then
    return
  fi
  do_or_print rm -rf build/lib build/wheels || return 1
  do_or_print python3 -m pip wheel --quiet --no-deps --wheel-dir build/wheels . || return 1
  do_or_print gcloud compute tpus tpu-vm scp build/wheels/lit_fast-*.whl configs/cloud/on_vm.sh "$NAME:" \
    --worker=all "${location[@]}" || return 1
  on_workers all "bash on_vm.sh install" || return 1
  installed=true
}

# Wait until the slice is there; request it if it is not, also after it was deleted.
make_slice() {
  local state
  local -a tier=()
  if [[ $SPOT == true ]]; then
    tier=(--spot)
  fi
  while true; do
    state=$(slice_state)
    case $state in
      ACTIVE/READY) return ;;
      ABSENT/*)
        do_or_print gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
          --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --service-account="$SERVICE_ACCOUNT" \
          "${tier[@]}" "${location[@]}" || return 1
        made=$((made + 1)) installed=false
        if $dry_run; then
          return
        fi
        ;;
      FAILED/* | SUSPENDED/* | ACTIVE/ABSENT | ACTIVE/PREEMPTED | ACTIVE/TERMINATED | ACTIVE/STOPPED)
        say "the slice is gone ($state)"
        delete_slice || return 1
        ;;
      *) say "waiting for the slice ($state)" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

delete_slice() {
  do_or_print gcloud compute tpus queued-resources delete "$NAME" --force "${location[@]}"
}

# Print the states of the queued resource and of its node, such as ACTIVE/READY.
slice_state() {
  if $dry_run; then
    ((made > 0)) && echo ACTIVE/READY || echo ABSENT/ABSENT
    return
  fi
  echo "$(state_of queued-resources 'value(state.state)')/$(state_of tpu-vm 'value(state)')"
}

# Print ABSENT where there is none, and UNKNOWN where gcloud cannot tell.
state_of() {
  local output
  if output=$(gcloud compute tpus "$1" describe "$NAME" --format="$2" "${location[@]}" 2>&1); then
    tail -n 1 <<<"$output"
  elif [[ $output == *NOT_FOUND* || $output == *"not found"* ]]; then
    echo ABSENT
  else
    printf '%s\n' "$output" >&2
    echo UNKNOWN
  fi
}

# Run a command on worker 0 or on all workers. The status is that of the command, or 255 where ssh fails.
on_workers() {
  do_or_print gcloud compute tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2" "${location[@]}"
}

do_or_print() {
  if $dry_run; then
    quote "$@"
  else
    "$@"
  fi
}

# Print a command so that a shell reads it back.
quote() {
  local word line=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@,*+-]+$ ]]; then
      line+=("$word")
    elif [[ $word == *"'"* && $word != *[\"\$\`\\!]* ]]; then
      line+=("\"$word\"")
    else
      line+=("'${word//\'/\'\\\'\'}'")
    fi
  done
  echo "${line[*]}"
}

say() {
  echo "tpu.sh: $*" >&2
}

main "$@"
