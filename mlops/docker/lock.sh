#!/usr/bin/env bash
# Makes the lock files anew: every package of the images with its version and the digests of its files.
#
#   TORCH_WHEELS=FOLDER_OR_URL mlops/docker/lock.sh
#
# TORCH_WHEELS: where torch's CPU wheels are listed. Other packages come from where uv finds them. Needs uv.
set -euo pipefail

: "${TORCH_WHEELS:?error: set it to the folder or page that lists wheels of torch for CPUs}"
cd "$(dirname "$0")/locks"

compile() {
  uv pip compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --custom-compile-command "mlops/docker/lock.sh" "$@"
}

torch=$(sed -n 's/^torch==\(.*\)$/\1/p' ../../../requirements.txt)
echo "torch==$torch+cpu" | compile image.in --constraint - --find-links "$TORCH_WHEELS" --output-file cpu-py3.11.txt
compile image.in --output-file cuda-py3.11.txt
# The same versions as in the image that they are added to.
compile dev.in --constraint cpu-py3.11.txt --output-file dev-py3.11.txt
compile mlflow.in --output-file mlflow-py3.11.txt
compile sbom.in --output-file sbom-py3.11.txt
