"""What schemas miss in Jobs and trainings: that they are counted right, find each other, go on after an eviction."""

import re
from collections.abc import Iterator

from kubernetes_objects import COMPONENT, Object, Pod, get, job_spec, of_kind, pods, title, value_of
from kubernetes_pods import GPU

NEVER = "0 0 31 2 *"
STARTED_BY_HAND = {"train", "batch", "data"}


def job_faults(objects: list[Object]) -> list[str]:
    """All faults of all Jobs and trainings."""
    faults = [f"{title(job)}: {fault}" for job in of_kind(objects, "CronJob") for fault in _job(job, objects)]
    for pod in pods(objects):
        if pod.labels.get(COMPONENT) == "train":
            faults += [f"{pod.title}: {fault}" for fault in _training(pod, objects)]
    return [*faults, *_same_but_for_the_stage(objects)]


def _job(job: Object, objects: list[Object]) -> Iterator[str]:
    spec, [pod] = job_spec(job), [*pods([job])]
    assert spec
    component = pod.labels.get(COMPONENT)
    if (job["spec"]["schedule"] == NEVER) != (component in STARTED_BY_HAND):
        yield f"schedule {job['spec']['schedule']}"
    if component in STARTED_BY_HAND and job["spec"].get("suspend") is not True:
        yield "is started by hand, and must be suspended"
    if not _is_schedule(job["spec"]["schedule"]):
        yield f"schedule {job['spec']['schedule']}: not five fields in their ranges"
    if component not in STARTED_BY_HAND and job["spec"].get("concurrencyPolicy") != "Forbid":
        yield "a second run may begin beside the first: concurrencyPolicy must be Forbid"
    policy = spec.get("podFailurePolicy", {}).get("rules", [])
    restart = pod.spec.get("restartPolicy")
    if restart != "Never":
        yield f"restartPolicy {restart}: must be Never"
    ignored = [rule for rule in policy if rule["action"] == "Ignore"]
    if {"type": "DisruptionTarget", "status": "True"} not in [
        condition for rule in ignored for condition in rule["onPodConditions"]
    ]:
        yield "podFailurePolicy must not count evictions (Ignore DisruptionTarget)"
    containers = {container["name"] for container in pod.containers}
    for rule in policy:
        named = rule.get("onExitCodes", {}).get("containerName")
        if named and named not in containers:
            yield f"podFailurePolicy: there is no container {named}"
    if component in ("train", "batch"):
        yield from _shares(spec, pod)


def _shares(spec: Object, pod: Pod) -> Iterator[str]:
    """As many pods as the command counts with."""
    if spec.get("completionMode") != "Indexed":
        yield "completionMode must be Indexed"
    [container] = pod.containers
    words = " ".join([*container.get("args", []), value_of(container, "TORCHRUN_ARGS") or ""])
    found = re.search(r"--(nnodes|shards)=(\d+)", words)
    if not found or int(found[2]) != spec["completions"]:
        yield f"completions {spec['completions']}, but {found[0] if found else 'no number of shares'}"
    if found and found[1] == "nnodes" and spec["parallelism"] != spec["completions"]:
        yield "all pods of a training must run at once: parallelism must be completions"


def _training(pod: Pod, objects: list[Object]) -> Iterator[str]:
    """It goes on where it was; its processes have the GPUs that they need, and find each other."""
    [container] = pod.containers
    args, launch = " ".join(container["args"]), value_of(container, "TORCHRUN_ARGS") or ""
    if "--resume auto" not in args:
        yield "must have --resume auto, to start and to go on with the same command"
    if not launch:
        yield "TORCHRUN_ARGS must not be empty, or entrypoint.sh does without torchrun"
    if not any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"]):
        yield "needs a volume at /dev/shm"
    if pod.owner["kind"] != "TrainingRuntime" and value_of(container, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        yield "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or hangs when a pod was replaced"
    if pod.owner["kind"] != "CronJob":  # the operator says the rest
        return
    if int(dict(re.findall(r"--([\w-]+)=(\d+)", launch)).get("max-restarts", 0)) < 1:
        yield "TORCHRUN_ARGS must allow restarts: all processes start again when a pod was replaced"
    options = dict(re.findall(r"--([\w-]+)=(\S+)", launch))
    gpus = container["resources"]["limits"].get(GPU, 1)
    if options.get("nproc-per-node") != str(gpus):
        yield f"--nproc-per-node={options.get('nproc-per-node')}, but {gpus} GPU"
    endpoint = re.fullmatch(r"\$\(JOB_NAME\)-0\.([\w-]+):(\d+)", options.get("rdzv-endpoint", ""))
    if not endpoint:
        yield f"--rdzv-endpoint={options.get('rdzv-endpoint')}: must be the Job's pod 0 at its Service"
        return
    if endpoint[1] != pod.spec.get("subdomain"):
        yield f"--rdzv-endpoint names {endpoint[1]}, but the pods' subdomain is {pod.spec.get('subdomain')}"
    headless = [s for s in of_kind(objects, "Service") if s["metadata"]["name"] == endpoint[1]]
    spec = headless[0]["spec"] if headless else {}
    if spec.get("clusterIP") != "None" or spec.get("publishNotReadyAddresses") is not True:
        yield f"there is no headless Service {endpoint[1]} that names pods before they are ready"
    if int(endpoint[2]) not in pod.ports.values():
        yield f"--rdzv-endpoint has the port {endpoint[2]}, which the container does not name"


def _same_but_for_the_stage(objects: list[Object]) -> Iterator[str]:
    """Two Jobs are written out, and must not drift apart."""
    first = str(get(objects, "CronJob", "ldm3d-train-autoencoder")["spec"])
    second = str(get(objects, "CronJob", "ldm3d-train-diffusion")["spec"])
    if first.replace("'STAGE', 'value': 'autoencoder'", "'STAGE', 'value': 'diffusion'") != second:
        yield "CronJob ldm3d-train-diffusion: differs from ldm3d-train-autoencoder in more than STAGE"


def _is_schedule(text: str) -> bool:
    ranges = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    fields = text.split()
    return len(fields) == 5 and all(
        field == "*" or (field.isdecimal() and low <= int(field) <= high)
        for field, (low, high) in zip(fields, ranges, strict=True)
    )
