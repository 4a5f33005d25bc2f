"""A real service for the tests: its two processes, on a port of their own, with tiny weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tiny
import torch

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.files import sha256
from ldm3d.weights import LATENT_MEAN, save_weights

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "mlops" / "docker" / "api_server.py"
DEADLINE_SECONDS = 240.0
"""After which what is waited for counts as not coming: a busy machine needs a minute to start a service."""


def publish(folder: Path, seed: int = 0, **card: Any) -> Path:
    """Tiny weights that belong together; another seed, other weights."""
    cfg = tiny.config(NoiseScheduler={"type": "rflow"})
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / AUTOENCODER, tiny.autoencoder(cfg, seed).state_dict(), tiny.autoencoder_card(cfg))
    described = tiny.diffusion_card(cfg, sha256(folder / AUTOENCODER)).model_copy(update=card)
    tensors = {**tiny.unet(cfg, seed).state_dict(), LATENT_MEAN: torch.zeros(1, 1, 1, 1)}
    save_weights(folder / UNET, tensors, described)
    return folder


def models_yaml(path: Path, versions: dict[str, dict[str, Any]], **model: Any) -> Path:
    """A models.yaml with one model, `tiny`. JSON is YAML."""
    path.write_text(json.dumps({"models": {"tiny": {"versions": versions, **model}}}))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(seen: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """What `seen` gives, as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := seen():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Service:
    """A service with its own data folder.

    Args:
        folder: for data, weights and logs.
        settings: LDM3D_... without the prefix, in lower case.
    """

    def __init__(self, folder: Path, **settings: Any):
        self.folder, self.data, self.port = folder, folder / "data", free_port()
        self.models_file = folder / "models.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.models_file.exists():
            models_yaml(self.models_file, {"1": {"weights": str(publish(folder / "weights"))}})
        self.settings = {"data_dir": self.data, "models_file": self.models_file, "port": self.port, **settings}
        self.process: subprocess.Popen[bytes] | None = None
        self.key = ""

    @property
    def environment(self) -> dict[str, str]:
        ours = {f"LDM3D_{name.upper()}": str(value) for name, value in self.settings.items()}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LDM3D_", "PROMETHEUS_"))}
        return (
            kept
            | ours
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        )

    def start(self, wait: bool = True) -> "Service":
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER)], env=self.environment, cwd=self.folder, stderr=log, stdout=log
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        with self.client() as client:
            until(lambda: self._is_ready(client), f"the service is ready; its log: {self.log()}")

    def _is_ready(self, client: httpx.Client) -> bool:
        assert self.process and self.process.poll() is None, self.log()
        try:
            return client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self, key: str | None = None) -> httpx.Client:
        headers = self.headers if key is None else {"Authorization": f"Bearer {key}"}
        # Without TLS there is nothing to verify, and reading the list of authorities takes longer than a request.
        return httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE_SECONDS, verify=False)

    def make_key(self, role: str, name: str = "test") -> str:
        """By the command that an operator types."""
        made = subprocess.run(
            [sys.executable, "-m", "mlops.api.keys", "create", "--name", name, "--role", role],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return next(word for word in made.stdout.split() if word.startswith("ldm3d_"))

    def workers(self) -> list[int]:
        """Process numbers of this service's workers."""
        assert self.process
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(number) for task in tasks for number in task.read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to the web process, and wait for it and its workers."""
        assert self.process
        workers = self.workers()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(DEADLINE_SECONDS)
        until(lambda: not any(is_running(worker) for worker in workers), "the workers end")
        return code


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Service]:
    """A service that is ready, and is stopped in the end."""
    service = Service(folder, **settings)
    try:
        yield service.start()
    finally:
        if service.process and service.process.poll() is None:
            service.stop()


def finished(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job, once it has ended."""

    def ended() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}").json()
        return job if job["state"] in ("done", "failed", "cancelled") else None

    found: dict[str, Any] = until(ended, f"job {job_id} ends")
    return found
