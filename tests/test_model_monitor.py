"""The monitor: each finished volume is looked at once, whatever happens to the files, and its figures are right."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import served
from generated_jobs import brain, figures, give_reference, job
from prometheus_client import generate_latest
from service import ROOT, free_port, until

from ldm3d.errors import DataError
from mlops.api.catalogue import ActiveModel, ActiveSet, activate
from mlops.monitoring import model_monitor, quality_metrics, watching
from mlops.monitoring.watching import Watcher

V = 'model="demo",version="1"'


@pytest.fixture(autouse=True)
def nothing_told() -> Iterator[None]:
    yield
    for version in ("1", "2"):
        quality_metrics.forget("demo", version)


def told() -> dict[str, float]:
    return figures(generate_latest(quality_metrics.REGISTRY).decode())


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_volumes_are_measured_once_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(watching, "measure", lambda path, real=watching.measure: (read.append(path), real(path))[1])
    job(tmp_path, [brain(1), brain(2)], seed=1)
    job(tmp_path, [], state="failed")
    watcher, before = Watcher(tmp_path), tree(tmp_path)
    for _ in range(3):
        watcher.look()
    assert len(read) == 2 and tree(tmp_path) == before
    job(tmp_path, [brain(3)], seed=3)
    watcher.look()
    seen = told()
    assert len(read) == 3 and seen[f"ldm3d_quality_volumes_total{{{V}}}"] == 3
    assert seen[f"ldm3d_quality_window_volumes{{{V}}}"] == 3
    # 4/3 pi 8^3 voxels of 6 mm; the mask takes half a voxel more.
    assert seen[f'ldm3d_quality_feature_mean{{feature="brain_volume_ml",{V}}}'] == pytest.approx(463, rel=0.35)
    assert seen[f"ldm3d_quality_reference{{{V}}}"] == 0
    assert f"ldm3d_quality_reference_distance{{{V}}}" not in seen


def test_the_same_volume_again_is_not_taken_for_a_lack_of_variety(tmp_path: Path) -> None:
    give_reference(tmp_path, [brain(100 + i) for i in range(30)])
    for i in range(6):
        job(tmp_path, [brain(i)], seed=i)
        job(tmp_path, [brain(0)], seed=0)
    Watcher(tmp_path).look()
    assert told()[f"ldm3d_quality_window_volumes{{{V}}}"] == 6
    assert told()[f"ldm3d_quality_diversity_ratio{{{V}}}"] > 0.7


def test_good_volumes_are_near_the_training_data_and_others_are_not(tmp_path: Path) -> None:
    give_reference(tmp_path, [brain(100 + i) for i in range(60)])
    sets = {"like it": {}, "smaller": {"size": 0.85}, "all alike": {"variety": 0.1}}
    distances, ratios, volumes = {}, {}, {}
    for i, (name, wrong) in enumerate(sets.items()):
        data = tmp_path / str(i)
        shutil.copytree(tmp_path / "models", data / "models")
        for seed in range(25):
            job(data, [brain(seed, **wrong)], seed=seed)
        Watcher(data).look()
        seen = told()
        distances[name] = seen[f"ldm3d_quality_reference_distance{{{V}}}"]
        ratios[name] = seen[f"ldm3d_quality_diversity_ratio{{{V}}}"]
        volumes[name] = seen[f'ldm3d_quality_deviation{{feature="brain_volume_ml",{V}}}']
        quality_metrics.forget("demo", "1")
    assert abs(distances["like it"]) < 0.1 < min(distances["smaller"], distances["all alike"])
    assert 0.8 < ratios["like it"] < 1.2 and ratios["all alike"] < 0.5
    assert abs(volumes["like it"]) < 0.6 and volumes["smaller"] < -2


def test_damaged_and_empty_volumes_are_counted_and_vanished_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(tmp_path, [brain(1)], seed=1)
    next((job(tmp_path, [brain(2)], seed=2) / "files").iterdir()).write_bytes(b"damaged")
    job(tmp_path, [0 * brain(3)], seed=3)
    next((job(tmp_path, [brain(4)], seed=4) / "files").iterdir()).unlink()
    (job(tmp_path, [brain(5)], seed=5) / "outcome.json").write_text("{")
    (tmp_path / "jobs" / ".trash-x").mkdir()
    watcher = Watcher(tmp_path)
    watcher.look()
    watcher.look()
    seen = told()
    assert seen[f'ldm3d_quality_bad_volumes_total{{fault="damaged",{V}}}'] == 1
    assert seen[f'ldm3d_quality_bad_volumes_total{{fault="empty",{V}}}'] == 1
    assert seen[f"ldm3d_quality_window_volumes{{{V}}}"] == 1

    gone = job(tmp_path, [brain(6), brain(7)], seed=6)

    def vanishing(path: Path) -> None:
        shutil.rmtree(gone, ignore_errors=True)
        raise DataError("gone under the reader")

    monkeypatch.setattr(watching, "measure", vanishing)
    watcher.look()
    assert told()[f'ldm3d_quality_bad_volumes_total{{fault="damaged",{V}}}'] == 1


def test_only_the_last_volumes_of_each_version_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_VOLUMES", 3)
    for seed in range(6):
        job(tmp_path, [brain(seed, size=1 if seed > 2 else 0.5)], seed=seed)
        job(tmp_path, [brain(seed, size=0.7)], "2", seed=seed)
    watcher = Watcher(tmp_path)
    watcher.look()
    volume = f'ldm3d_quality_feature_mean{{feature="brain_volume_ml",{V}}}'
    assert told()[f"ldm3d_quality_window_volumes{{{V}}}"] == 3 and told()[volume] > 350
    assert told()[volume.replace('version="1"', 'version="2"')] < 250
    # Other weights under the same name begin anew.
    job(tmp_path, [brain(9, size=0.5)], seed=9, digest="c" * 64)
    watcher.look()
    assert told()[f"ldm3d_quality_window_volumes{{{V}}}"] == 1 and told()[volume] < 100


def test_a_version_is_forgotten_when_it_is_gone(tmp_path: Path) -> None:
    one = job(tmp_path, [brain(1)], seed=1)
    job(tmp_path, [brain(1)], "2", seed=1)
    watcher = Watcher(tmp_path)
    watcher.look()
    shutil.rmtree(one)
    activate(
        ActiveSet(models=[ActiveModel(name="demo", assign_by="job", versions=[served.version("1", model="demo")])]),
        tmp_path,
    )
    watcher.look()
    assert told()[f"ldm3d_quality_window_volumes{{{V}}}"] == 1  # callers may delete all; it is still served
    (tmp_path / "active.json").unlink()
    watcher.look()
    assert not [name for name in told() if V in name]
    assert told()['ldm3d_quality_window_volumes{model="demo",version="2"}'] == 1


def test_a_reference_that_comes_later_is_used(tmp_path: Path) -> None:
    for seed in range(5):
        job(tmp_path, [brain(seed)], seed=seed)
    watcher = Watcher(tmp_path)
    watcher.look()
    assert told()[f"ldm3d_quality_reference{{{V}}}"] == 0
    give_reference(tmp_path, [brain(100 + i) for i in range(10)])
    watcher.look()
    assert told()[f"ldm3d_quality_reference{{{V}}}"] == 1 and f"ldm3d_quality_reference_distance{{{V}}}" in told()


def test_the_very_first_bad_volume_is_a_rise(tmp_path: Path) -> None:
    """Prometheus sees no rise in a series that begins at 1."""
    (tmp_path / "jobs").mkdir()
    versions = [served.version("1", model="demo")]
    activate(ActiveSet(models=[ActiveModel(name="demo", assign_by="job", versions=versions)]), tmp_path)
    bad = f'ldm3d_quality_bad_volumes_total{{fault="empty",{V}}}'
    watcher = Watcher(tmp_path)
    watcher.look()
    assert told()[bad] == 0
    watched = job(tmp_path, [0 * brain(1)], seed=1)
    watcher.look()
    assert told()[bad] == 1
    shutil.rmtree(watched)
    (tmp_path / "active.json").unlink()
    watcher.look()
    assert bad not in told()


def test_a_look_that_fails_does_not_end_the_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def look(watcher: Watcher) -> None:
        looks.append(1)
        if len(looks) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("of a kind that nobody thought of")

    monkeypatch.setattr(Watcher, "look", look)
    monkeypatch.setattr(model_monitor, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(os, "nice", lambda by: 0)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        model_monitor.serve(tmp_path, free_port())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(looks) == 2


def test_a_reference_of_one_volume_is_none(tmp_path: Path) -> None:
    """There is no variety to compare with: nothing may be divided by it."""
    give_reference(tmp_path, [brain(100)])
    for seed in range(3):
        job(tmp_path, [brain(seed)], seed=seed)
    Watcher(tmp_path).look()
    assert told()[f"ldm3d_quality_reference{{{V}}}"] == 0


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the service's data folder"):
        Watcher(tmp_path / "nowhere").look()


def test_the_command_serves_and_ends(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlops.monitoring.model_monitor", "serve", "--port", str(port)]
    environment = os.environ | {"LDM3D_DATA_DIR": str(tmp_path)}
    job(tmp_path, [brain(1)], seed=1)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as monitor:

        def seen() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    return f"ldm3d_quality_volumes_total{{{V}}} 1.0" in answer.read().decode()
            except OSError:
                return False

        try:
            until(seen, "its figures", 30)
            taken = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
            assert taken.returncode == 2 and re.fullmatch(r"error: cannot listen at port \d+: .*\n", taken.stderr)
        finally:
            monitor.send_signal(signal.SIGTERM)
        assert monitor.wait(20) == 0
