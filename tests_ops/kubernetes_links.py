"""What schemas miss between objects: who selects whom, by which port, and who may talk to whom."""

import re
from collections.abc import Iterator

import programs
import yaml
from kubernetes_objects import BASE, COMPONENT, Object, Pod, get, matches, of_kind, pods, title
from kubernetes_pods import ROUTES, SECRETS

from mlops.api import metrics
from mlops.api.settings import Settings

ADAPTED = yaml.safe_load((BASE / "prometheus-adapter-values.yaml").read_text())
NOT_FOR_THE_WORLD = {"/metrics", "/ready"}
OUTSIDE = {"nginx-ingress", "monitoring"}
"""Namespaces of others: the ingress controller's, Prometheus'."""
ANY = 0
FLOWS = {
    ("nginx-ingress", "api", 8000),
    ("monitoring", "api", 8000),
    ("monitoring", "worker", 9101),
    ("monitoring", "monitor", 9108),
    ("api", "redis", 6379),
    ("worker", "redis", 6379),
    ("train", "train", ANY),
    ("drift", "monitoring", 9091),
}
"""From, to, port: exactly these connections must be possible."""


def link_faults(objects: list[Object]) -> list[str]:
    """All faults between objects."""
    checks = (names, namespace, selectors, services, ingress, flows, autoscalers, monitors, accounts, vault)
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


def ingress(objects: list[Object]) -> Iterator[str]:
    """TLS for its host; all routes that are for the world, and no other; nginx.conf's limits."""
    for found in of_kind(objects, "Ingress"):
        spec, me = found["spec"], title(found)
        hosts = [rule["host"] for rule in spec["rules"]]
        secured = [host for entry in spec["tls"] for host in entry["hosts"]]
        if hosts != secured:
            yield f"{me}: host {hosts} but TLS for {secured}"
        paths = [path for rule in spec["rules"] for path in rule["http"]["paths"]]
        for path in paths:
            backend = path["backend"]["service"]
            wanted = [s for s in of_kind(objects, "Service") if s["metadata"]["name"] == backend["name"]]
            if not wanted or backend["port"]["name"] not in [p["name"] for p in wanted[0]["spec"]["ports"]]:
                yield f"{me}: there is no Service {backend['name']} with a port {backend['port']['name']}"
        for _, route, _ in ROUTES:
            if _handed_on(route, paths) == (route in NOT_FOR_THE_WORLD):
                yield f"{me}: {route} is {'' if route in NOT_FOR_THE_WORLD else 'not '}handed on"
        yield from _limits(found)


def _handed_on(route: str, paths: list[Object]) -> bool:
    return any(
        route == p["path"] or (p["pathType"] == "Prefix" and f"{route}/".startswith(p["path"].rstrip("/") + "/"))
        for p in paths
    )


def _limits(found: Object) -> Iterator[str]:
    """The same as those of the configuration for nginx alone, which a test runs."""
    conf = (programs.ROOT / "mlops/docker/nginx.conf").read_text()
    given = found["metadata"]["annotations"]
    for annotation, pattern in {
        "client-max-body-size": r"client_max_body_size (\S+);",
        "limit-req-rate": r"zone=requests:\S+ rate=(\S+);",
        "limit-req-zone-size": r"zone=requests:(\S+) rate",
        "limit-req-burst": r"burst=(\d+)",
        "limit-req-reject-code": r"limit_req_status (\d+);",
        "proxy-connect-timeout": r"proxy_connect_timeout (\S+);",
        "proxy-read-timeout": r"proxy_read_timeout (\d+s);",
        "proxy-max-temp-file-size": r"proxy_max_temp_file_size (\S+);",
        "hsts-max-age": r"max-age=(\d+)",
    }.items():
        wanted = re.search(pattern, conf)
        assert wanted, f"nginx.conf has no {pattern}"
        if given.get(f"nginx.org/{annotation}") != wanted[1]:
            yield f"{title(found)}: {annotation} {given.get(f'nginx.org/{annotation}')}: nginx.conf has {wanted[1]}"
    if int(given["nginx.org/proxy-read-timeout"].rstrip("s")) <= Settings.model_fields["max_wait_seconds"].default:
        yield f"{title(found)}: proxy-read-timeout must be longer than LDM3D_MAX_WAIT_SECONDS"


def flows(objects: list[Object]) -> Iterator[str]:
    """Between all of ours and those outside, the connections that FLOWS names are possible, and no other."""
    ours = {pod.labels[COMPONENT]: pod for pod in pods(objects)}
    policies = of_kind(objects, "NetworkPolicy")
    for name, pod in ours.items():
        for direction in ("Ingress", "Egress"):
            if not any(direction in p["spec"]["policyTypes"] for p in policies if _applies(p, pod)):
                yield f"NetworkPolicy: {direction} of {name} is not restricted"
    everybody = {name: pod.labels for name, pod in ours.items()}
    ports = {port for *_, port in FLOWS}
    for source in [*ours, *sorted(OUTSIDE)]:
        for target in [*ours, *sorted(OUTSIDE)]:
            if source in OUTSIDE and target in OUTSIDE:
                continue
            for port in ports:
                out = source in OUTSIDE or _allows(
                    policies, ours[source], "Egress", "to", target, everybody, ours, port
                )
                into = target in OUTSIDE or _allows(
                    policies, ours[target], "Ingress", "from", source, everybody, ours, port
                )
                if (out and into) != bool({(source, target, port), (source, target, ANY)} & FLOWS):
                    yield f"NetworkPolicy: {source} {'can' if out and into else 'cannot'} reach {target} at port {port}"
    for name, pod in ours.items():
        if not _asks_dns(policies, pod):
            yield f"NetworkPolicy: {name} cannot ask DNS"


def _applies(policy: Object, pod: Pod) -> bool:
    return matches(policy["spec"]["podSelector"], pod.labels)


def _allows(
    policies: list[Object],
    pod: Pod,
    direction: str,
    key: str,
    other: str,
    everybody: dict[str, dict[str, str]],
    ours: dict[str, Pod],
    port: int,
) -> bool:
    """Whether a policy lets `pod` talk to, or hear from, `other` at a port of whoever is talked to."""
    listener = pod if direction == "Ingress" else ours.get(other)
    named = listener.ports if listener else {}
    for policy in policies:
        if not _applies(policy, pod) or direction not in policy["spec"]["policyTypes"]:
            continue
        for rule in policy["spec"].get(direction.lower(), []):
            at = [named.get(entry["port"], entry["port"]) for entry in rule.get("ports", [])]
            if (not at or port in at) and any(_is_peer(peer, other, everybody) for peer in rule.get(key, [{}])):
                return True
    return False


def _is_peer(peer: Object, other: str, everybody: dict[str, dict[str, str]]) -> bool:
    if "ipBlock" in peer:
        return False  # the world without the cluster
    if "namespaceSelector" in peer:
        return peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": other}}
    return other in everybody and matches(peer.get("podSelector", {}), everybody[other])


def _asks_dns(policies: list[Object], pod: Pod) -> bool:
    return any(
        {"protocol": "UDP", "port": 53} in rule.get("ports", [])
        for policy in policies
        if _applies(policy, pod)
        for rule in policy["spec"].get("egress", [])
    )


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
            if mounts and identity != spec["parameters"]["clientID"]:
                yield f"{pod.title}: its ServiceAccount has not the identity that may read the vault"
