"""Each alert fires and clears, through a real Prometheus and Alertmanager with the real rules, hurried.

First on an exporter that gives what each alert is about, then on the real service as far as things can be broken there.
"""

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import alerts
import prometheus_stack as stack
import pytest
from programs import PYTHON, ROOT, need, run

PROGRAMS = ("prometheus", "prometheus-alertmanager")


@pytest.mark.timeout(400)
def test_each_alert_fires_and_clears(tmp_path: Path) -> None:
    need(*PROGRAMS)
    fake = stack.Fake()
    # `up` is Prometheus's own: targets that are not there make it 0.
    down = {f"ldm3d-{name}": f"127.0.0.1:{stack.free_port()}" for name in ("api", "worker", "monitor")}
    own = {alert for alert, (lines, _) in alerts.CASES.items() if lines[0].name.startswith("up{")}
    firing, quiet = [], []
    for alert, (lines, below) in alerts.CASES.items():
        if alert not in own:
            # Several alerts are about the same metric: each gets a model, or a job, of its own.
            firing += [_apart(line, alert) for line in lines]
            quiet += [_apart(line, alert) for line in below[-1]]
    names = set(alerts.CASES) - own - set(SAME_SUM)
    with stack.running(tmp_path, {"fake": [fake.address], **{job: [a] for job, a in down.items()}}, True) as webhook:
        fake.give(_without(quiet, SAME_SUM))
        time.sleep(8)
        assert not set(webhook.told) & names  # nothing cries wolf just below its limit
        fake.give(_without(firing, SAME_SUM))
        stack.until(webhook.fired(*names, *own), f"all fire; told: {webhook.told}", 120)
        fake.give(_without(quiet, SAME_SUM))
        stack.until(webhook.cleared(*names), f"all clear; told: {webhook.told}", 120)
        for alert in SAME_SUM:  # one after the other, as they are about the same requests
            lines, below = alerts.CASES[alert]
            fake.give(lines)
            stack.until(webhook.fired(alert), f"{alert} fires; told: {webhook.told}")
            fake.give([])
            stack.until(webhook.cleared(alert), f"{alert} clears; told: {webhook.told}")


SAME_SUM = [
    alert for alert, (lines, _) in alerts.CASES.items() if lines[0].name.startswith(("ldm3d_http_", "ldm3d_workers"))
]


def _apart(line: alerts.Series, alert: str) -> alerts.Series:
    return line._replace(name=line.name.replace('model="demo"', f'model="{alert}"'))


def _without(lines: list[alerts.Series], left_out: list[str]) -> list[alerts.Series]:
    names = {line.name for alert in left_out for line in alerts.CASES[alert][0]}
    return list({line.name: line for line in lines if line.name not in names}.values())


MAKE_PROFILE = """
import sys
from pathlib import Path
from ldm3d.cards import UNET, DiffusionCard, read_card
from ldm3d.reference_profile import FACTS, FEATURES, ReferenceProfile, write_profile
folder = Path(sys.argv[1])
card = read_card(folder / UNET, DiffusionCard)
write_profile(folder, ReferenceProfile(
    trained_on=card.trained_on, num_train=2, channel=card.channel, spacing=card.spacing, size=(48, 64, 48),
    features={name: [0.1, 0.2] for name in FEATURES}, facts={name: {"unknown": 2} for name in FACTS},
    mean_image=[0.0] * 512, pair_distances=[0.1, 0.2],
))
"""


class Program:
    """A process of the project, which can be stopped and started again.

    Args:
        log: where it writes.
        words: its command line after `python`.
        settings: LDM3D_... without the prefix.
    """

    def __init__(self, log: Path, *words: object, **settings: object):
        self.log, self.words = log, [str(PYTHON), *map(str, words)]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("LDM3D_", "PROMETHEUS_"))}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment |= {f"LDM3D_{name.upper()}": str(value) for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: object) -> None:
        more = {f"LDM3D_{name.upper()}": str(value) for name, value in settings.items()}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.words, cwd=ROOT, env=self.environment | more, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(40)


class Caller:
    """Calls the service.

    Args:
        port: its port.
        key: an API key.
    """

    def __init__(self, port: int, key: str):
        self.port, self.key = port, key

    def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"Bearer {key or self.key}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def is_ready(self) -> bool:
        return self.call("GET", "/ready")[0] == 200


@contextmanager
def all_stopped(*programs: Program) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.stop()


@pytest.mark.timeout(600)
def test_the_real_service_makes_alerts_fire_and_clear(tmp_path: Path) -> None:
    need(*PROGRAMS)
    api_port, worker_port, monitor_port = (stack.free_port() for _ in range(3))
    data, models, weights = tmp_path / "data", tmp_path / "models.yaml", tmp_path / "weights"
    weights.mkdir()
    for path in (ROOT / "checkpoints/demo").glob("*.safetensors"):  # without a profile of the training data
        shutil.copy(path, weights)
    good = json.dumps({"models": {"demo": {"versions": {"1": {"weights": str(weights)}}}}})
    models.write_text(good)
    common = {"data_dir": data, "models_file": models}
    made = run(
        PYTHON, "-m", "mlops.api.keys", "create", "--name", "test", "--role", "admin",
        cwd=ROOT, env=os.environ | {"LDM3D_DATA_DIR": str(data)},
    )  # fmt: skip
    caller = Caller(api_port, next(word for word in made.stdout.split() if word.startswith("ldm3d_")))
    api = Program(
        tmp_path / "api.log", "mlops/docker/api_server.py",
        port=api_port, workers=0, max_queue=5, **common,
    )  # fmt: skip
    worker = Program(tmp_path / "worker.log", "-m", "mlops.api.worker", worker_metrics_port=worker_port, **common)
    monitor = Program(
        tmp_path / "monitor.log", "-m", "mlops.monitoring.model_monitor", "serve", "--port", monitor_port,
        data_dir=data,
    )  # fmt: skip
    targets = {"ldm3d-api": api_port, "ldm3d-worker": worker_port, "ldm3d-monitor": monitor_port}
    addresses = {job: [f"127.0.0.1:{port}"] for job, port in targets.items()}
    with all_stopped(api, worker, monitor), stack.running(tmp_path / "stack", addresses) as webhook:
        fires = lambda *names: stack.until(webhook.fired(*names), f"{names} fire; told: {webhook.told}", 90)  # noqa: E731
        clears = lambda *names: stack.until(webhook.cleared(*names), f"{names} clear; told: {webhook.told}", 90)  # noqa: E731

        fires("Ldm3dServiceDown", "Ldm3dWorkerDown", "Ldm3dMonitorDown")
        api.start()
        monitor.start()
        clears("Ldm3dServiceDown", "Ldm3dMonitorDown")
        fires("Ldm3dNotReady", "Ldm3dNoWorker")
        worker.start()
        clears("Ldm3dNotReady", "Ldm3dNoWorker", "Ldm3dWorkerDown")

        worker.stop()
        first = [json.loads(caller.call("POST", "/v1/samples", {"seed": i, "steps": 1})[1])["id"] for i in range(5)]
        with again_and_again(lambda: caller.call("POST", "/v1/samples", {"seed": 9, "steps": 1})):
            fires("Ldm3dQueueLong", "Ldm3dRequestsRefused")
        worker.start(job_seconds=0.001)  # no job can be done in that time
        fires("Ldm3dJobsFail")
        worker.stop()
        worker.start()
        clears("Ldm3dQueueLong", "Ldm3dRequestsRefused", "Ldm3dJobsFail")
        assert {json.loads(caller.call("GET", f"/v1/jobs/{name}")[1])["state"] for name in first} == {"failed"}

        with again_and_again(lambda: caller.call("GET", "/v1/jobs", key="ldm3d_wrong")):
            fires("Ldm3dKeysRefused")
        clears("Ldm3dKeysRefused")

        models.write_text(good.replace(str(weights), "nowhere"))
        assert caller.call("POST", "/v1/admin/reload")[0] == 200
        fires("Ldm3dReloadFailed")
        models.write_text(good)
        assert caller.call("POST", "/v1/admin/reload")[0] == 200
        clears("Ldm3dReloadFailed")

        job = json.loads(caller.call("POST", "/v1/samples?wait=60", {"seed": 1, "steps": 1})[1])
        assert job["state"] == "done"
        fires("Ldm3dNoReference")
        made = run(PYTHON, "-c", MAKE_PROFILE, weights, cwd=ROOT)
        assert made.returncode == 0, made.stderr
        assert caller.call("POST", "/v1/admin/reload")[0] == 200
        clears("Ldm3dNoReference")

        damaged = shutil.copytree(data / "jobs" / job["id"], tmp_path / "job")
        record = (damaged / "job.json").read_text()
        (damaged / "job.json").write_text(record.replace('"steps":1', '"steps":2'))  # else it is the same volume
        for path in (damaged / "files").glob("*.nii.gz"):
            path.write_bytes(b"damaged")
        damaged.rename(data / "jobs" / f"{job['id'][:-1]}z")
        fires("Ldm3dVolumesBad")
        clears("Ldm3dVolumesBad")
        assert "Ldm3dDiskFull" not in webhook.told  # a worker by itself tells nothing of it
    assert "Traceback" not in "".join((tmp_path / f"{name}.log").read_text() for name in ("api", "worker", "monitor"))


@contextmanager
def again_and_again(call: Callable[[], Any]) -> Iterator[None]:
    """Call in the meantime, 20 times a second."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(0.05):
            with suppress(OSError):
                call()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
