#!/usr/bin/env bash
# Both training stages under torchrun, one process for each GPU of this machine; see --help.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
config=$root/config/config_train_multigpu.json
environment=$root/config/environment.json
gpus=all

usage() {
  cat <<'END'
usage: train_LDM.sh [--gpus N] [--config FILE] [--env FILE] [-- ARGUMENT ...]

Train the autoencoder, then the diffusion model, with one process for each GPU.

  -g, --gpus N       GPUs to train on; 0 trains on the CPU (default: all, those of this machine)
  -c, --config FILE  training configuration (default: config/config_train_multigpu.json)
  -e, --env FILE     where to read and write (default: config/environment.json)
  -h, --help         show this text and stop
  -- ARGUMENT ...    handed to both stages, as in: train_LDM.sh -- --seed 1 --set compile=true

Relative paths start at the current folder; the two default files lie beside this script.
After an interruption, go on with: train_LDM.sh ... -- --resume
END
}

fail() {
  echo "error: $1 (see train_LDM.sh --help)" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    -g | --gpus | -c | --config | -e | --env)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        -g | --gpus) gpus=$2 ;;
        -c | --config) config=$2 ;;
        -e | --env) environment=$2 ;;
      esac
      shift 2
      ;;
    -h | --help)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument: $1" ;;
  esac
done
[[ $gpus =~ ^(all|0|[1-9][0-9]{0,3})$ ]] || fail "--gpus '$gpus': must be a number, or all"

python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python || command -v python3) || fail "no python found"

# A mistake that shows before the processes start is one line; from within them torchrun makes a traceback of it.
look='
import contextlib, sys
sys.path[0] = sys.argv.pop(1)
import torch
import utils
from ldm3d.cases import find_cases

def look():
    sys.argv[0] = "train_LDM.sh"
    with contextlib.redirect_stdout(sys.stderr):
        args = utils.training_parser("").parse_args()
    cfg, env = utils.read_settings(args)
    find_cases(env.data_base_dir, cfg.data, cfg.channel)
    print(torch.cuda.device_count())

utils.run_script(look)
'
available=$("$python" -c "$look" "$root" -c "$config" -e "$environment" "$@")
[[ $available ]] || exit 0 # -- --help
[[ $gpus != all ]] || gpus=$available
((gpus <= available)) || fail "--gpus $gpus: this machine has $available GPU(s)"
place="$gpus GPU(s)"
processes=$gpus
if ((gpus == 0)); then
  place='the CPU'
  processes=1
  export CUDA_VISIBLE_DEVICES=
  set -- --set ddp_backend=gloo "$@"
fi

run_stage() {
  local script=$1
  shift
  echo "train_LDM.sh: $script on $place" >&2
  "$python" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$processes" \
    "$root/$script" -c "$config" -e "$environment" -g "$gpus" "$@"
}

# Ctrl-C reaches the stage, which saves its state; then this script ends too instead of starting the next stage.
trap 'exit 130' INT

run_stage train_autoencoder.py "$@"

# An interrupted first stage leaves nothing that the second one could go on from. Of several --resume the last one counts.
for argument; do
  [[ $argument != --resume* ]] || set -- "$@" --resume auto
done
run_stage train_diffusion.py "$@"
