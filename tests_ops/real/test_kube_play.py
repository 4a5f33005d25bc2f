"""The pod of the API that mlops/kubernetes describes, run by podman: secrets, volumes and hardening as they stand."""

import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import images
import programs
import pytest
import yaml
from containers import free_port, python
from images import podman

MANIFEST = programs.ROOT / "mlops/kubernetes/deployment.yaml"
KEY, PASSWORD = "password", "no-secret-of-anybody"

pytestmark = pytest.mark.timeout(1800)


def pod_of(name: str) -> dict[str, Any]:
    """The pod template of a Deployment."""
    for part in yaml.safe_load_all(MANIFEST.read_text()):
        if (part["kind"], part["metadata"]["name"]) == ("Deployment", name):
            return dict(part["spec"]["template"])
    raise AssertionError(f"{MANIFEST}: no Deployment {name}")


def on_this_machine(pod: dict[str, Any], name: str, image: str, port: int, redis: int) -> dict[str, Any]:
    """What only a cluster has is replaced: names in its DNS, its images, and a network for each pod."""
    spec = pod["spec"]
    (container,) = spec["containers"]
    container["image"] = image
    for variable in container["env"]:
        if variable["name"] == "LDM3D_QUEUE_URL":
            variable["value"] = f"redis://:$(REDIS_PASSWORD)@127.0.0.1:{redis}/0"
        elif variable["name"] == "POD_NAME":  # podman knows no fields of a pod
            variable.pop("valueFrom")
            variable["value"] = name
        elif "secretKeyRef" in variable.get("valueFrom", {}):
            variable["valueFrom"]["secretKeyRef"]["name"] = name
    container["env"].append({"name": "LDM3D_PORT", "value": str(port)})
    container["ports"][0]["containerPort"] = port
    for volume in spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = name
    spec["hostNetwork"] = True
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **pod["metadata"]}, "spec": spec}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[int]:
    programs.need("redis-server")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--requirepass", PASSWORD, "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path) as server:
        yield port
        server.terminate()


def test_the_apis_pod_serves_as_it_is_described(redis: int, tmp_path: Path) -> None:
    if not MANIFEST.exists():
        pytest.skip("no manifests")
    image, name, port = images.service_image(), f"ldm3d-test-{uuid.uuid4().hex[:8]}", free_port()
    podman("volume", "create", name)
    file = tmp_path / "pod.yaml"
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {KEY: PASSWORD}}
    file.write_text(yaml.safe_dump_all([secret, on_this_machine(pod_of("ldm3d-api"), name, image, port, redis)]))
    try:
        key = python(image, "-m", "mlops.api.keys", "create", "--name=t", "--role=operator", volume=name).strip()
        podman("kube", "play", file)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}) as client:
            wait_for(client)
            ready = client.get("/ready").json()["checks"]
            assert ready["queue"] == "ok" and ready["workers"] == "none lives", ready
            assert client.get("/v1/me").json()["role"] == "operator"
        found = podman(
            "inspect", f"{name}-api", "--format", "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}} {{.EffectiveCaps}}"
        )
        assert found.stdout.split() == ["10001:10001", "true", "[]"]
    finally:
        podman("pod", "rm", "--force", "--time=10", name, check=False)
        podman("secret", "rm", name, check=False)
        podman("volume", "rm", "--force", name, check=False)


def wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("/health did not answer within 2 minutes")
