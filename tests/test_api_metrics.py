"""What is told of callers, devices and failures: enough to act upon, and no more."""

import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generated_jobs import figures
from prometheus_client import REGISTRY, generate_latest
from service import ROOT, Service, models_yaml, running, until

from ldm3d.cards import UNET, DiffusionCard, read_card
from ldm3d.errors import ConfigError
from ldm3d.reference_profile import FACTS, FEATURES, FILE, ReferenceProfile, write_profile
from mlops.api import device, metrics, usage
from mlops.api.usage import MOST_CALLERS, Usage, pseudonym
from mlops.api.weights_store import store

KEY_ID = "oidc:alice@example.org"


def told() -> dict[str, float]:
    return figures(generate_latest(REGISTRY).decode())


def callers() -> dict[str, float]:
    return {name: value for name, value in told().items() if name.startswith("ldm3d_caller_volumes_total")}


@pytest.fixture(autouse=True)
def nobody_counted() -> None:
    metrics.CALLER_VOLUMES.clear()


def test_callers_are_counted_under_names_that_tell_nothing(tmp_path: Path) -> None:
    counted = Usage(tmp_path)
    counted.count(KEY_ID, "demo", "1", 3)
    counted.count(KEY_ID, "demo", "1", 2)
    label = pseudonym(tmp_path, KEY_ID)
    assert callers() == {f'ldm3d_caller_volumes_total{{caller="{label}",model="demo",version="1"}}': 5}
    assert "alice" not in label and pseudonym(tmp_path, "oidc:bob") != label
    assert stat.S_IMODE((tmp_path / "usage_salt").stat().st_mode) == 0o600
    (other := tmp_path / "other").mkdir()
    Usage(other).count("x", "demo", "1", 1)
    assert pseudonym(other, KEY_ID) != label  # who has only the metrics cannot try names


def test_any_number_of_callers_is_a_bounded_number_of_labels(tmp_path: Path) -> None:
    counted = Usage(tmp_path)
    for i in range(3 * MOST_CALLERS):
        counted.count(f"oidc:{i}", "demo", "1", 1)
    assert len(callers()) == MOST_CALLERS + 1
    assert callers()['ldm3d_caller_volumes_total{caller="other",model="demo",version="1"}'] == 2 * MOST_CALLERS


def test_a_full_disk_refuses_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(usage, "create_once", full)
    Usage(tmp_path).count(KEY_ID, "demo", "1", 1)
    assert list(callers()) == ['ldm3d_caller_volumes_total{caller="other",model="demo",version="1"}']
    with pytest.raises(ConfigError, match="the service makes it with its first job"):
        pseudonym(tmp_path, KEY_ID)


def test_a_worker_tells_of_its_machine() -> None:
    device.look(torch.device("cpu"), 0.5)
    seen = told()
    used, total = (seen[f'ldm3d_device_memory_{what}_bytes{{device="cpu"}}'] for what in ("used", "total"))
    assert 0 < used < total and 50e6 < seen["ldm3d_worker_memory_bytes"] < total
    assert 0 < seen['ldm3d_device_use_ratio{device="cpu"}'] <= 0.5


@pytest.mark.parametrize("way", ["pynvml", "nvidia-smi", "neither", "part of a GPU"])
def test_a_worker_tells_of_its_gpu(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: what torch and nvidia-smi say is made up."""

    def use(of: torch.device) -> int:
        if way == "part of a GPU":
            raise Exception("NVMLError_NotSupported, which is an Exception and no more")
        if way != "pynvml":
            raise ModuleNotFoundError("pynvml")
        return 70

    def smi(command: list[str], **options: Any) -> SimpleNamespace:
        assert command[-1] == "GPU-uuid"
        if way == "neither":
            raise FileNotFoundError
        return SimpleNamespace(stdout="[N/A]\n" if way == "part of a GPU" else "42\n")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of: (20, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda of: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda of: 35)
    monkeypatch.setattr(torch.cuda, "utilization", use)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: SimpleNamespace(uuid="uuid"))
    monkeypatch.setattr(subprocess, "run", smi)
    metrics.DEVICE_USE.clear()
    device.look(torch.device("cuda"), 0.5)
    seen = told()
    # 20 are free, and 15 are kept by torch for whatever comes next.
    assert seen['ldm3d_device_memory_used_bytes{device="cuda:1"}'] == 65
    assert seen['ldm3d_device_memory_total_bytes{device="cuda:1"}'] == 100
    expected = {"pynvml": 0.7, "nvidia-smi": 0.42, "neither": math.nan, "part of a GPU": math.nan}[way]
    assert seen.get('ldm3d_device_use_ratio{device="cuda:1"}', math.nan) == pytest.approx(expected, nan_ok=True)


def test_the_profile_of_the_training_data_travels_with_the_weights(tmp_path: Path) -> None:
    weights = Service(tmp_path / "service").folder / "weights"
    first = store(str(weights), tmp_path, 10**6)
    assert not (first.folder / FILE).exists()
    card = read_card(weights / UNET, DiffusionCard)
    profile = ReferenceProfile(
        trained_on=card.trained_on, num_train=2, channel=0, spacing=card.spacing, size=(16, 16, 16),
        features={name: [0.1, 0.2] for name in FEATURES}, facts={name: {"unknown": 2} for name in FACTS},
        mean_image=[0.0] * 512, pair_distances=[0.1],
    )  # fmt: skip
    write_profile(weights, profile)
    assert store(str(weights), tmp_path, 10**6) == first  # the same version, whatever lies beside its weights
    assert (first.folder / FILE).read_bytes() == (weights / FILE).read_bytes()


@pytest.mark.parametrize("wrong", ["of other data", "damaged"])
def test_a_profile_that_does_not_belong_is_left_out(
    tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Service(tmp_path / "service").folder / "weights"
    (weights / FILE).write_text("{")
    if wrong == "of other data":
        write_profile(weights, ReferenceProfile(
            trained_on="0" * 64, num_train=2, channel=0, spacing=(1, 1, 1), size=(16, 16, 16),
            features={name: [0.1] for name in FEATURES}, facts={name: {"unknown": 2} for name in FACTS},
            mean_image=[0.0] * 512, pair_distances=[0.1],
        ))  # fmt: skip
    stored = store(str(weights), tmp_path, 10**6)
    assert not (stored.folder / FILE).exists() and "it is not used" in caplog.text


def test_the_service_tells_what_alerts_need(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        client.post("/v1/samples?wait=60", json={"num": 2, "steps": 1})
        seen = until(lambda: _with(figures(client.get("/metrics").text), "ldm3d_worker_memory_bytes"), "the device")
        assert seen["ldm3d_ready"] == 1 and seen["ldm3d_queue_limit_jobs"] == 100
        assert seen["ldm3d_results_limit_bytes"] == 20 * 2**30 and seen["ldm3d_data_free_bytes"] > 0
        assert (seen["ldm3d_audit_failed"], seen["ldm3d_reload_failed"]) == (0, 0)
        assert seen['ldm3d_jobs_ended_total{model="tiny",shadow="no",state="failed",version="1"}'] == 0
        assert [value for name, value in seen.items() if name.startswith("ldm3d_caller_volumes_total")] == [2]
        models_yaml(service.models_file, {"1": {"weights": "nowhere"}})
        client.post("/v1/admin/reload")
        assert figures(client.get("/metrics").text)["ldm3d_reload_failed"] == 1


def test_a_worker_by_itself_tells_nothing_that_only_the_web_process_knows() -> None:
    """Its zeros would be taken for a service that is not ready and a disk that is full."""
    code = "import sys; from mlops.api import metrics; metrics.serve(0); print(metrics.exposition()[0].decode())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROMETHEUS_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "ldm3d_worker_memory_bytes" in done.stdout
    assert not re.search("ldm3d_(ready|data_free_bytes|audit_failed|queue|http|workers)", done.stdout)


def _with(seen: dict[str, float], name: str) -> dict[str, float] | None:
    return seen if seen.get(name) else None


WORKS_AND_ENDS = """
from mlops.api import metrics
metrics.expect("demo", "1")
metrics.count_end("demo", "1", False, "failed")
metrics.JOB_SECONDS.labels("demo", "1").observe(3)
metrics.RELOAD_FAILED.set({value})
metrics.MODELS_LOADED.set(1)
"""
BURIES = """
import os, subprocess, sys
from mlops.api import metrics
for value in (0, 1):
    worker = subprocess.Popen([sys.executable, "-c", {code!r}.format(value=value)])
    assert worker.wait() == 0
    before = metrics.exposition()[0]
    metrics.bury(worker.pid)
    lines = lambda text: {{line for line in text.decode().splitlines() if "models_loaded" not in line}}
    assert lines(before) == lines(metrics.exposition()[0])
print(*sorted(os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])), os.getpid(), sep="\\n", file=sys.stderr)
print(metrics.exposition()[0].decode().strip())
"""


def test_workers_that_have_ended_leave_their_figures_and_no_files(tmp_path: Path) -> None:
    """Of a worker that ends every half a minute they would fill the disk."""
    done = subprocess.run(
        [sys.executable, "-c", BURIES.format(code=WORKS_AND_ENDS)],
        cwd=ROOT, env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = figures(done.stdout.strip())
    assert seen['ldm3d_jobs_ended_total{model="demo",shadow="no",state="failed",version="1"}'] == 2
    assert seen['ldm3d_job_seconds_bucket{le="5.0",model="demo",version="1"}'] == 2
    assert seen['ldm3d_job_seconds_sum{model="demo",version="1"}'] == 6
    assert seen["ldm3d_reload_failed"] == 1 and "ldm3d_models_loaded" in seen
    *files, own = done.stderr.split()
    assert {name.rpartition("_")[2] for name in files} == {"0.db", f"{own}.db"}
