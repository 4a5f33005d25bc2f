"""Where a training stands, and what it says and stores at the end of an epoch."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ldm3d import distributed
from ldm3d.console import log, shows_bars
from ldm3d.tracking import Tracker

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

# Logged beside the loss, but no part of it.
NO_TERMS = ("gradient_norm", "discriminator", "loss")
# How often the bar's figures are made: reading the loss waits for a GPU.
SECONDS_BETWEEN_LOOKS = 1.0
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


@dataclass
class Position:
    """Place in the training; with the stage's own state it is all that a resumed run needs.

    Args:
        epoch: epochs finished.
        step: optimizer steps made since the start.
        best: smallest validation loss so far.
    """

    epoch: int = 0
    step: int = 0
    best: float = float("inf")

    def state(self, stage: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
        return {**asdict(self), "stage": stage, "fingerprint": fingerprint}


class EpochLog:
    """One epoch as it is watched: bar, averages, speed, memory; none of it waits for the device at every step.

    Args:
        position: where the epoch begins, or where a resumed run goes on in it.
        epochs: of the whole training.
        steps: of a whole epoch.
        device: whose memory is told.
        tracker: gets the averages; its profiler is told of each step.

    Attributes:
        first: steps of this epoch that were made before, by the run that is resumed.
    """

    def __init__(self, position: Position, epochs: int, steps: int, device: torch.device, tracker: Tracker):
        self.epoch, self.epochs, self.steps = position.epoch + 1, epochs, steps
        self.device, self.tracker = device, tracker
        self.first = position.step - position.epoch * steps
        self.step = position.step
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.volumes, self.made, self.waited, self.seconds = 0, 0, 0.0, 0.0
        self.start = time.monotonic()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The rest of the epoch's batches, with a bar in a terminal."""
        bar = tqdm(
            desc=f"epoch {self.epoch}/{self.epochs}:",
            total=self.steps,
            initial=self.first,
            bar_format=BAR,
            dynamic_ncols=True,
            leave=False,
            disable=not shows_bars(),
        )
        looked = self.start
        self.tracker.profiler.start()
        source = iter(batches)
        try:
            while True:
                with self.waiting():
                    batch = next(source, None)
                if batch is None:
                    break
                yield batch
                self.seconds = time.monotonic() - self.start
                self.tracker.profiler.step(self.step)
                bar.update()
                if not bar.disable and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                    looked = time.monotonic()
                    bar.set_postfix_str(self._figures())
        finally:  # also where the loop over the batches is left
            self.seconds = time.monotonic() - self.start
            bar.close()
            self.tracker.profiler.end(self.step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches a batch and is not done by `watch`."""
        start = time.monotonic()
        with self.tracker.profiler.waiting():
            yield
        self.waited += time.monotonic() - start

    def add(self, values: Mapping[str, Tensor], volumes: int) -> None:
        """What one step returned, made with so many volumes on all processes together."""
        self.volumes += volumes
        self.made += 1
        self.step += 1
        for name, value in values.items():
            # In 32 bits a sum of 100,000 values is off in the fourth digit.
            self.sums[name] = self.sums.get(name, 0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + 1

    def averages(self) -> dict[str, float]:
        """Mean of each value over the steps that had it; reading them waits for the device."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def terms(self) -> dict[str, float]:
        """Averages of the loss's terms; none where the loss is one thing."""
        return {name: value for name, value in self.averages().items() if name not in NO_TERMS}

    def loss(self) -> float:
        return self.averages()["loss"] if "loss" in self.sums else sum(self.terms().values())

    def shares(self) -> dict[str, float]:
        """Share of each term in the loss, by name; they sum to 1."""
        terms = self.terms()
        total = sum(abs(value) for value in terms.values()) or 1.0
        return {name: abs(value) / total for name, value in terms.items()}

    def performance(self) -> dict[str, float]:
        """Speed of the training steps alone, share of their time that went into waiting for data, memory."""
        seconds = max(self.seconds, 1e-9)
        return {
            "volumes_per_second": self.volumes / seconds,
            "data_wait_share": self.waited / seconds,
            **peak_memory(self.device),
        }

    def report(self, validation: Mapping[str, float], learning_rate: float) -> None:
        """One line on stderr: epoch, loss, shares of its terms, validation, speed, memory, time left; and events."""
        if not self.volumes:  # stopped between an epoch's last step and its end, resumed here
            return
        self._sum_over_processes()
        averages, shares, loss, performance = self.averages(), self.shares(), self.loss(), self.performance()
        seconds_left = self._seconds_of_epoch() * (self.epochs - self.epoch)
        log(
            f"epoch {self.epoch}/{self.epochs}: loss {loss:.4f}"
            + (f" ({', '.join(f'{name} {share:.0%}' for name, share in shares.items())})" if shares else "")
            + (f"; validation {rounded(_without_levels(validation))}" if validation else "")
            + f"; {_speed_and_memory(performance)}, {_duration(seconds_left)} left",
            event="epoch",
            epoch=self.epoch,
            epochs=self.epochs,
            step=self.step,
            volumes_seen=self.step * self.volumes // self.made,
            loss=loss,
            terms=self.terms(),
            **{name: averages[name] for name in ("gradient_norm", "discriminator") if name in averages},
            learning_rate=learning_rate,
            validation=dict(validation),
            **performance,
            seconds_left=seconds_left,
        )
        self.tracker.scalars("train", averages | {"loss": loss, "learning_rate": learning_rate}, self.step)
        self.tracker.scalars("share", shares, self.step)
        self.tracker.scalars("performance", performance, self.step)

    def _sum_over_processes(self) -> None:
        """Let the averages be those of all volumes; each process has made as many steps of as many volumes."""
        if distributed.world_size() == 1:
            return
        sums = torch.stack([total.detach().double().cpu() for total in self.sums.values()])
        means = distributed.all_sum(sums) / distributed.world_size()
        self.sums = dict(zip(self.sums, means.unbind(), strict=True))

    def _seconds_of_epoch(self) -> float:
        """A whole epoch's steps at this one's pace, and what comes after them."""
        return self.seconds / self.made * self.steps + time.monotonic() - self.start - self.seconds

    def _figures(self) -> str:
        """What the bar says behind itself; time left is that of the whole training, without validation."""
        steps_left = self.steps * (self.epochs - self.epoch + 1) - self.first - self.made
        left = _duration(self.seconds / self.made * steps_left)
        return f"loss {self.loss():.4f}, {_speed_and_memory(self.performance())}, {left} left"


def peak_memory(device: torch.device) -> dict[str, float]:
    """`peak_gib`: most memory so far of the GPU's tensors, or of this process on a CPU; nothing where it is unknown."""
    if device.type == "cuda":
        return {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def rounded(values: Mapping[str, Tensor] | Mapping[str, float]) -> str:
    """`name value, name value`, to four digits."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())


def _without_levels(validation: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in validation.items() if "level" not in name}


def _speed_and_memory(performance: Mapping[str, float]) -> str:
    memory = f", {performance['peak_gib']:.2f} GiB" if "peak_gib" in performance else ""
    return f"{performance['volumes_per_second']:.1f} volumes/s{memory}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
