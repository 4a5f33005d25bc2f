"""`--profile N`: a trace of some training steps, and the table of where their time went."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ldm3d import distributed
from ldm3d.console import log
from ldm3d.errors import ConfigError
from ldm3d.files import atomic_path

# Steps before the recorded ones: the first makes buffers and chooses algorithms, in the last the profiler warms up.
WARM_UP_STEPS = 3
ROWS = 12


class Row(NamedTuple):
    """What one operator, without those that it calls, took of the recorded steps."""

    name: str
    share: float
    milliseconds: float
    """In one step."""
    calls: float
    """In one step."""


class StepProfiler:
    """Records training steps on rank 0 with torch.profiler, once, and is silent before and after.

    Args:
        steps: how many to record; None for none. Fewer are recorded where an epoch ends, as validation is no step.
        folder: gets the trace, which https://ui.perfetto.dev and chrome://tracing show.
        device: whose time is told: a GPU's where there is one.

    Raises:
        ConfigError: fewer than one step was asked for.
    """

    def __init__(self, steps: int | None, folder: Path, device: torch.device):
        if steps is not None and steps < 1:
            raise ConfigError(f"--profile {steps}: the number of steps must be 1 or more")
        self.steps, self.folder, self.device = steps, folder, device
        self.waited, self._start, self._made = 0.0, 0.0, 0
        self._profile: profile | None = None
        self._done = not (steps and distributed.is_main())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches a batch."""
        start = time.monotonic()
        with record_function("waiting for data"):
            yield
        self.waited += time.monotonic() - start

    def start(self) -> None:
        """At the beginning of an epoch."""
        if self._done or self._profile:
            return
        # Its lines on stderr, start and stop among them, rank above its errors.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        plan = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=self.steps or 0, repeat=1)
        self._profile = profile(activities=activities, schedule=plan)
        self._profile.start()

    def step(self, number: int) -> None:
        """After each training step, the one of this number."""
        if self._done or not self._profile:
            return
        self._made += 1
        if self._made == WARM_UP_STEPS + (self.steps or 0):
            self._finish(number)
            return
        self._profile.step()
        if self._made == WARM_UP_STEPS:
            self._synchronize()
            self._start, self.waited = time.monotonic(), 0.0

    def end(self, number: int) -> None:
        """At the end of an epoch, after the step of this number."""
        if not self._done and self._made > WARM_UP_STEPS:
            self._finish(number)

    def _finish(self, last: int) -> None:
        assert self._profile
        self._synchronize()
        seconds, steps = time.monotonic() - self._start, self._made - WARM_UP_STEPS
        self._profile.stop()
        self._done = True
        path = self.folder / f"steps_{last - steps + 1}_to_{last}.pt.trace.json.gz"
        with atomic_path(path) as temporary:
            self._profile.export_chrome_trace(str(temporary))
        on_gpu = self.device.type == "cuda"
        rows = operators(self._profile.key_averages(), on_gpu, seconds, steps)
        asked = f" ({self.steps} were asked for; the epoch was over)" if steps < (self.steps or 0) else ""
        log(
            f"profile of {steps} steps{asked}: {seconds / steps:.3f} s a step, of which "
            f"{self.waited / seconds:.1%} waiting for data; trace: {path}\n{table(rows, on_gpu)}",
            event="profile",
            steps=steps,
            seconds_per_step=seconds / steps,
            data_wait_share=self.waited / seconds,
            trace=path,
            operators=[row._asdict() for row in rows[:ROWS]],
        )
        self._profile = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def operators(averages: Any, on_gpu: bool, seconds: float, steps: int) -> list[Row]:
    """Operators by their own time on the device, longest first; shares are of `seconds`, in which `steps` were made."""

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    # A kernel's time also stands with the operator that started it, whose name says more.
    called = [event for event in averages if event.device_type == DeviceType.CPU and not event.is_user_annotation]
    rows = [
        Row(event.key.removeprefix("aten::"), own(event) / seconds, 1e3 * own(event) / steps, event.count / steps)
        for event in called
        if own(event) > 0
    ]
    return sorted(rows, key=lambda row: -row.share)


def table(rows: list[Row], on_gpu: bool) -> str:
    """The longest operators, the others together, and the time in which none of them ran."""
    shown, others = rows[:ROWS], rows[ROWS:]
    if others:
        name = f"{len(others)} other operators"
        shown = [*shown, Row(name, *(sum(column) for column in zip(*(row[1:] for row in others), strict=True)))]
    if on_gpu and not rows:
        return "the profiler has seen nothing of the GPU; KINETO_LOG_LEVEL=0 in the environment lets it say why"
    lines = [f"{row.share:6.1%} {row.milliseconds:10.2f} {row.calls:10.1f}  {row.name}" for row in shown]
    idle = max(0.0, 1 - sum(row.share for row in rows))
    rest = "GPU idle" if on_gpu else "Python between the operators, and waiting"
    head = f"{'share':>6} {'ms/step':>10} {'calls/step':>10}  operator"
    return "\n".join([head, *lines, f"{idle:6.1%} {'':10} {'':10}  {rest}"])
