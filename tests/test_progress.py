"""ldm3d.progress: what an epoch says of itself, in a terminal and elsewhere, and what saying it costs."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ldm3d.json_lines import JsonLines
from ldm3d.profiling import StepProfiler
from ldm3d.progress import EpochLog, Position, peak_memory, rounded
from ldm3d.tracking import Tracker


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors whose value was asked for, which on a GPU waits for all work before."""
    found, read = [], Tensor.__float__

    def counted(tensor: Tensor) -> float:
        found.append(tensor)
        return read(tensor)

    monkeypatch.setattr(Tensor, "__float__", counted)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def epoch_log(folder: Path, position: Position | None = None, epochs: int = 5, steps: int = 4) -> EpochLog:
    tracker = Tracker(folder, 2, StepProfiler(None, folder, tiny.CPU))
    return EpochLog(position or Position(), epochs, steps, tiny.CPU, tracker)


def values(l1: float, kl: float, **more: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in {"l1": l1, "kl": kl, **more}.items()}


def made(log: EpochLog, clock: Clock, steps: int, seconds: float, volumes: int = 2) -> EpochLog:
    """So many steps, each of which takes so long."""
    for _ in log.watch(range(steps)):
        clock.passes(seconds)
        log.add(values(3.0, 1.0), volumes)
    return log


def test_averages_terms_and_shares(folder: Path) -> None:
    log = epoch_log(folder)
    log.add(values(1.0, 0.5, gradient_norm=9.0), volumes=2)
    log.add(values(2.0, -1.5, discriminator=7.0), volumes=3)
    assert log.volumes == 5
    # A term that only some steps have is averaged over these.
    assert log.averages() == {"l1": 1.5, "kl": -0.5, "gradient_norm": 9, "discriminator": 7}
    assert log.terms() == {"l1": 1.5, "kl": -0.5} and log.loss() == 1.0
    assert log.shares() == {"l1": 0.75, "kl": 0.25}


def test_sums_of_many_steps_keep_their_digits(folder: Path) -> None:
    log = epoch_log(folder)
    log.add({"loss": torch.tensor(2.0**24)}, volumes=2)
    log.add({"loss": torch.tensor(1.0)}, volumes=2)
    assert 2 * log.loss() == 2**24 + 1  # 32 bits end at 2^24


def test_a_loss_without_terms(folder: Path) -> None:
    log = epoch_log(folder)
    log.add({"loss": torch.tensor(0.25), "gradient_norm": torch.tensor(3.0)}, volumes=2)
    assert (log.loss(), log.terms(), log.shares()) == (0.25, {}, {})


def test_epoch_line(folder: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    log = made(epoch_log(folder, Position(1, 4)), clock, steps=4, seconds=2.0)
    clock.passes(2.0)
    log.report({"loss": 0.25, "level_1": 1.0}, 0.001)
    (line,) = capsys.readouterr().err.splitlines()
    beginning = "epoch 2/5: loss 4.0000 (l1 75%, kl 25%); validation loss 0.25; 1.0 volumes/s, "
    assert re.fullmatch(re.escape(beginning) + r"\d\.\d\d GiB, 30 s left", line), line
    assert rounded({"a": torch.tensor(1.23456), "b": 2.0}) == "a 1.235, b 2"


def test_epoch_as_an_object(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", JsonLines(stream))
    log = epoch_log(folder, Position(1, 4))
    for _ in log.watch(range(4)):
        with log.waiting():
            clock.passes(0.5)
        clock.passes(1.5)
        log.add(values(3.0, 1.0, gradient_norm=2.0), 6)
    clock.passes(2.0)
    log.report({"psnr_db": math.inf, "level_1": 1.0}, 0.001)
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert found.pop("peak_gib") == pytest.approx(peak_memory(tiny.CPU)["peak_gib"])
    assert found.pop("message").startswith("epoch 2/5: loss 4.0000") and found.pop("time")
    assert found == {
        "level": "info",
        "event": "epoch",
        "epoch": 2,
        "epochs": 5,
        "step": 8,
        "volumes_seen": 48,
        "loss": 4.0,
        "terms": {"l1": 3.0, "kl": 1.0},
        "gradient_norm": 2.0,
        "learning_rate": 0.001,
        "validation": {"psnr_db": None, "level_1": 1.0},
        "data_wait_share": 0.25,
        "volumes_per_second": 3.0,
        "seconds_left": 30.0,
    }


def test_events_of_an_epoch(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    log = made(epoch_log(folder, Position(1, 4)), clock, steps=4, seconds=2.0)
    told: dict[str, Any] = {}
    monkeypatch.setattr(log.tracker, "scalars", lambda group, found, step: told.update({group: (found, step)}))
    log.report({}, 0.001)
    assert told["train"] == ({"l1": 3.0, "kl": 1.0, "loss": 4.0, "learning_rate": 0.001}, 8)
    assert told["share"] == ({"l1": 0.75, "kl": 0.25}, 8)
    performance, step = told["performance"]
    assert step == 8 and performance.keys() == {"volumes_per_second", "data_wait_share", "peak_gib"}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5.4, "5 s"), (89, "89 s"), (100, "2 min"), (3000, "50 min"), (3725, "1 h 2 min")]
)
def test_time_left(seconds: float, shown: str, folder: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    made(epoch_log(folder, epochs=2, steps=1), clock, steps=1, seconds=seconds).report({}, 0.1)
    assert capsys.readouterr().err.endswith(f" {shown} left\n")


def test_speed_is_that_of_training_and_time_left_that_of_whole_epochs(
    folder: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed after 6 of 8 steps: 2 steps in 4 s, then 10 s of validation; a whole epoch is 8 x 2 s + 10 s."""
    log = made(epoch_log(folder, Position(0, 6), epochs=3, steps=8), clock, steps=2, seconds=2.0, volumes=3)
    clock.passes(10.0)
    log.report({}, 0.1)
    said = capsys.readouterr().err
    assert "; 1.5 volumes/s" in said and said.endswith(", 52 s left\n")


def test_an_epoch_whose_steps_were_all_made_before_says_nothing(
    folder: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    made(epoch_log(folder, Position(0, 4)), clock, steps=0, seconds=1.0).report({}, 0.1)
    assert capsys.readouterr().err == "" and not [*folder.iterdir()]


def test_quiet_outside_a_terminal_and_reads_nothing_from_the_device(
    folder: Path, clock: Clock, reads: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    made(epoch_log(folder, steps=50), clock, steps=50, seconds=60.0)
    assert capsys.readouterr().err == "" and reads == []


def test_bar_says_loss_speed_memory_and_time_left(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    # 2 of 8 steps were made before, 2 of the other 6 now; a second epoch is to come.
    made(epoch_log(folder, Position(0, 2), epochs=2, steps=8), clock, steps=2, seconds=5.0)
    shown = terminal.getvalue().split("\r")
    bars = [bar for bar in shown if re.match(r"epoch 1/2:  50%\|.*\| 4/8, loss 4\.0000, 0\.4 volumes/s, ", bar)]
    assert bars and bars[-1].rstrip().endswith("GiB, 60 s left"), shown
    assert shown[-2].strip() == "" and shown[-1] == ""  # nothing of it stays


def test_bar_reads_the_loss_once_a_second_at_most(
    folder: Path, clock: Clock, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    made(epoch_log(folder, steps=100), clock, steps=100, seconds=0.1)
    assert len({id(tensor) for tensor in reads}) >= 1 and len(reads) <= 10 * 2 * 2  # seconds, terms, loss and its parts


def test_a_loop_that_is_left_early_clears_its_bar(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    log = epoch_log(folder)
    for _ in log.watch(range(4)):
        clock.passes(3.0)
        log.add(values(3.0, 1.0), 2)
        break
    assert terminal.getvalue().endswith("\r") and terminal.getvalue().split("\r")[-2].strip() == ""
    assert log.performance()["volumes_per_second"] == pytest.approx(2 / 3)


def test_waiting_for_batches_is_measured(folder: Path, clock: Clock) -> None:
    def slow() -> Any:
        for _ in range(4):
            clock.passes(1.0)
            yield ()

    log = epoch_log(folder)
    for _ in log.watch(slow()):
        clock.passes(3.0)
        log.add(values(3.0, 1.0), 2)
    assert log.performance()["data_wait_share"] == pytest.approx(0.25)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process")
def test_memory_on_a_cpu_is_the_most_that_this_process_has_held() -> None:
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak_memory(tiny.CPU)["peak_gib"] == pytest.approx(int(kib) / 2**20, rel=0.02)


def test_memory_of_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (3 if device.index == 1 else 0) * 2**30)
    assert peak_memory(torch.device("cuda", 1)) == {"peak_gib": 3.0}


def test_memory_is_left_out_where_it_is_unknown(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm3d.progress.resource", None)
    assert peak_memory(tiny.CPU) == {}
    made(epoch_log(folder), clock, steps=4, seconds=1.0).report({}, 0.1)


def test_position_is_stored_beside_the_stage() -> None:
    state = Position(3, 40, 0.5).state({"weights": 1}, {"seed": 2})
    assert state == {"epoch": 3, "step": 40, "best": 0.5, "stage": {"weights": 1}, "fingerprint": {"seed": 2}}
    assert Position().best == math.inf
