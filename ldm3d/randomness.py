"""Random numbers of a training step: each volume's own, whatever was drawn before and whoever computes it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm3d import distributed


class StepRandom:
    """What the volumes of one step draw: a function of (seed, step, place in the batch of all processes together).

    So a resumed run draws what the undisturbed one would have drawn, without any random state being stored; and two
    processes with one half of a batch each draw what one process draws for the whole of it.

    Making one also seeds torch's global state, by (seed, step, rank), for libraries that draw from it.

    Args:
        seed: of the training.
        step: number of the optimizer step.
        count: volumes of this process in this step.
        device: where numbers are drawn; a GPU draws others than a CPU.
        rank: whose share of the batch; this process's by default.
    """

    def __init__(self, seed: int, step: int, count: int, device: torch.device, rank: int | None = None):
        self.seed, self.step, self.rank = seed, step, distributed.rank() if rank is None else rank
        states = [
            np.random.SeedSequence((seed, step, self.rank * count + place)).generate_state(2, np.uint64).tolist()
            for place in range(count)
        ]
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(state >> 1) for state, _ in states]
        self.coins = [bool(state & 1) for _, state in states]
        """One fair coin for each volume, known without waiting for the device."""
        torch.manual_seed(((seed * 1_000_003 + step) * 4_099 + self.rank) % 2**63)

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal (B, *shape)."""
        return self._each(lambda generator: torch.randn(tuple(shape), generator=generator, device=self.device))

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""
        return self._each(lambda generator: torch.rand((), generator=generator, device=self.device))

    def integers(self, high: int) -> Tensor:
        """(B,) in 0 .. high - 1."""
        return self._each(lambda generator: torch.randint(high, (), generator=generator, device=self.device))

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self.generators])
