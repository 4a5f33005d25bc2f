#!/usr/bin/env bash
# Builds the image and starts what --mode names. setup_docker.ps1 does the same on Windows.
#
#   mlops/docker/setup_docker.sh [--environment dev|prod] [--mode api|train|jupyter] [--variant cpu|cuda] [-- ARGUMENTS]
#
#   --environment  prod (default): the code of the image; dev: this checkout's code, and Jupyter
#   --mode         api (default): the service, at http://127.0.0.1:8000/; its first start prints a key
#                  train: both stages of the demo, on phantoms that are made the first time
#                  jupyter: notebooks at http://127.0.0.1:8888/, in dev
#   --variant      cpu (default) or cuda
#   ARGUMENTS      are handed on to the program; in train, to both stages
set -euo pipefail

environment=prod mode=api variant=cpu

fail() {
  echo "error: $1" >&2
  exit 2
}

check() { # OPTION VALUE ALLOWED...
  local option=$1 value=$2 allowed
  shift 2
  for allowed in "$@"; do
    [ "$value" != "$allowed" ] || return 0
  done
  fail "$option '$value': must be one of $*"
}

while [ $# -gt 0 ]; do
  case "$1" in
    --environment | --mode | --variant)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "$1: no such option; there are --environment, --mode and --variant" ;;
  esac
done
check --environment "$environment" dev prod
check --mode "$mode" api train jupyter
check --variant "$variant" cpu cuda
[ "$mode" != jupyter ] || [ "$environment" = dev ] || fail "--mode jupyter needs --environment dev"
command -v docker >/dev/null || fail "docker is not installed, or not on PATH"

root=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/ldm3d/__init__.py")
image=ldm3d:$version-$variant
if [ "$environment" = dev ]; then image+=-dev; fi

docker build --file "$root/mlops/docker/Dockerfile" --target "$environment" --tag "$image" \
  --build-arg "VARIANT=$variant" --build-arg "VERSION=$version" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" "$root"

tmp=/tmp
# Kernels that a GPU's `compile: true` makes are loaded from there, and Docker would forbid it.
if [ "$variant" = cuda ]; then tmp+=:exec; fi
flags=(--read-only --tmpfs "$tmp" --cap-drop ALL --security-opt no-new-privileges --shm-size 1g
  --volume ldm3d-data:/data --volume ldm3d-datasets:/datasets --volume ldm3d-models:/models
  --volume ldm3d-outputs:/outputs)
if [ "$variant" = cuda ]; then flags+=(--gpus all); fi
if [ "$environment" = dev ]; then flags+=(--volume "$root:/app:ro"); fi

python() {
  docker run --rm "${flags[@]}" --entrypoint python "$image" "$@"
}

start_api() {
  local keys
  keys=$(python -m mlops.api.keys list)
  if [ -z "$keys" ]; then
    echo "the first key; it is shown this once:"
    python -m mlops.api.keys create --name "$(id -un)" --role admin
  fi
  if [ -n "$(docker ps --all --quiet --filter 'name=^ldm3d-api$')" ]; then docker rm --force ldm3d-api >/dev/null; fi
  docker run --detach --name ldm3d-api --restart unless-stopped --publish 127.0.0.1:8000:8000 "${flags[@]}" \
    "$image" "$@" >/dev/null
  for _ in {1..60}; do
    if docker exec ldm3d-api python mlops/docker/health_check.py --ready >/dev/null 2>&1; then
      echo "ready: http://127.0.0.1:8000/"
      return
    fi
    sleep 2
  done
  docker logs ldm3d-api >&2
  fail "the service was not ready within 2 minutes; what it said stands above"
}

train() {
  local files=(-c config/config_demo.json -e mlops/docker/environment.json) stage
  python -c 'import pathlib, sys; sys.exit(not pathlib.Path("/datasets/Task01_BrainTumour/dataset.json").exists())' ||
    python download_brats_data.py -e mlops/docker/environment.json --phantom 420
  for stage in autoencoder diffusion; do
    docker run --rm "${flags[@]}" --env MODE=train --env "STAGE=$stage" "$image" "${files[@]}" "$@"
  done
}

case "$mode" in
  api) start_api "$@" ;;
  train) train "$@" ;;
  jupyter) docker run --rm --publish 127.0.0.1:8888:8888 "${flags[@]}" --env MODE=jupyter "$image" "$@" ;;
esac
