"""A real Prometheus and Alertmanager with a webhook, hurried, and an exporter that gives what a test wants."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import alerts
import yaml

HURRY = 120
"""A minute of the real rules is half a second here."""
SCRAPE = "300ms"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(seen: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What `seen` gives, as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError):
            if found := seen():
                return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Fake:
    """An exporter with the series of some cases; counters grow as they would in hurried time."""

    def __init__(self) -> None:
        self.lines: list[alerts.Series] = []
        self.began = time.time()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = fake.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    def give(self, lines: list[alerts.Series]) -> None:
        """Serve these from now on."""
        self.lines, self.began = lines, time.time()

    def text(self) -> str:
        minutes = (time.time() - self.began) * HURRY / 60
        rows = []
        for line in self.lines:
            value = time.time() + line.start if line.is_time else line.start + line.slope * minutes
            rows.append(f"{line.name} {value}\n")
        return "".join(rows)


class Webhook:
    """What Alertmanager tells people: the state in which each alert was told last."""

    def __init__(self) -> None:
        self.told: dict[str, list[str]] = {}
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in content["alerts"]:
                    webhook.told.setdefault(alert["labels"]["alertname"], []).append(alert["status"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fired(self, *names: str) -> Callable[[], bool]:
        return lambda: all("firing" in self.told.get(name, []) for name in names)

    def cleared(self, *names: str) -> Callable[[], bool]:
        return lambda: all(self.told.get(name, [""])[-1] == "resolved" for name in names)


@contextmanager
def running(folder: Path, targets: dict[str, list[str]], fake: bool = False) -> Iterator[Webhook]:
    """Prometheus scraping `targets` (job -> addresses) with the hurried rules, telling a webhook.

    Args:
        folder: for files and data.
        targets: by the job's name.
        fake: the targets give `job` and `up` themselves, so what Prometheus adds is not to hide it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    webhook, manager_port, port = Webhook(), free_port(), free_port()
    (folder / "rules.yml").write_text(yaml.safe_dump(alerts.hurried(HURRY)))
    jobs = [
        {"job_name": job, "honor_labels": fake, "static_configs": [{"targets": addresses}]}
        for job, addresses in targets.items()
    ]
    config = {
        "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": SCRAPE},
        "rule_files": ["rules.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{manager_port}"]}]}]},
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    receiver = {"name": "test", "webhook_configs": [{"url": f"http://127.0.0.1:{webhook.server.server_port}/"}]}
    route = {"receiver": "test", "group_by": ["..."], "group_wait": "0s", "group_interval": "300ms"}
    manager = {"route": route, "receivers": [receiver]}
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(manager))
    commands = (
        [
            "prometheus-alertmanager",
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/alertmanager",
            f"--web.listen-address=127.0.0.1:{manager_port}",
            "--cluster.listen-address=",
        ],
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/prometheus",
            f"--web.listen-address=127.0.0.1:{port}",
            "--query.lookback-delta=2s",  # a target that has gone is not remembered for five (real) minutes
            "--rules.alert.resend-delay=300ms",
        ],
    )
    with open(folder / "log.txt", "w") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    try:
        yield webhook
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
