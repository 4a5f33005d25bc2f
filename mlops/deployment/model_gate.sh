#!/usr/bin/env bash
# Is the candidate no worse than the champion? Fetches what evaluate.py measured of both and asks mlops.pipelines.gate.
#
#   model_gate.sh ACCOUNT CANDIDATE
#
# ACCOUNT is the storage account with the container `models`, CANDIDATE a folder in it; `champion` is what is served.
# Exit status as the gate's: 0 promote, 1 keep the champion, 2 they cannot be compared.
set -euo pipefail

[[ $# == 2 && -n $1 && $2 =~ ^[A-Za-z0-9._/-]+$ ]] || {
  echo "error: give ACCOUNT and CANDIDATE, a folder in the container models" >&2
  exit 2
}
account=$1
candidate=${2%/}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

blob() {
  local command=$1
  shift
  az storage blob "$command" --account-name "$account" --container-name models --auth-mode login --only-show-errors "$@"
}

fetch() {
  blob download --name "$1/metrics.json" --file "$folder/$2" --output none || {
    echo "error: $1/metrics.json: cannot be fetched" >&2
    exit 2
  }
}

fetch "$candidate" candidate.json
gate=(python3 -m mlops.pipelines.gate --candidate "$folder/candidate.json")
# Only an answer that there is none counts as none: a champion that cannot be read must not be lost.
there=$(blob exists --name champion/metrics.json --query exists --output tsv) || {
  echo "error: champion: cannot be asked for" >&2
  exit 2
}
case $there in
  true)
    fetch champion champion.json
    gate+=(--champion "$folder/champion.json")
    ;;
  false) echo "notice: there is no champion yet" >&2 ;;
  *)
    echo "error: champion: cannot be asked for" >&2
    exit 2
    ;;
esac
"${gate[@]}"
