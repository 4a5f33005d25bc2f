"""What schemas miss in one template of pods: rights, volumes, variables, commands, images, quantities."""

import ast
import itertools
import os
import re
from decimal import Decimal
from functools import cache
from unittest import mock

import programs
from kubernetes_objects import Object, Pod, of_kind, pods, value_of

import ldm3d
from ldm3d.errors import ConfigError
from mlops.api.settings import load_settings

RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
IMAGE = re.compile(r"(?P<name>[a-z0-9./_:-]*?[a-z0-9_-]+):(?P<tag>[\w][\w.-]{0,127})")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
UNITS = {"": 1, "m": Decimal("0.001")} | {
    unit + binary: (1024 if binary else 1000) ** power for power, unit in enumerate("KMGTPE", 1) for binary in ("i", "")
}
UNITS["k"] = UNITS["K"]
GPU = "nvidia.com/gpu"


def pod_faults(objects: list[Object]) -> list[str]:
    """All faults of all pods."""
    checks = (rights, volumes, variables, commands, images, resources, probes)
    return [f"{pod.title}: {fault}" for pod in pods(objects) for check in checks for fault in check(pod, objects)]


def rights(pod: Pod, objects: list[Object]) -> list[str]:
    """Pod Security `restricted`, and this house's: a user of its own, nothing written to the image, no token."""
    spec, context = pod.spec, pod.spec.get("securityContext", {})
    shared = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    faults = [f"{name} is not allowed" for name in shared]
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") != 10001:
        faults.append("must run as user 10001, not root")
    if context.get("fsGroup") != 10001:
        faults.append("fsGroup must be 10001, or the volumes cannot be written")
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        faults.append("seccompProfile must be RuntimeDefault")
    if spec.get("automountServiceAccountToken") is not False:
        faults.append("automountServiceAccountToken must be false")
    if spec.get("enableServiceLinks") is not False:
        faults.append("enableServiceLinks must be false: the service refuses variables LDM3D_API_PORT and the like")
    accounts = {account["metadata"]["name"] for account in of_kind(objects, "ServiceAccount")}
    if spec.get("serviceAccountName") not in accounts:
        faults.append(f"there is no ServiceAccount {spec.get('serviceAccountName')}")
    for volume in spec.get("volumes", []):
        faults += [f"volume of type {kind}" for kind in volume.keys() - {"name"} - RESTRICTED_VOLUMES]
    for container in pod.containers:
        own, name = container.get("securityContext", {}), container["name"]
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            faults.append(f"{name}: allowPrivilegeEscalation must be false")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            faults.append(f"{name}: capabilities must drop ALL and add none")
        if own.get("readOnlyRootFilesystem") is not True:
            faults.append(f"{name}: readOnlyRootFilesystem must be true")
        if own.keys() & {"runAsUser", "runAsNonRoot", "seccompProfile"}:
            faults.append(f"{name}: overrides the pod's securityContext")
        faults += [f"{name}: hostPort" for port in container.get("ports", []) if "hostPort" in port]
    return faults


def volumes(pod: Pod, objects: list[Object]) -> list[str]:
    """Each mount has its volume, each volume its mount and its source."""
    declared = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounts = [mount for container in pod.containers for mount in container.get("volumeMounts", [])]
    faults = [f"volume {name} is mounted nowhere" for name in declared.keys() - {mount["name"] for mount in mounts}]
    faults += [f"mounts {mount['name']}, which is no volume" for mount in mounts if mount["name"] not in declared]
    paths = [mount["mountPath"] for mount in mounts]
    faults += [f"mounts twice at {path}" for path in {path for path in paths if paths.count(path) > 1}]
    if pod.labels.get("app.kubernetes.io/component") != "redis" and "/tmp" not in paths:
        faults.append("must mount a volume at /tmp, where programs keep their caches")
    there = {(found["kind"], found["metadata"]["name"]) for found in objects}
    for name, volume in declared.items():
        for key, kind, field in (
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ("configMap", "ConfigMap", "name"),
        ):
            if key in volume and (kind, volume[key][field]) not in there:
                faults.append(f"volume {name}: there is no {kind} {volume[key][field]}")
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            faults.append(f"volume {name}: emptyDir without sizeLimit may fill the node")
    return faults


def variables(pod: Pod, objects: list[Object]) -> list[str]:
    """Variables that the program knows, with values that it takes; references backwards; Secrets that are made."""
    faults = []
    for container in pod.containers:
        values: dict[str, str] = {}
        for entry in container.get("env", []):
            name = entry["name"]
            if name in values:
                faults.append(f"variable {name} is given twice")
            value = entry.get("value", f"<{name}>")
            for reference in re.findall(r"\$\((\w+)\)", value):
                if reference not in values:
                    faults.append(f"variable {name}: $({reference}) must stand before it")
                value = value.replace(f"$({reference})", values.get(reference, ""))
            if value.startswith("abfs://") and not re.match(
                r"abfs://[\w-]+@[a-z0-9]+\.(blob|dfs)\.core\.windows\.net/", value
            ):
                faults.append(f"variable {name}: {value} names no storage account")
            secret = entry.get("valueFrom", {}).get("secretKeyRef")
            if secret and (secret["name"], secret["key"]) not in SECRETS:
                faults.append(f"variable {name}: nothing makes the key {secret['key']} of the Secret {secret['name']}")
            values[name] = value
        texts = [*container.get("command", []), *container.get("args", [])]
        for reference in {found for text in texts for found in re.findall(r"\$\((\w+)\)", text)} - values.keys():
            faults.append(f"the command names $({reference}), which is no variable")
        with mock.patch.dict(os.environ, {k: v for k, v in values.items() if k.startswith("LDM3D_")}, clear=True):
            try:
                settings = load_settings()
            except ConfigError as error:
                faults.append(str(error))
                continue
        ports = pod.ports
        if "LDM3D_WORKER_METRICS_PORT" in values and settings.worker_metrics_port != ports.get("metrics"):
            faults.append("LDM3D_WORKER_METRICS_PORT is not the container's port metrics")
        if settings.queue_url and not _is_service(settings.queue_url.rpartition("@")[2].split("/")[0], objects):
            faults.append(f"LDM3D_QUEUE_URL {settings.queue_url}: there is no such Service and port")
        if settings.trusted_hosts:
            faults.append("LDM3D_TRUSTED_HOSTS: kubelet and Prometheus ask by address, and would be refused")
        if "LDM3D_MODELS_FILE" in values and not _mounted(pod, container, str(settings.models_file), objects):
            faults.append(f"LDM3D_MODELS_FILE {settings.models_file}: no ConfigMap is mounted that has it")
    return faults


SECRETS = {("ldm3d-redis", "password")}
"""Made by setup_kubernetes.sh, or by the vault's driver (`kubernetes_links.vault`)."""


def _is_service(address: str, objects: list[Object]) -> bool:
    name, _, port = address.partition(":")
    return any(
        service["metadata"]["name"] == name and int(port) in [entry["port"] for entry in service["spec"]["ports"]]
        for service in of_kind(objects, "Service")
    )


def _mounted(pod: Pod, container: Object, path: str, objects: list[Object]) -> bool:
    """Whether a file of a ConfigMap is mounted at `path`."""
    folder, _, file = path.rpartition("/")
    for mount in container.get("volumeMounts", []):
        volume = next(v for v in pod.spec["volumes"] if v["name"] == mount["name"])
        if mount["mountPath"] == folder and "configMap" in volume:
            maps = [m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == volume["configMap"]["name"]]
            return bool(maps) and file in maps[0]["data"]
    return False


def commands(pod: Pod, objects: list[Object]) -> list[str]:
    """Modes that the entry point knows; programs and options that exist; files that are in the image or mounted."""
    faults = []
    for container in pod.containers:
        if not _is_ours(container):
            continue
        command, args = container.get("command", []), container.get("args", [])
        mode, stage = value_of(container, "MODE"), value_of(container, "STAGE")
        if command:
            if command[:3] != ["tini", "--", "python"]:
                faults.append(f"command {command}: must begin with tini -- python, so that signals reach the program")
                continue
            script = command[4].replace(".", "/") if command[3] == "-m" else command[3]
        elif mode is None:
            faults.append("neither command nor MODE")
            continue
        else:
            wanted = {"api": "mlops/docker/api_server.py", "worker": "mlops/api/worker", "infer": "inference.py"}
            script = wanted.get(mode, f"train_{stage}.py" if mode == "train" else "")
            if mode == "train" and stage is None and pod.owner["kind"] == "TrainingRuntime":  # each TrainJob says it
                script = "train_autoencoder.py"
            if mode not in MODES or not script:
                faults.append(f"MODE {mode}: entrypoint.sh does not know it")
                continue
        known = _options(script)
        if known is None:
            faults.append(f"there is no program {script}")
            continue
        given = [word.split("=")[0] for word in args if word.startswith("-")]
        faults += [f"{script} has no option {option}" for option in given if option not in known]
        for option, value in itertools.pairwise(args):
            if option == "-c" and not (programs.ROOT / value).is_file():
                faults.append(f"there is no configuration {value}")
            if option == "-e" and not _mounted(pod, container, value, objects):
                faults.append(f"-e {value}: no ConfigMap is mounted that has it")
    return faults


def _is_ours(container: Object) -> bool:
    return container["image"].rsplit(":", 1)[0].rsplit("/", 1)[-1] == "ldm3d"


@cache
def _options(script: str) -> set[str] | None:
    """Options that a program adds to its parser, in its file, its package, or in utils.py; None: there is none."""
    place = programs.ROOT / script
    files = sorted(place.glob("*.py")) if place.is_dir() else [place if place.suffix else place.with_suffix(".py")]
    if not files or not files[0].is_file():
        return None
    if place.parent == programs.ROOT:
        files.append(programs.ROOT / "utils.py")
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    words = [
        argument.value
        for call in calls
        if getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    ]
    return {word for word in words if word.startswith("-")}


def images(pod: Pod, objects: list[Object]) -> list[str]:
    """The image of this version, with CUDA where there is a GPU; never `latest`."""
    faults = []
    for container in pod.containers:
        found = IMAGE.fullmatch(container["image"])
        if not found or found["tag"] == "latest":
            faults.append(f"image {container['image']}: must have a tag, and not latest")
        elif _is_ours(container):
            variant = "cuda" if GPU in container["resources"]["limits"] else "cpu"
            if found["tag"] != f"{ldm3d.__version__}-{variant}":
                faults.append(f"image {container['image']}: must be {ldm3d.__version__}-{variant}")
    return faults


def amount(quantity: object) -> Decimal:
    """A Kubernetes quantity as a number. Raises ValueError."""
    found = QUANTITY.fullmatch(str(quantity))
    if not found:
        raise ValueError(f"{quantity!r} is no quantity")
    return Decimal(found[1]) * UNITS[found[2] or ""]


def resources(pod: Pod, objects: list[Object]) -> list[str]:
    """Requests and limits of CPU and memory, the first within the second; GPUs with the toleration for their nodes."""
    faults = []
    wants_gpu = False
    for container in pod.containers:
        wanted = container.get("resources", {})
        requests, limits = wanted.get("requests", {}), wanted.get("limits", {})
        wants_gpu |= GPU in limits
        for name in ("cpu", "memory"):
            try:
                if amount(requests[name]) > amount(limits[name]):
                    faults.append(f"requests more {name} than its limit")
            except KeyError:
                faults.append(f"{container['name']}: no request or limit of {name}")
            except ValueError as error:
                faults.append(f"{container['name']}: {name}: {error}")
    if wants_gpu != any(toleration["key"] == GPU for toleration in pod.spec.get("tolerations", [])):
        faults.append(f"{GPU}: limit and toleration go together")
    return faults


def probes(pod: Pod, objects: list[Object]) -> list[str]:
    """Probes of long-running pods ask a port that is there for a path that is served."""
    faults = []
    for container in pod.containers:
        if pod.owner["kind"] == "Deployment":
            needed = ("livenessProbe", "readinessProbe")
            faults += [f"{container['name']}: no {probe}" for probe in needed if probe not in container]
        for probe in (container.get(name) for name in ("startupProbe", "livenessProbe", "readinessProbe")):
            http = (probe or {}).get("httpGet", {})
            if http and http["port"] not in pod.ports:
                faults.append(f"a probe asks the port {http['port']}, which the container has not")
            served = OPEN_ROUTES if value_of(container, "MODE") == "api" else {"/metrics"}
            if http and http["path"] not in served:
                faults.append(f"a probe asks for {http['path']}, which is not served openly")
            for word in (probe or {}).get("exec", {}).get("command", []):
                if word.endswith(".py") and not (programs.ROOT / word).is_file():
                    faults.append(f"a probe runs {word}, which is not there")
    return faults


MODES = re.findall(r"^  (\w+)\)", (programs.ROOT / "mlops/docker/entrypoint.sh").read_text(), re.MULTILINE)
"""That the image's entry point knows."""
ROUTES = re.findall(
    r"^\| (\w+) \| `(/[^`]*)` \| (\w+) \|$", (programs.ROOT / "docs/SECURITY.md").read_text(), re.MULTILINE
)
"""Method, path and role of each route; a test of the service compares them with what it serves."""
OPEN_ROUTES = {path for _, path, role in ROUTES if role == "open"}
