"""docker-compose.yml's service, worker and Redis, started by podman-compose."""

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
from containers import free_port
from images import podman

pytestmark = pytest.mark.timeout(1800)

FILE = programs.ROOT / "mlops/docker/docker-compose.yml"
STARTED = ("api", "worker", "redis")


def on_this_machine(
    compose: dict[str, Any], name: str, image: str, redis: str, ports: dict[str, int]
) -> dict[str, Any]:
    """What podman has not here is replaced: networks with names, and health checks that others wait for."""
    services = {key: compose["services"][key] for key in STARTED}
    for key, service in services.items():
        service["image"] = redis if key == "redis" else image
        service["network_mode"] = "host"
        for cannot in ("build", "networks", "ports", "depends_on", "healthcheck", "restart"):
            service.pop(cannot, None)
        if key != "redis":
            service["environment"]["LDM3D_QUEUE_URL"] = f"redis://127.0.0.1:{ports['redis']}/0"
            service["environment"]["OMP_NUM_THREADS"] = "1"
    services["redis"]["command"] += ["--port", str(ports["redis"]), "--bind", "127.0.0.1"]
    services["api"]["environment"]["LDM3D_PORT"] = str(ports["api"])
    services["worker"]["environment"]["LDM3D_WORKER_METRICS_PORT"] = str(ports["worker"])
    return {"name": name, "services": services, "volumes": {"data": {}, "models": {}}}


class Compose:
    def __init__(self, file: Path):
        self.file = file

    def __call__(self, *words: object) -> str:
        command = [programs.tool("podman-compose"), "--podman-args=--log-level=fatal", "-f", self.file, *words]
        done = programs.run(*command, env=images.ENVIRONMENT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Compose, dict[str, int], str]]:
    image = images.service_image()
    redis = images.debian_image("localhost/ldm3d-test-redis:bookworm", "redis-server")
    name, ports = f"test{uuid.uuid4().hex[:8]}", {key: free_port() for key in STARTED}
    file = tmp_path / "docker-compose.yml"
    file.write_text(yaml.safe_dump(on_this_machine(yaml.safe_load(FILE.read_text()), name, image, redis, ports)))
    compose = Compose(file)
    try:
        make = ("-m", "mlops.api.keys", "create", "--name", "me", "--role", "operator")
        said = compose("run", "--rm", "--no-deps", "--entrypoint", "python", "api", *make)
        compose("up", "--detach")
        yield compose, ports, next(word for word in said.split() if word.startswith("ldm3d_"))
    finally:
        compose("down", "--volumes", "--timeout", "20")


def test_a_brain_comes_through_redis_from_the_worker(started: tuple[Compose, dict[str, int], str]) -> None:
    _, ports, key = started
    address = f"http://127.0.0.1:{ports['api']}"
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=150) as client:
        end = time.monotonic() + 180
        while not is_ready(client):
            assert time.monotonic() < end, podman("ps", "--all").stdout
            time.sleep(1)
        job = client.post("/v1/samples?wait=110", json={"steps": 2}).json()
        assert job["state"] == "done", job
    assert "ldm3d_volumes_total" in httpx.get(f"http://127.0.0.1:{ports['worker']}/metrics").text


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
