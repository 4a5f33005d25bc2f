#!/usr/bin/env bash
# What deploy.yml and roll-out.yml do with images, as commands that can be tried anywhere.
set -euo pipefail

usage() {
  cat <<'END'
usage: images.sh version
       images.sh sign IMAGE DIGESTS SBOMS
       images.sh verify IMAGE DIGESTS
       images.sh arguments IMAGE DIGESTS

  version    the version of the code, for the workflow's outputs; a tag that names another one is refused
  sign       sign each variant without a key, and attest its list of packages SBOMS/<variant>.cdx.json
  verify     each variant was signed by this repository's deploy.yml
  arguments  options for mlops.deployment.roll_out, one word a line

IMAGE is registry/name; DIGESTS a folder with one file for each variant, cpu and cuda, that holds its digest.
END
}

fail() {
  echo "error: $1" >&2
  exit 2
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

version() {
  local version
  version=$(sed -n 's/^__version__ = "\([0-9A-Za-z.+-]*\)"$/\1/p' "$root/ldm3d/__init__.py")
  [[ -n $version ]] || fail "ldm3d/__init__.py: no version"
  if [[ ${GITHUB_REF_TYPE:-} == tag && ${GITHUB_REF_NAME:-} != "v$version" ]]; then
    fail "the tag is $GITHUB_REF_NAME, the code's version $version: tag v$version, or raise the version"
  fi
  echo "version=$version" | tee -a "${GITHUB_OUTPUT:-/dev/null}"
}

# Calls a function with variant and image@digest, for each variant.
each() {
  local do=$1 image=$2 digests=$3 file digest count=0
  for file in "$digests"/*; do
    [[ -f $file ]] || fail "$digests: no digests"
    digest=$(<"$file")
    [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || fail "$file: holds no digest"
    "$do" "$(basename "$file")" "$image@$digest"
    count=$((count + 1))
  done
  echo "$do: $count images" >&2
}

sign() {
  local sbom=$sboms/$1.cdx.json
  [[ -s $sbom ]] || fail "$sbom: missing"
  cosign sign --yes "$2"
  cosign attest --yes --type cyclonedx --predicate "$sbom" "$2"
}

verify() {
  local identity
  identity=$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/.github/workflows/deploy.yml@$GITHUB_REF
  cosign verify --certificate-identity "$identity" \
    --certificate-oidc-issuer https://token.actions.githubusercontent.com "$2" >/dev/null
}

arguments() {
  printf '%s\n' --image "$1=$2"
}

words=$#
takes() {
  ((words == $1)) || fail "$2 (see images.sh --help)"
}

case ${1:-} in
  version)
    takes 1 version
    version
    ;;
  sign)
    takes 4 "sign IMAGE DIGESTS SBOMS"
    sboms=$4
    each sign "$2" "$3"
    ;;
  verify | arguments)
    takes 3 "$1 IMAGE DIGESTS"
    each "$1" "$2" "$3"
    ;;
  -h | --help) usage ;;
  *) fail "${1:-nothing}: no such command (see images.sh --help)" ;;
esac
