#!/bin/sh
# Makes vendor/niivue.min.js from npm: NiiVue as pinned in package-lock.json, one file, without its reader of Zarr
# (two thirds of the size, and WebAssembly that the page's content security policy would refuse).
# Needs npm and a registry; the service needs neither, for what this makes is committed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp "$here/package.json" "$here/package-lock.json" "$work"
cd "$work"
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error

echo 'export { Niivue } from "@niivue/niivue"' > entry.js
: > none.js
node_modules/.bin/esbuild entry.js --bundle --format=esm --minify --target=es2022 --alias:zarrita=./none.js \
  --legal-comments=none --log-level=error --outfile=niivue.min.js

{
  version=$(sed -n 's/^ *"version": "\(.*\)",/\1/p' node_modules/@niivue/niivue/package.json)
  echo "niivue.min.js is NiiVue $version, bundled with the packages below. Its labels are drawn with a texture made of"
  echo "the font Roboto (Copyright Google, Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0)."
  printf '\n== @niivue/niivue\n\n'
  cat "$here/vendor/LICENSE.niivue"
  for package in @lukeed/uuid @ungap/structured-clone array-equal fflate gl-matrix nifti-reader-js; do
    printf '\n== %s\n\n' "$package"
    cat "node_modules/$package"/[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*
  done
} > LICENSES.txt

cp niivue.min.js LICENSES.txt "$here/vendor"
cd "$here/vendor"
sha256sum niivue.min.js LICENSES.txt > SHA256SUMS
ls -l niivue.min.js
