"""Redis, worker and API with the commands, variables and probes of their pods, as processes: a volume is made."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import programs
import pytest
from containers import free_port
from kubernetes_objects import Object, get, render
from kubernetes_processes import start

pytestmark = pytest.mark.timeout(600)
PASSWORD = "3c1f" * 16


def container(name: str) -> Object:
    """Of a Deployment for CPUs."""
    found: Object = get(render("cpu"), "Deployment", f"ldm3d-{name}")["spec"]["template"]["spec"]["containers"][0]
    return found


class Service:
    """All of it, with ports of this machine."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.metrics, redis = folder, free_port(), free_port(), free_port()
        self.redis_port = str(redis)
        self.replaced = {
            "/etc/ldm3d/models.yaml": str(folder / "models.yaml"),
            "/data": str(folder / "data"),
            "ldm3d-redis:6379": f"127.0.0.1:{redis}",
            "0.0.0.0": "127.0.0.2",  # not loopback's own name: as from elsewhere, it wants a key
            "9101": str(self.metrics),
        }
        [models] = [o for o in render("cpu") if o["metadata"]["name"].startswith("ldm3d-models-")]
        (folder / "models.yaml").write_text(models["data"]["models.yaml"])
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, **more: str) -> None:
        given = {"REDIS_PASSWORD": PASSWORD, "REDISCLI_AUTH": PASSWORD, "POD_NAME": f"ldm3d-{name}-x", **more}
        found = container(name)
        if name == "redis":
            found["args"] += ["--port", self.redis_port, "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self.processes.append(start(found, self.folder / f"{name}.log", self.replaced, given))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def python(self, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """As `kubectl exec` in the worker's pod."""
        environment = os.environ | {"LDM3D_DATA_DIR": str(self.folder / "data")} | variables
        return programs.run(programs.PYTHON, *words, cwd=programs.ROOT, env=environment)

    def until(self, what: str, seconds: float = 120) -> None:
        """Wait until the API's probe of `what` succeeds."""
        end = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(f"http://127.0.0.2:{self.port}{what}", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, {name: self.log(name) for name in ("api", "worker", "redis")}
            time.sleep(0.5)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    programs.need("kubectl", "redis-server")
    found = Service(tmp_path)
    yield found
    for process in found.processes:
        process.terminate()
    for process in found.processes:
        process.wait(60)


def probe_of_redis(service: Service, password: str) -> int:
    """Exit status of the probe's command."""
    command = container("redis")["readinessProbe"]["exec"]["command"]
    environment = {"PATH": os.environ["PATH"], "REDISCLI_AUTH": password}
    return programs.run(*command[:1], "-p", service.redis_port, *command[1:], env=environment).returncode


def test_a_volume_is_made_by_what_the_pods_run(service: Service) -> None:
    service.start("redis")
    service.start("worker")
    service.start("api", LDM3D_PORT=str(service.port))
    # No key: the API says so and ends, as the README tells.
    assert service.processes[-1].wait(60) == 2
    assert "there is no key: make one with python -m mlops.api.keys create" in service.log("api")
    made = service.python("-m", "mlops.api.keys", "create", "--name", "admin", "--role", "admin")
    key = made.stdout.strip()
    service.start("api", LDM3D_PORT=str(service.port))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        service.until(container("api")[probe]["httpGet"]["path"])
    service.until("/ready")
    assert probe_of_redis(service, PASSWORD) == 0
    assert probe_of_redis(service, "another") != 0

    ready = container("worker")["readinessProbe"]["exec"]["command"]
    assert service.python(*ready[1:], MODE="worker").returncode == 0
    base, headers = f"http://127.0.0.2:{service.port}", {"Authorization": f"Bearer {key}"}
    job = httpx.post(f"{base}/v1/samples?wait=100", headers=headers, json={"steps": 2}, timeout=120).json()
    assert job["state"] == "done", service.log("worker")
    assert (service.folder / "data/audit/ldm3d-api-x/audit.jsonl").is_file()

    # What the workers' HorizontalPodAutoscaler asks for is the API's to tell; the worker counts what it makes.
    figures = httpx.get(f"{base}/metrics").text
    assert "\nldm3d_queue_jobs 0.0\n" in figures
    assert "\nldm3d_running_jobs 0.0\n" in figures
    path = container("worker")["livenessProbe"]["httpGet"]["path"]
    assert "ldm3d_volumes_total{" in httpx.get(f"http://127.0.0.1:{service.metrics}{path}").text

    # Without Redis jobs are still accepted, and /ready says why nobody works: so readiness is not /ready.
    service.processes[0].terminate()
    service.processes[0].wait(30)
    assert httpx.get(f"{base}/ready").json()["checks"]["queue"] == "does not answer"
    assert httpx.get(f"{base}{container('api')['readinessProbe']['httpGet']['path']}").status_code == 200
    assert httpx.post(f"{base}/v1/samples", headers=headers, json={"steps": 2}, timeout=30).status_code == 202


def test_the_monitor_serves_what_its_probe_asks_for(tmp_path: Path) -> None:
    programs.need("kubectl")
    (tmp_path / "data").mkdir()
    port = free_port()
    monitor = start(container("monitor"), tmp_path / "log", {"/data": str(tmp_path / "data"), "9108": str(port)}, {})
    try:
        end = time.monotonic() + 60
        while True:
            try:
                path = container("monitor")["livenessProbe"]["httpGet"]["path"]
                assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.5)
        assert [*(tmp_path / "data").iterdir()] == []  # mounted to be read only
    finally:
        monitor.terminate()
        assert monitor.wait(30) in (0, 143)
