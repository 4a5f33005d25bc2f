#!/usr/bin/env bash
# Removes from an environment what no program of ours uses: tests of packages, and on a CPU torch's headers, which only
# a compiler reads.
#
#   slim.sh ENVIRONMENT cpu|cuda
set -euo pipefail

packages=$(echo "$1"/lib/python3*/site-packages)
find "$packages" -type d -name tests -prune -exec rm -rf {} +
rm -rf "$packages"/torch/test "$packages"/torch/bin/*test* "$packages"/torch/bin/*Test "$packages"/torch/bin/protoc*
if [ "$2" = cpu ]; then
  rm -rf "$packages"/torch/include "$packages"/torch/share
fi
