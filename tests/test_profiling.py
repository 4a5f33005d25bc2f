"""ldm3d.profiling: the trace that `--profile` writes, its table, and that a training does not notice it."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from scripts import Desk, Result
from test_scripts import both_stages, give_autoencoder, require_same_training
from torch.autograd import DeviceType

from ldm3d import distributed
from ldm3d.errors import ConfigError
from ldm3d.profiling import WARM_UP_STEPS, Row, StepProfiler, operators, table


def train(profiler: StepProfiler, first: int, steps: int) -> None:
    """An epoch: each step fetches a batch and makes three products of matrices."""
    profiler.start()
    for step in range(first, first + steps):
        with profiler.waiting():
            batch = torch.ones(64, 64)
        for _ in range(3):
            batch = batch @ batch / 64
        profiler.step(step + 1)
    profiler.end(first + steps)


def trace(folder: Path) -> tuple[str, Counter[str]]:
    """Name of the only trace, and how often each thing happened in it."""
    (path,) = folder.iterdir()
    return path.name, Counter(event["name"] for event in json.loads(gzip.open(path).read())["traceEvents"])


def test_as_many_steps_as_asked_for_are_recorded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = StepProfiler(2, tmp_path, tiny.CPU)
    for epoch in range(2):
        train(profiler, first=20 * epoch, steps=20)
    name, events = trace(tmp_path)
    assert name == f"steps_{WARM_UP_STEPS + 1}_to_{WARM_UP_STEPS + 2}.pt.trace.json.gz"
    assert (events["aten::mm"], events["aten::ones"], events["waiting for data"]) == (6, 2, 2)
    said = capsys.readouterr().err
    assert len(re.findall(r"^profile of 2 steps: [\d.]+ s a step, of which [\d.]+% waiting for data", said, re.M)) == 1
    assert re.search(r"^ *[\d.]+% +[\d.]+ +3\.0  mm$", said, re.M), said


def test_what_an_epoch_leaves_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps are warmed up over two epochs, and what comes between epochs is no step."""
    profiler = StepProfiler(5, tmp_path, tiny.CPU)
    for epoch in range(3):
        train(profiler, first=2 * epoch, steps=2)
        torch.ones(8, 8) @ torch.ones(8, 8)
    name, events = trace(tmp_path)
    assert (name, events["aten::mm"]) == ("steps_4_to_4.pt.trace.json.gz", 3)
    assert "profile of 1 steps (5 were asked for; the epoch was over)" in capsys.readouterr().err


def test_time_of_waiting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("ldm3d.profiling.log", lambda message, **fields: told.update(fields))
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    profiler = StepProfiler(4, tmp_path, tiny.CPU)
    profiler.start()
    for step in range(10):
        with profiler.waiting():
            now[0] += 1.0
        now[0] += 3.0
        profiler.step(step + 1)
    assert (told["event"], told["steps"], told["seconds_per_step"], told["data_wait_share"]) == (
        "profile",
        4,
        4.0,
        0.25,
    )
    assert told["trace"].is_file()


@pytest.mark.parametrize("main", [True, False])
def test_nothing_is_written_unasked_or_by_other_ranks(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    train(StepProfiler(None if main else 2, tmp_path, tiny.CPU), first=0, steps=10)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_a_step_is_refused(steps: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--profile {steps}: the number of steps must be 1 or more"):
        StepProfiler(steps, tmp_path, tiny.CPU)


def event(key: str, cpu: float, gpu: float = 0.0, count: int = 4, **more: Any) -> Any:
    """Own time in ms."""
    usual = {"device_type": DeviceType.CPU, "is_user_annotation": False}
    return SimpleNamespace(
        key=key, self_cpu_time_total=1e3 * cpu, self_device_time_total=1e3 * gpu, count=count, **usual | more
    )


EVENTS = [
    event("aten::mm", 100, 400),
    event("aten::add", 200, 300),
    event("waiting for data", 500, 0, is_user_annotation=True),
    event("sm90_gemm_kernel", 0, 400, device_type=DeviceType.CUDA),
    event("aten::view", 0, 0),
]


def test_operators_are_ordered_by_their_own_time_on_the_device() -> None:
    on_cpu = operators(EVENTS, on_gpu=False, seconds=1.0, steps=2)
    assert on_cpu == [Row("add", 0.2, 100.0, 2.0), Row("mm", 0.1, 50.0, 2.0)]
    on_gpu = operators(EVENTS, on_gpu=True, seconds=1.0, steps=2)
    assert on_gpu == [Row("mm", 0.4, 200.0, 2.0), Row("add", 0.3, 150.0, 2.0)]


def test_table_accounts_for_all_the_time() -> None:
    rows = [Row(f"operator{i}", 0.05, 1.0, 2.0) for i in range(15)]
    lines = table(rows, on_gpu=True).splitlines()
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100)
    assert lines[-2].split() == ["15.0%", "3.00", "6.0", "3", "other", "operators"]
    assert lines[-1].split() == ["25.0%", "GPU", "idle"]
    assert "KINETO_LOG_LEVEL" in table([], on_gpu=True)


@both_stages
def test_a_profiled_training_ends_with_the_same_weights(
    script: str, trained: Desk, desk: Desk, run: Callable[..., Result]
) -> None:
    give_autoencoder(desk, trained, script)
    done = run(script, "--profile", 1)
    assert done.code == 0 and "convolution_backward" in done.stderr and "epoch 4/4" in done.stderr, done.stderr
    name, events = trace(desk.runs / script.removeprefix("train_").removesuffix(".py") / "profile")
    assert name == "steps_4_to_4.pt.trace.json.gz" and events["aten::convolution_backward"] > 5
    require_same_training(desk, trained, script)
