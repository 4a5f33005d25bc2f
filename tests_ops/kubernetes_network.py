"""What schemas miss of the network: what the world reaches, and who may talk to whom inside."""

import re
from collections.abc import Iterator

import programs
from kubernetes_objects import COMPONENT, Object, Pod, matches, of_kind, pods, title
from kubernetes_pods import ROUTES

from mlops.api.settings import Settings

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
    ("backup", "monitoring", 9091),
}
"""From, to, port: exactly these connections must be possible."""

TO_THE_WORLD = {"data", "backup"}
"""Who may ask public addresses, by https."""


def network_faults(objects: list[Object]) -> list[str]:
    """All faults of Ingresses and NetworkPolicies."""
    return [*ingress(objects), *flows(objects)]


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
        if _reaches_the_world(policies, pod) != (name in TO_THE_WORLD):
            yield f"NetworkPolicy: {name} {'cannot' if name in TO_THE_WORLD else 'can'} reach the world"


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


def _reaches_the_world(policies: list[Object], pod: Pod) -> bool:
    return any(
        "ipBlock" in peer
        for policy in policies
        if _applies(policy, pod)
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
    )


def _asks_dns(policies: list[Object], pod: Pod) -> bool:
    return any(
        {"protocol": "UDP", "port": 53} in rule.get("ports", [])
        for policy in policies
        if _applies(policy, pod)
        for rule in policy["spec"].get("egress", [])
    )
