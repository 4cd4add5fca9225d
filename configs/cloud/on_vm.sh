#!/usr/bin/env bash
# The part of tpu.sh that runs on the workers of a slice, in the home directory.
#
#   bash on_vm.sh install                   install the wheel that is here
#   bash on_vm.sh run STAGE COMMAND...      run a command, or wait for the one of STAGE that runs already
#
# A stage continues when the connection is lost. Its output is in lit-fast/STAGE.log.
set -euo pipefail

environment=$HOME/lit-fast
export PATH=$environment/bin:$HOME/.local/bin:$PATH

case ${1:-} in
  install)
    wheels=("$HOME"/lit_fast-*.whl)
    # The image has Python 3.10; uv brings another one.
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    uv venv --quiet --allow-existing --python 3.12 "$environment"
    uv pip install --quiet --python "$environment/bin/python" "lit-fast[tpu,remote] @ file://${wheels[-1]}"
    lit-fast --version
    ;;
  run)
    stage=$2 base=$environment/$2
    shift 2
    mkdir -p "$environment"
    touch "$base.log"
    shown=--lines=20
    exec 9>"$base.lock"
    if flock --nonblock 9; then
      rm -f "$base.status"
      shown=--bytes=+$(($(stat --format=%s "$base.log") + 1))
      # The child keeps the lock until it ends.
      # shellcheck disable=SC2016 # the child expands them
      setsid bash -c 'status=0; "${@:2}" || status=$?; echo "$status" >"$1.status"' "$stage" "$base" "$@" \
        >>"$base.log" 2>&1 </dev/null &
    fi
    exec 9>&-
    tail "$shown" --follow "$base.log" &
    trap 'kill $! || true' EXIT
    flock "$base.lock" true
    sleep 0.2 # for the last lines of the log
    exit "$(cat "$base.status" || echo 1)"
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
