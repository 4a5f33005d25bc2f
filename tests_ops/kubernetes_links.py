"""What schemas miss between objects: who selects whom, by which port; what is scaled, scraped, allowed and secret."""

import re
from collections.abc import Iterator

import yaml
from kubernetes_objects import BASE, COMPONENT, Object, Pod, get, matches, of_kind, pods, title
from kubernetes_pods import SECRETS

from mlops.api import metrics

ADAPTED = yaml.safe_load((BASE / "prometheus-adapter-values.yaml").read_text())


def link_faults(objects: list[Object]) -> list[str]:
    """All faults between objects."""
    checks = (names, namespace, selectors, services, autoscalers, monitors, accounts, vault)
    return [fault for check in checks for fault in check(objects)]


def names(objects: list[Object]) -> Iterator[str]:
    """Names that Kubernetes takes, each once, in our namespace, with the label by which the script finds them."""
    seen = set()
    for found in objects:
        name, labels = found["metadata"]["name"], found["metadata"].get("labels", {})
        # A CronJob adds eleven characters to its Jobs' names.
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) or len(name) > (
            52 if "Cron" in found["kind"] else 63
        ):
            yield f"{title(found)}: no name that Kubernetes takes"
        if (found["kind"], name) in seen:
            yield f"{title(found)}: twice"
        seen.add((found["kind"], name))
        if found["kind"] != "Namespace" and found["metadata"].get("namespace") != "ldm3d":
            yield f"{title(found)}: not in the namespace ldm3d"
        if labels.get("app.kubernetes.io/part-of") != "ldm3d":
            yield f"{title(found)}: has no label app.kubernetes.io/part-of"


def namespace(objects: list[Object]) -> Iterator[str]:
    for mode in ("enforce", "audit", "warn"):
        labels = get(objects, "Namespace", "ldm3d")["metadata"]["labels"]
        if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted":
            yield f"Namespace ldm3d: pod-security.kubernetes.io/{mode} must be restricted"


def selectors(objects: list[Object]) -> Iterator[str]:
    """Every selector selects something, and what it is meant for."""
    for pod in pods(objects):
        selector = pod.owner["spec"].get("selector")
        if selector and not matches(selector, pod.labels):
            yield f"{pod.title}: its selector does not select its own pods"
        for spread in pod.spec.get("topologySpreadConstraints", []):
            if not matches(spread["labelSelector"], pod.labels):
                yield f"{pod.title}: its topology spread does not count its own pods"
    for budget in of_kind(objects, "PodDisruptionBudget"):
        if not _selected(budget["spec"]["selector"], objects):
            yield f"{title(budget)}: selects no pod"
        if "minAvailable" in budget["spec"]:
            yield f"{title(budget)}: minAvailable forbids to drain the node of a single replica"


def _selected(selector: Object, objects: list[Object]) -> list[Pod]:
    return [pod for pod in pods(objects) if matches(selector, pod.labels)]


def services(objects: list[Object]) -> Iterator[str]:
    """Every Service has pods, and each of its ports is one of theirs."""
    for service in of_kind(objects, "Service"):
        selected = _selected({"matchLabels": service["spec"]["selector"]}, objects)
        if not selected:
            yield f"{title(service)}: selects no pod"
        own = [pod for pod in selected if pod.owner["kind"] in ("Deployment", "CronJob")]
        for port in service["spec"]["ports"]:
            if any(port["targetPort"] not in pod.ports for pod in own):
                yield f"{title(service)}: targetPort {port['targetPort']} is no port of its pods"
            elif any(pod.ports[port["targetPort"]] != port["port"] for pod in own):
                yield f"{title(service)}: port {port['port']} is another than its pods' {port['targetPort']}"


def autoscalers(objects: list[Object]) -> Iterator[str]:
    """Targets that are there and do not say themselves how many they are; figures that somebody serves."""
    adapted = {rule["seriesQuery"].split("{")[0] for rule in ADAPTED["rules"]["external"]}
    served = {family.name for family in metrics.REGISTRY.collect()}
    for found in of_kind(objects, "HorizontalPodAutoscaler"):
        spec = found["spec"]
        target = [d for d in of_kind(objects, "Deployment") if d["metadata"]["name"] == spec["scaleTargetRef"]["name"]]
        if not target:
            yield f"{title(found)}: there is no Deployment {spec['scaleTargetRef']['name']}"
        elif "replicas" in target[0]["spec"]:
            yield f"{title(found)}: its Deployment sets replicas, which each apply would put back"
        if spec["minReplicas"] > spec["maxReplicas"]:
            yield f"{title(found)}: minReplicas above maxReplicas"
        for name in [m["external"]["metric"]["name"] for m in spec["metrics"] if m["type"] == "External"]:
            if name not in served:
                yield f"{title(found)}: nobody serves {name}"
            if name not in adapted:
                yield f"{title(found)}: prometheus-adapter-values.yaml has no rule for {name}"


def monitors(objects: list[Object]) -> Iterator[str]:
    """What Prometheus looks for is there, with the ports that it asks; all that serve figures are looked for."""
    asked = set()
    for found in of_kind(objects, "ServiceMonitor"):
        selected = [
            s
            for s in of_kind(objects, "Service")
            if matches(found["spec"]["selector"], s["metadata"].get("labels", {}))
        ]
        ports = {p["name"] for s in selected for p in s["spec"]["ports"]}
        asked |= {s["metadata"]["labels"][COMPONENT] for s in selected}
        yield from (
            f"{title(found)}: no Service has a port {e['port']}"
            for e in found["spec"]["endpoints"]
            if e["port"] not in ports
        )
    for found in of_kind(objects, "PodMonitor"):
        selected_pods = _selected(found["spec"]["selector"], objects)
        ports = {name for pod in selected_pods for name in pod.ports}
        asked |= {pod.labels[COMPONENT] for pod in selected_pods}
        for endpoint in found["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in ports:
                yield f"{title(found)}: no pod has a port {endpoint['port']}"
    if of_kind(objects, "ServiceMonitor", "PodMonitor"):
        for job in re.findall(r'\bjob="([^"]+)"', str(of_kind(objects, "PrometheusRule"))):
            if job not in _jobs(objects):
                yield f"PrometheusRule: nothing is scraped as the job {job}"
        yield from (f"Prometheus does not ask {name}" for name in {"api", "worker", "monitor"} - asked)


def _jobs(objects: list[Object]) -> set[str]:
    """What the Prometheus operator calls that which it scrapes: by the Service's name, a pod's as it is told."""
    told = [
        relabelling["replacement"]
        for found in of_kind(objects, "PodMonitor")
        for endpoint in found["spec"]["podMetricsEndpoints"]
        for relabelling in endpoint.get("relabelings", [])
        if relabelling["targetLabel"] == "job"
    ]
    selectors = [found["spec"]["selector"] for found in of_kind(objects, "ServiceMonitor")]
    named = [
        service["metadata"]["name"]
        for service in of_kind(objects, "Service")
        if any(matches(selector, service["metadata"]["labels"]) for selector in selectors)
    ]
    return {*told, *named}


def accounts(objects: list[Object]) -> Iterator[str]:
    """Accounts without a token or rights; roles that are there, only read, and read no Secrets."""
    for account in of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{title(account)}: automountServiceAccountToken must be false"
    roles = {role["metadata"]["name"]: role for role in of_kind(objects, "Role")}
    for binding in of_kind(objects, "RoleBinding"):
        if binding["roleRef"]["name"] not in roles:
            yield f"{title(binding)}: there is no Role {binding['roleRef']['name']}"
        yield from (
            f"{title(binding)}: gives rights to a ServiceAccount"
            for s in binding["subjects"]
            if s["kind"] == "ServiceAccount"
        )
    for role in roles.values():
        for rule in role["rules"]:
            if set(rule["verbs"]) - {"get", "list", "watch"}:
                yield f"{title(role)}: may do more than read: {rule['verbs']}"
            if {"secrets", "*", "pods/exec"} & {*rule["resources"], *rule["apiGroups"]}:
                yield f"{title(role)}: {rule['resources']}: too much"
    if of_kind(objects, "ClusterRole", "ClusterRoleBinding"):
        yield "rights in the whole cluster"


def vault(objects: list[Object]) -> Iterator[str]:
    """The vault's driver makes every Secret that is used, for pods that mount it and whose account it knows."""
    for found in of_kind(objects, "SecretProviderClass"):
        spec = found["spec"]
        listed = {
            yaml.safe_load(entry)["objectName"] for entry in yaml.safe_load(spec["parameters"]["objects"])["array"]
        }
        made = {(s["secretName"], d["key"]): d["objectName"] for s in spec["secretObjects"] for d in s["data"]}
        yield from (f"{title(found)}: {name} is not read from the vault" for name in set(made.values()) - listed)
        tls = {i["secretName"] for ingress in of_kind(objects, "Ingress") for i in ingress["spec"]["tls"]}
        for name, key in {*SECRETS, *((name, key) for name in tls for key in ("tls.key", "tls.crt"))} - made.keys():
            yield f"{title(found)}: does not make {key} of the Secret {name}"
        for pod in pods(objects):
            uses = any("secretKeyRef" in e.get("valueFrom", {}) for c in pod.containers for e in c.get("env", []))
            mounts = [v["csi"]["volumeAttributes"]["secretProviderClass"] for v in pod.spec["volumes"] if "csi" in v]
            if uses and mounts != [found["metadata"]["name"]]:
                yield f"{pod.title}: uses a Secret of the vault, and does not mount it"
            account = get(objects, "ServiceAccount", pod.spec["serviceAccountName"])
            identity = account["metadata"].get("annotations", {}).get("azure.workload.identity/client-id")
            stores = any(e.get("value", "").startswith("abfs://") for c in pod.containers for e in c.get("env", []))
            if (mounts or stores) and identity != spec["parameters"]["clientID"]:
                yield f"{pod.title}: its ServiceAccount has not the identity that may read the vault"
            if stores and pod.labels.get("azure.workload.identity/use") != "true":
                yield f"{pod.title}: gets no token for its storage account"
