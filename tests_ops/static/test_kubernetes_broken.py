"""Each judgement of the manifests is seen to find what is broken, and to name it."""

import shutil
from collections.abc import Callable

import kubernetes_links
import kubernetes_models
import pytest
from kubernetes_faults import faults
from kubernetes_jobs import job_spec
from kubernetes_objects import Object, get, of_kind, render

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="not installed: Debian's kubernetes-client")


def container(objects: list[Object], name: str) -> Object:
    """The container of ours in the pods of a Deployment or CronJob."""
    found = next(o for o in of_kind(objects, "Deployment", "CronJob") if o["metadata"]["name"] == f"ldm3d-{name}")
    spec = job_spec(found) or found["spec"]
    return spec["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


def pod_spec(objects: list[Object], name: str) -> Object:
    found = next(o for o in of_kind(objects, "Deployment", "CronJob") if o["metadata"]["name"] == f"ldm3d-{name}")
    return (job_spec(found) or found["spec"])["template"]["spec"]  # type: ignore[no-any-return]


def set_env(objects: list[Object], name: str, variable: str, value: str) -> None:
    env = container(objects, name)["env"]
    env[:] = [e for e in env if e["name"] != variable] + [{"name": variable, "value": value}]


def training(objects: list[Object]) -> Object:
    return job_spec(get(objects, "CronJob", "ldm3d-train-diffusion"))  # type: ignore[return-value]


def set_launch(objects: list[Object], old: str, new: str) -> None:
    for entry in container(objects, "train-diffusion")["env"]:
        if entry["name"] == "TORCHRUN_ARGS":
            assert old in entry["value"]
            entry["value"] = entry["value"].replace(old, new)


def policy(objects: list[Object], name: str) -> Object:
    return get(objects, "NetworkPolicy", name)["spec"]  # type: ignore[no-any-return]


def scaler(objects: list[Object], name: str = "ldm3d-worker") -> Object:
    return get(objects, "HorizontalPodAutoscaler", name)["spec"]  # type: ignore[no-any-return]


Break = Callable[[list[Object]], object]
BROKEN: dict[str, tuple[Break, str]] = {
    # schemas
    "a field that is misspelt": (lambda o: container(o, "api").update(imagePullPolice="Always"), "imagePullPolice"),
    "an API that is no more": (
        lambda o: scaler(o) and get(o, "HorizontalPodAutoscaler", "ldm3d-api").update(apiVersion="autoscaling/v2beta2"),
        "autoscaling/v2beta2",
    ),
    "a field that an old version needs": (
        lambda o: training(o)["podFailurePolicy"]["rules"][0]["onPodConditions"][0].pop("status"),
        "Kubernetes 1.31",
    ),
    "a monitor's unknown field": (
        lambda o: get(o, "ServiceMonitor", "ldm3d")["spec"]["endpoints"][0].update(intervall="15s"),
        "spec.endpoints.0.intervall: unknown field",
    ),
    # rights
    "root": (lambda o: pod_spec(o, "api")["securityContext"].update(runAsNonRoot=False), "not root"),
    "the host's network": (lambda o: pod_spec(o, "worker").update(hostNetwork=True), "hostNetwork"),
    "no seccomp": (lambda o: pod_spec(o, "redis")["securityContext"].pop("seccompProfile"), "seccompProfile"),
    "a capability": (
        lambda o: container(o, "api")["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "capabilities",
    ),
    "more privileges": (
        lambda o: container(o, "batch")["securityContext"].pop("allowPrivilegeEscalation"),
        "allowPrivilege",
    ),
    "a root file system that is written to": (
        lambda o: container(o, "worker")["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem",
    ),
    "a folder of the node": (
        lambda o: pod_spec(o, "worker")["volumes"].append({"name": "tmp2", "hostPath": {"path": "/"}}),
        "hostPath",
    ),
    "a token": (lambda o: pod_spec(o, "api").pop("automountServiceAccountToken"), "automountServiceAccountToken"),
    "service links": (lambda o: pod_spec(o, "api").pop("enableServiceLinks"), "enableServiceLinks"),
    "an account that is not there": (
        lambda o: pod_spec(o, "api").update(serviceAccountName="api"),
        "no ServiceAccount api",
    ),
    "a role that writes": (
        lambda o: get(o, "Role", "ldm3d-viewer")["rules"][0]["verbs"].append("delete"),
        "more than read",
    ),
    "a role that reads secrets": (
        lambda o: get(o, "Role", "ldm3d-viewer")["rules"][0]["resources"].append("secrets"),
        "too much",
    ),
    "a namespace that allows more": (
        lambda o: get(o, "Namespace", "ldm3d")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
        "pod-security.kubernetes.io/enforce",
    ),
    # volumes
    "a claim that is not there": (
        lambda o: pod_spec(o, "api")["volumes"][0]["persistentVolumeClaim"].update(claimName="data"),
        "no PersistentVolumeClaim data",
    ),
    "a ConfigMap that is not there": (
        lambda o: o.remove(get(o, "ConfigMap", "ldm3d-training")),
        "no ConfigMap ldm3d-training",
    ),
    "a mount without a volume": (lambda o: pod_spec(o, "monitor")["volumes"].pop(), "mounts tmp, which is no volume"),
    "a volume without a mount": (lambda o: container(o, "worker")["volumeMounts"].pop(), "is mounted nowhere"),
    "no /tmp": (lambda o: container(o, "batch")["volumeMounts"][-1].update(mountPath="/temp"), "at /tmp"),
    # variables, commands, images
    "a variable that is misspelt": (lambda o: set_env(o, "api", "LDM3D_WORKER", "0"), "LDM3D_WORKER: no such setting"),
    "a value that cannot be": (lambda o: set_env(o, "worker", "LDM3D_MAX_BATCH", "many"), "LDM3D_MAX_BATCH"),
    "a storage that names no account": (
        lambda o: set_env(o, "backup", "BACKUP_URL", "abfs://backups/ldm3d"),
        "names no storage account",
    ),
    "a variable before its reference": (
        lambda o: container(o, "api")["env"].sort(key=lambda e: e["name"]),
        "$(POD_NAME) must stand before it",
    ),
    "a Secret that nobody makes": (
        lambda o: container(o, "worker")["env"][-2]["valueFrom"]["secretKeyRef"].update(key="pass"),
        "nothing makes the key pass",
    ),
    "a queue elsewhere": (
        lambda o: set_env(o, "worker", "LDM3D_QUEUE_URL", "redis://redis:6379/0"),
        "no such Service and port",
    ),
    "names that probes do not use": (
        lambda o: set_env(o, "api", "LDM3D_TRUSTED_HOSTS", "a.org"),
        "LDM3D_TRUSTED_HOSTS",
    ),
    "models that are not mounted": (
        lambda o: set_env(o, "worker", "LDM3D_MODELS_FILE", "/etc/models.yaml"),
        "LDM3D_MODELS_FILE",
    ),
    "another port for figures": (lambda o: set_env(o, "worker", "LDM3D_WORKER_METRICS_PORT", "9102"), "port metrics"),
    "a mode that is not there": (lambda o: set_env(o, "api", "MODE", "serve"), "MODE serve"),
    "a stage that is not there": (
        lambda o: set_env(o, "train-autoencoder", "STAGE", "unet"),
        "no program train_unet.py",
    ),
    "a program that is not there": (
        lambda o: container(o, "batch").update(command=["tini", "--", "python", "-m", "mlops.batches"]),
        "no program mlops/batches",
    ),
    "a program without tini": (lambda o: container(o, "batch").update(command=["python", "-m", "mlops.batch"]), "tini"),
    "an option that is not there": (lambda o: container(o, "batch")["args"].append("--speed=9"), "no option --speed"),
    "a script's option that is not there": (
        lambda o: container(o, "train-diffusion")["args"].append("--restart"),
        "no option --restart",
    ),
    "a configuration that is not there": (
        lambda o: container(o, "train-diffusion")["args"].__setitem__(1, "config/big.json"),
        "no configuration config/big.json",
    ),
    "an environment file that is not mounted": (
        lambda o: container(o, "data")["args"].__setitem__(1, "/etc/environment.json"),
        "-e /etc/environment.json",
    ),
    "latest": (lambda o: container(o, "redis").update(image="redis:latest"), "not latest"),
    "no tag": (lambda o: container(o, "redis").update(image="redis"), "must have a tag"),
    "another version": (lambda o: container(o, "api").update(image="r.org/ldm3d:0.0.9-cpu"), "must be 0.1.0-cpu"),
    "a GPU with the image for CPUs": (
        lambda o: container(o, "worker").update(image="ldm3d:0.1.0-cpu"),
        "must be 0.1.0-cuda",
    ),
    # quantities
    "a quantity that is none": (
        lambda o: container(o, "api")["resources"]["limits"].update(memory="512MB"),
        "no quantity",
    ),
    "more than the limit": (
        lambda o: container(o, "api")["resources"]["requests"].update(memory="1Gi"),
        "than its limit",
    ),
    "no limit": (lambda o: container(o, "api")["resources"]["limits"].pop("memory"), "no request or limit of memory"),
    "GPU nodes without the toleration": (lambda o: pod_spec(o, "worker").pop("tolerations"), "go together"),
    # probes and ports
    "a probe of another path": (
        lambda o: container(o, "api")["livenessProbe"]["httpGet"].update(path="/healthz"),
        "/healthz, which is not served",
    ),
    "a probe of another port": (
        lambda o: container(o, "worker")["livenessProbe"]["httpGet"].update(port="http"),
        "port http, which the container has not",
    ),
    "no probe": (lambda o: container(o, "redis").pop("readinessProbe"), "no readinessProbe"),
    "a Service's port that no pod has": (
        lambda o: get(o, "Service", "ldm3d-api")["spec"]["ports"][0].update(targetPort="web"),
        "targetPort web",
    ),
    "a Service without pods": (
        lambda o: get(o, "Service", "ldm3d-redis")["spec"].update(selector={"app": "redis"}),
        "Service ldm3d-redis: selects no pod",
    ),
    "a Deployment that selects others": (
        lambda o: get(o, "Deployment", "ldm3d-api")["spec"]["selector"].update(matchLabels={"app": "api"}),
        "does not select its own pods",
    ),
    "a budget for nobody": (
        lambda o: get(o, "PodDisruptionBudget", "ldm3d-api")["spec"].update(selector={"matchLabels": {"app": "api"}}),
        "PodDisruptionBudget ldm3d-api: selects no pod",
    ),
    # from outside
    "TLS for another host": (
        lambda o: get(o, "Ingress", "ldm3d")["spec"]["tls"][0].update(hosts=["example.org"]),
        "TLS for ['example.org']",
    ),
    "figures for the world": (
        lambda o: get(o, "Ingress", "ldm3d")["spec"]["rules"][0]["http"]["paths"][2].update(pathType="Prefix"),
        "/metrics is handed on",
    ),
    "a route that is forgotten": (
        lambda o: get(o, "Ingress", "ldm3d")["spec"]["rules"][0]["http"]["paths"].pop(1),
        "/static is not handed on",
    ),
    "an Ingress to nowhere": (
        lambda o: get(o, "Ingress", "ldm3d")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"].update(
            name="api"
        ),
        "no Service api",
    ),
    "larger bodies than nginx.conf": (
        lambda o: get(o, "Ingress", "ldm3d")["metadata"]["annotations"].update(
            {"nginx.org/client-max-body-size": "1m"}
        ),
        "client-max-body-size 1m",
    ),
    "no first policy": (lambda o: o.remove(get(o, "NetworkPolicy", "deny-all")), "is not restricted"),
    "a queue that nobody reaches": (
        lambda o: policy(o, "to-redis")["ingress"][0]["from"][0].update(podSelector={"matchLabels": {"app": "api"}}),
        "api cannot reach redis at port 6379",
    ),
    "a queue for everybody": (
        lambda o: (
            policy(o, "to-redis")["ingress"][0].pop("from"),
            policy(o, "queue-users-to-redis").update(podSelector={}),
        ),
        "monitor can reach redis",
    ),
    "an API that reaches the world": (
        lambda o: get(o, "Deployment", "ldm3d-api")["spec"]["template"]["metadata"]["labels"].update(
            {"ldm3d/to-https": "yes"}
        ),
        "api can reach the world",
    ),
    "a backup that reaches no bucket": (
        lambda o: o.remove(get(o, "NetworkPolicy", "labelled-to-https")),
        "backup cannot reach the world",
    ),
    "no DNS": (lambda o: o.remove(get(o, "NetworkPolicy", "all-to-dns")), "cannot ask DNS"),
    # autoscaling, figures
    "a scaler without a target": (lambda o: scaler(o)["scaleTargetRef"].update(name="worker"), "no Deployment worker"),
    "a Deployment that scales itself": (
        lambda o: get(o, "Deployment", "ldm3d-worker")["spec"].update(replicas=1),
        "sets replicas",
    ),
    "a figure that nobody serves": (
        lambda o: scaler(o)["metrics"][0]["external"]["metric"].update(name="ldm3d_queue_length"),
        "nobody serves ldm3d_queue_length",
    ),
    "a figure without a rule": (
        lambda o: scaler(o)["metrics"][0]["external"]["metric"].update(name="ldm3d_results_bytes"),
        "no rule for ldm3d_results_bytes",
    ),
    "a monitor of another port": (
        lambda o: get(o, "PodMonitor", "ldm3d-worker")["spec"]["podMetricsEndpoints"][0].update(port="http"),
        "no pod has a port http",
    ),
    "a monitor of nothing": (lambda o: o.remove(get(o, "PodMonitor", "ldm3d-worker")), "does not ask worker"),
    "a job that no alert knows": (
        lambda o: get(o, "PodMonitor", "ldm3d-worker")["spec"]["podMetricsEndpoints"][0].pop("relabelings"),
        "nothing is scraped as the job ldm3d-worker",
    ),
    # jobs
    "a Job that never ends": (
        lambda o: training(o)["template"]["spec"].update(restartPolicy="Always"),
        "must be Never",
    ),
    "evictions that count": (lambda o: training(o).pop("podFailurePolicy"), "must not count evictions"),
    "a policy of another container": (
        lambda o: training(o)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="main"),
        "no container main",
    ),
    "pods without a number": (lambda o: training(o).update(completionMode="NonIndexed"), "must be Indexed"),
    "more pods than processes": (lambda o: training(o).update(completions=4, parallelism=4), "but nnodes=2"[4:]),
    "pods one after the other": (lambda o: training(o).update(parallelism=1), "parallelism must be completions"),
    "fewer shards than pods": (
        lambda o: container(o, "batch")["args"].__setitem__(2, "--shards=2"),
        "completions 4, but --shards=2",
    ),
    "a training that starts anew": (
        lambda o: container(o, "train-diffusion").update(args=container(o, "train-diffusion")["args"][:-2]),
        "must have --resume auto",
    ),
    "a meeting place without a name": (
        lambda o: set_launch(o, "-0.ldm3d-train:", "-0.train:"),
        "no headless Service train",
    ),
    "a meeting place of another port": (lambda o: set_launch(o, ":29500", ":29400"), "port 29400"),
    "more processes than GPUs": (lambda o: set_launch(o, "node=1", "node=8"), "--nproc-per-node=8, but 1 GPU"),
    "a training that gives up with a pod": (lambda o: set_launch(o, "restarts=3", "restarts=0"), "must allow restarts"),
    "a training that hangs when a pod was replaced": (
        lambda o: set_env(o, "train-diffusion", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0"),
        "or hangs when a pod was replaced",
    ),
    "pods that cannot be found in time": (
        lambda o: get(o, "Service", "ldm3d-train")["spec"].pop("publishNotReadyAddresses"),
        "before they are ready",
    ),
    "stages that drift apart": (lambda o: training(o).update(backoffLimit=1), "differs from ldm3d-train-autoencoder"),
    "a training that starts by itself": (
        lambda o: get(o, "CronJob", "ldm3d-batch")["spec"].update(suspend=False),
        "must be suspended",
    ),
    "an hour that is not": (
        lambda o: get(o, "CronJob", "ldm3d-backup")["spec"].update(schedule="43 25 * * *"),
        "in their ranges",
    ),
    "a name that is too long": (
        lambda o: get(o, "CronJob", "ldm3d-data")["metadata"].update(name="ldm3d-data-" + 42 * "x"),
        "no name that Kubernetes takes",
    ),
    "the same twice": (lambda o: o.append(get(o, "Service", "ldm3d-api")), "Service ldm3d-api: twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str) -> None:
    broken, expected = BROKEN[name]
    objects = render("gpu")
    broken(objects)
    found = faults(objects)
    assert any(expected in fault for fault in found), found


def test_a_vault_that_lacks_a_secret_is_named() -> None:
    objects = render("azure-keyvault")
    get(objects, "SecretProviderClass", "ldm3d")["spec"]["secretObjects"].pop(0)
    pod_spec(objects, "api")["volumes"].pop()
    backup = job_spec(get(objects, "CronJob", "ldm3d-backup"))
    assert backup
    backup["template"]["metadata"]["labels"].pop("azure.workload.identity/use")
    get(objects, "ServiceAccount", "ldm3d-backup")["metadata"].pop("annotations")
    found = kubernetes_links.link_faults(objects)
    assert "SecretProviderClass ldm3d: does not make password of the Secret ldm3d-redis" in found
    assert "Deployment ldm3d-api: uses a Secret of the vault, and does not mount it" in found
    assert "CronJob ldm3d-backup: gets no token for its storage account" in found
    assert "CronJob ldm3d-backup: its ServiceAccount has not the identity that may read the vault" in found


@pytest.mark.parametrize(
    ("overlay", "kind", "field"),
    [
        ("kubeflow-pytorchjob", "PyTorchJob", "spec.pytorchReplicaSpecs.Worker.replica"),
        ("kubeflow-pytorchjob", "PyTorchJob", "spec.runPolicy.backoff"),
        ("kubeflow-trainjob", "TrainJob", "spec.trainer.nodes"),
        ("kubeflow-trainjob", "TrainingRuntime", "spec.mlPolicy.nodes"),
    ],
)
def test_an_operators_unknown_field_is_named(overlay: str, kind: str, field: str) -> None:
    objects = render(overlay)
    [place] = of_kind(objects, kind)
    *parents, last = field.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = 1
    found = kubernetes_models.schema_faults(objects)
    assert [fault for fault in found if f"{field}: unknown field" in fault], found
