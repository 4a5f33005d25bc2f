#!/bin/sh
# Installs the folder that it lies in, without a network: ./install.sh [PYTHON]
set -eu

fail() {
  echo "error: $1" >&2
  exit 2
}

cd "$(dirname "$0")"
python=${1:-python3}
here=$(pwd)

command -v "$python" >/dev/null || fail "$python: no such program; name the Python to use: ./install.sh PYTHON"
wanted=$(cat platform.txt)
found=$("$python" -c 'import platform, sys
print(*(sys.implementation.name, "%d.%d" % sys.version_info[:2], platform.system(), platform.machine()))')
[ "$found" = "$wanted" ] || fail "this bundle is for $wanted, and $python is $found"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make environments; install its venv module first (Debian: python3-venv)"

sha256sum --check --strict --quiet SHA256SUMS >&2 || fail "the bundle is damaged or not whole; copy it again"

echo "== environment: $here/venv"
"$python" -m venv --clear venv
# pip takes the wheels that are listed and no others, checks their digests once more, and asks nobody.
PIP_CONFIG_FILE=/dev/null venv/bin/python -m pip --isolated install --quiet --disable-pip-version-check \
  --no-index --no-deps --require-hashes -r wheels.txt || fail "the wheels cannot be installed"
PIP_CONFIG_FILE=/dev/null venv/bin/python -m pip --isolated check || fail "the wheels do not fit together"

echo "== installed; INSTALL.md says how to go on:"
sed -n 's/^    /  /p' INSTALL.md
