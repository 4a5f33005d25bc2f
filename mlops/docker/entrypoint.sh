#!/usr/bin/env bash
# Starts the program that MODE names, in place of this one, so that signals reach it. Arguments are handed on.
#
#   MODE=train: STAGE=autoencoder|diffusion; TORCHRUN_ARGS, if set, starts it under torchrun with these.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

if [ "$(id -u)" -eq 0 ]; then
  fail "this image does not run as root: leave out --user, or give another one, as --user 10001:10001"
fi

case "${MODE:-}" in
  api) exec python mlops/docker/api_server.py "$@" ;;
  worker) exec python -m mlops.api.worker "$@" ;;
  train)
    case "${STAGE:-}" in
      autoencoder | diffusion) ;;
      *) fail "STAGE '${STAGE:-}': must be autoencoder or diffusion" ;;
    esac
    if [ -n "${TORCHRUN_ARGS:-}" ]; then
      read -ra torchrun_args <<<"$TORCHRUN_ARGS"
      exec torchrun "${torchrun_args[@]}" "train_$STAGE.py" "$@"
    fi
    exec python "train_$STAGE.py" "$@"
    ;;
  infer) exec python inference.py "$@" ;;
  jupyter)
    command -v jupyter >/dev/null || fail "MODE=jupyter: only the dev image has Jupyter"
    exec jupyter lab --ip=0.0.0.0 --no-browser "$@"
    ;;
  *) fail "MODE '${MODE:-}': must be api, worker, train, infer or jupyter" ;;
esac
