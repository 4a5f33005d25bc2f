"""Where a training stands, and what it says and stores at the end of an epoch."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm3d.console import log

# Logged beside the loss, but no part of it.
NO_TERMS = ("gradient_norm", "discriminator", "loss")


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
    """Averages of what an epoch's steps returned, without waiting for the device before the epoch's end."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.volumes = 0
        self.start = time.monotonic()

    def add(self, values: Mapping[str, Tensor], volumes: int) -> None:
        self.volumes += volumes
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def averages(self) -> dict[str, float]:
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def shares(self) -> dict[str, float]:
        """Share of each term in the loss, by name; they sum to 1."""
        terms = {name: value for name, value in self.averages().items() if name not in NO_TERMS}
        total = sum(abs(value) for value in terms.values()) or 1.0
        return {name: abs(value) / total for name, value in terms.items()}

    def report(self, epoch: int, epochs: int, loss: float, validation: Mapping[str, float]) -> None:
        """One line on stderr: epoch, loss, shares of its terms, validation, speed, time left."""
        seconds = time.monotonic() - self.start
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        measured = ", ".join(f"{name} {value:.4g}" for name, value in validation.items() if "level" not in name)
        log(
            f"epoch {epoch}/{epochs}: loss {loss:.4f}"
            + (f" ({shares})" if shares else "")
            + (f"; validation {measured}" if measured else "")
            + f"; {self.volumes / seconds:.1f} volumes/s, {_duration(seconds * (epochs - epoch))} left"
        )


def rounded(values: Mapping[str, Tensor] | Mapping[str, float]) -> str:
    """`name value, name value`, to four digits."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
