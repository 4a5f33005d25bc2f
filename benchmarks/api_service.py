"""The service as an operator starts it, for its benchmarks: real processes, the demo weights, API keys."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measure import RESULTS

ROOT = RESULTS.parents[1]
MIB = 2**20
MANY = 10**9
"""Of requests a minute: the limit is not what is measured."""


class Service:
    """A running service with a data folder of its own.

    Args:
        folder: for data and log.
        settings: LDM3D_... without the prefix, in lower case.
    """

    def __init__(self, folder: Path, **settings: Any):
        self.data, self.log, self.port = folder / "data", folder / "log.txt", _free_port()
        ours = {"data_dir": self.data, "port": self.port, "requests_per_minute": MANY, **settings}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LDM3D_", "PROMETHEUS_"))}
        self.environment = kept | {f"LDM3D_{name.upper()}": str(value) for name, value in ours.items()}
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = self.make_key("benchmark")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "mlops/docker/api_server.py"], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def make_key(self, name: str) -> str:
        """By the command that an operator types."""
        made = self.command("mlops.api.keys", "create", "--name", name, "--role", "operator")
        made.check_returncode()
        return made.stdout.strip()

    def command(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the service's commands on its data."""
        line = [sys.executable, "-m", module, *arguments]
        return subprocess.run(line, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    def client(self, key: str = "") -> httpx.Client:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the service has ended: {self.log.read_text()[-2000:]}")
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def workers(self) -> list[int]:
        """Process numbers of the worker processes, as the system knows them."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted({int(child) for file in threads for child in file.read_text().split()} | set(map(int, children)))

    def resident_mib(self) -> dict[str, float]:
        """Memory that the web process holds, and the workers together."""
        web = _resident(self.process.pid)
        return {"web MiB": round(web / MIB, 1), "worker MiB": round(sum(map(_resident, self.workers())) / MIB, 1)}

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


@contextmanager
def running(**settings: Any) -> Iterator[Service]:
    """A service that is ready; it is stopped, and its data removed, in the end."""
    with tempfile.TemporaryDirectory(prefix="ldm3d-benchmark-") as folder:
        service = Service(Path(folder), **settings)
        try:
            until(service.is_ready, "the service is ready")
            yield service
        finally:
            service.stop()


def until(seen: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """What `seen` gives, as soon as that is something.

    Raises:
        TimeoutError: it has given nothing in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := seen():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds:g} s: {what}")


def generate(client: httpx.Client, wait: int = 120, **asked: Any) -> dict[str, Any]:
    """A job, finished.

    Raises:
        RuntimeError: it is not done.
    """
    answer = client.post("/v1/samples", params={"wait": wait}, json=asked, timeout=wait + 10)
    job: dict[str, Any] = answer.json()
    if job.get("state") != "done":
        raise RuntimeError(f"no volumes: {answer.status_code} {answer.text[:500]}")
    return job


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _resident(process: int) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
