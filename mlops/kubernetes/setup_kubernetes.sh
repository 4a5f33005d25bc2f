#!/usr/bin/env bash
# The service on the cluster that kubectl points to; see --help.
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
overlays=$here/../kubernetes-overlays
namespace=ldm3d
ours=app.kubernetes.io/part-of=ldm3d
deployments=(ldm3d-redis ldm3d-worker ldm3d-monitor ldm3d-api)
# What `delete` removes; the data, in PersistentVolumeClaims, is not among it.
kinds=cronjobs,jobs,deployments,horizontalpodautoscalers,poddisruptionbudgets,ingresses,services,networkpolicies
kinds+=,configmaps,secrets,rolebindings,roles,serviceaccounts
# Some clusters do not have these.
more_kinds=(servicemonitors.monitoring.coreos.com podmonitors.monitoring.coreos.com prometheusrules.monitoring.coreos.com
  secretproviderclasses.secrets-store.csi.x-k8s.io)

usage() {
  cat <<'END'
usage: setup_kubernetes.sh apply [OVERLAY]
       setup_kubernetes.sh status | health
       setup_kubernetes.sh logs [COMPONENT] [--follow]
       setup_kubernetes.sh delete [--data] [--yes]

  apply    create or update everything, and wait until it runs. OVERLAY is a folder of mlops/kubernetes-overlays
           (cpu, gpu, azure-keyvault), or the path of one of your own; cpu by default
  status   what there is; exit status 1 if there is nothing
  health   whether all that is to run runs, and the service can work; exit status 1 if not
  logs     last lines of all pods, or of one component: api, worker, redis, monitor, train, batch, data, drift, backup
  delete   remove everything but the data; with --data that too, and the namespace. Asks first, unless --yes

In the cluster that `kubectl config current-context` names, in the namespace ldm3d.
END
}

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

mistake() {
  fail "$1 (see setup_kubernetes.sh --help)" 2
}

kube() {
  kubectl --namespace "$namespace" "$@"
}

# A step by its name; the first one that fails is named, and ends it all.
step() {
  local name=$1
  shift
  echo "== $name" >&2
  "$@" || fail "$name: failed; nothing after it was done"
}

cluster_answers() {
  kubectl version >/dev/null
}

# Who may deploy into the namespace need not have the right to make or change one.
namespace_is_there() {
  local found
  found=$(kubectl get namespace "$namespace" --ignore-not-found --output name) || return 1
  [[ -n $found ]] || kubectl apply --filename "$here/namespace.yaml"
}

redis_password() {
  local found
  found=$(kube get secret ldm3d-redis --ignore-not-found --output name) || return 1
  if [[ -z $found ]]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' |
      kube create secret generic ldm3d-redis --from-file=password=/dev/stdin || return 1
  fi
  kube label --overwrite secret ldm3d-redis "$ours"
}

runs() {
  kube rollout status "deployment/$1" --timeout="$2"
}

has_keys() {
  local keys
  keys=$(kube exec deployment/ldm3d-worker -- python -m mlops.api.keys list) || return 2
  [[ -n $keys ]]
}

asks_a_provider() {
  local variables
  variables=$(kube set env deployment/ldm3d-api --list) || return 2
  [[ $variables == *LDM3D_OIDC_ISSUER=* ]]
}

apply() {
  local overlay=${1:-cpu} name found=0 rendered
  [[ -d $overlay ]] || overlay=$overlays/$overlay
  [[ -f $overlay/kustomization.yaml ]] || mistake "${1:-cpu}: no overlay, and no folder with a kustomization.yaml"
  rendered=$(kubectl kustomize "$overlay") || fail "$overlay: kustomize cannot build it; nothing was done"
  step "the cluster answers" cluster_answers
  step "namespace $namespace" namespace_is_there
  # Where a vault has it, the driver makes the Secret.
  if [[ $rendered != *"kind: SecretProviderClass"* ]]; then
    step "a password for Redis, if there is none" redis_password
  fi
  step "everything of $overlay" kubectl apply --filename - <<<"$rendered"
  for name in ldm3d-redis ldm3d-worker ldm3d-monitor; do
    step "$name runs" runs "$name" 15m
  done
  has_keys || found=$?
  if ((found == 1)); then
    found=0
    asks_a_provider || found=$?
  fi
  ((found != 2)) || fail "keys: cannot be asked for; nothing after it was done"
  if ((found == 1)); then
    echo "There is no key yet, and ldm3d-api starts when there is one. Make the first, and keep what it prints:" >&2
    echo "  kubectl -n $namespace exec deployment/ldm3d-worker -- \\" >&2
    echo "    python -m mlops.api.keys create --name admin --role admin" >&2
    echo "  kubectl -n $namespace rollout restart deployment/ldm3d-api" >&2
    return
  fi
  step "ldm3d-api runs" runs ldm3d-api 15m
}

status() {
  local found
  found=$(kube get deployments --selector "$ours" --output name) || fail "the cluster does not say what there is"
  [[ -n $found ]] || fail "nothing of the service is in namespace $namespace; see setup_kubernetes.sh apply"
  kube get deployments,pods,horizontalpodautoscalers,services,ingresses,cronjobs,jobs,persistentvolumeclaims \
    --selector "$ours"
}

health() {
  local name sick=0
  for name in "${deployments[@]}"; do
    runs "$name" 5s || sick=1
  done
  if kube exec deployment/ldm3d-api -- python mlops/docker/health_check.py --ready; then
    echo "the service can work"
  else
    sick=1
  fi
  ((sick == 0)) || fail "the service is not healthy"
}

logs() {
  local selector=$ours found follow=()
  while (($#)); do
    case $1 in
      -f | --follow) follow=(--follow --max-log-requests=50) ;;
      -*) mistake "unknown option: $1" ;;
      *) selector=$ours,app.kubernetes.io/component=$1 ;;
    esac
    shift
  done
  found=$(kube get pods --selector "$selector" --output name) || fail "the cluster does not say which pods there are"
  [[ -n $found ]] || fail "there is no pod with $selector"
  kube logs --selector "$selector" --all-containers --prefix --tail=100 "${follow[@]}"
}

confirm() {
  local answer=''
  echo "$1 In the cluster $(kubectl config current-context). Type $namespace to go on:" >&2
  read -r answer || true
  [[ $answer == "$namespace" ]] || fail "not confirmed; nothing was deleted"
}

delete() {
  local data='' yes='' kind installed
  while (($#)); do
    case $1 in
      --data) data=1 ;;
      --yes) yes=1 ;;
      *) mistake "unknown argument: $1" ;;
    esac
    shift
  done
  if [[ $data ]]; then
    [[ $yes ]] || confirm "Deletes the service with all its data: models, data sets, volumes, keys, audit log."
    step "namespace $namespace with everything in it" kubectl delete namespace "$namespace" --ignore-not-found
    return
  fi
  [[ $yes ]] || confirm "Deletes the service; the data stays."
  # It also fails where one of many APIs is down, and has then listed the others.
  installed=$(kubectl api-resources --output name) || [[ -n $installed ]] || fail "the cluster does not answer"
  for kind in "${more_kinds[@]}"; do
    [[ $'\n'$installed$'\n' != *$'\n'$kind$'\n'* ]] || kinds+=,$kind
  done
  step "everything but the data" kube delete "$kinds" --selector "$ours"
  echo "kept: the namespace and its PersistentVolumeClaims" >&2
}

command=${1:-}
(($# == 0)) || shift
case $command in
  apply)
    (($# <= 1)) || mistake "unknown argument: $2"
    apply "$@"
    ;;
  status | health)
    (($# == 0)) || mistake "unknown argument: $1"
    "$command"
    ;;
  logs | delete) "$command" "$@" ;;
  -h | --help) usage ;;
  '') mistake "say what to do" ;;
  *) mistake "unknown command: $command" ;;
esac
