"""The weights that a worker holds in memory, within its budget."""

import gc
from pathlib import Path

import torch

from ldm3d.allocator import free_bytes, freed_memory_returned
from ldm3d.console import log
from ldm3d.decoding import GIB, RESERVE
from ldm3d.errors import WeightsError
from ldm3d.sampling import Sampler, VolumeId
from ldm3d.sampling_memory import sampling_peak
from mlops.api import metrics


class Models:
    """Samplers by the digest of their weights.

    Args:
        folder: of stored weights.
        device: where to compute.
        max_batch: volumes at once, at most.
        memory_gib: for sampling and decoding; None for what is free when weights are loaded.
    """

    def __init__(self, folder: Path, device: torch.device, max_batch: int, memory_gib: float | None):
        self.folder, self.device = folder, device
        self.max_batch, self.memory_gib = max_batch, memory_gib
        self._samplers: dict[str, tuple[Sampler, int]] = {}

    @property
    def loaded(self) -> list[str]:
        return list(self._samplers)

    def get(self, digest: str) -> tuple[Sampler, int]:
        """The sampler of a version, and how many volumes it may make at once.

        Raises:
            WeightsError: the weights are gone or damaged, or not even one volume fits into the memory.
        """
        if digest not in self._samplers:
            self._samplers[digest] = self._load(digest)
            metrics.MODELS_LOADED.set(len(self._samplers))
        return self._samplers[digest]

    def _load(self, digest: str) -> tuple[Sampler, int]:
        sampler = Sampler.from_folder(self.folder / digest, self.device)
        free = free_bytes(self.device)
        budget = int(self.memory_gib * GIB) if self.memory_gib else free
        # Decided once: how a volume is decoded must not depend on what is free at the moment, as its values do.
        sampler.decode_bytes = budget
        batch = self.max_batch
        if budget is not None:
            while batch and sampling_peak(sampler, batch) * RESERVE > budget:
                batch -= 1
            if not batch:
                needed = sampling_peak(sampler, 1) * RESERVE / GIB
                raise WeightsError(f"one volume of these needs {needed:.2g} GiB, and there are {budget / GIB:.2g}")
        log(f"weights {digest[:12]} loaded on {self.device}; {batch} volumes at once")
        return sampler, batch

    def try_out(self, digest: str) -> None:
        """Make one volume in one step, so that weights that cannot be used never answer a request.

        Raises:
            UserError: they cannot be loaded, or make something that is not a volume.
        """
        sampler, _ = self.get(digest)
        steps = None if sampler.card.schedule.type == "ddpm" else 1
        values = sampler.sample_volumes([VolumeId(0, 0)], steps=steps)
        if not torch.isfinite(values).all():
            raise WeightsError(f"weights {digest[:12]} make NaN or infinity")
        if float(values.max()) == float(values.min()):
            raise WeightsError(f"weights {digest[:12]} make an empty volume")

    def keep(self, digests: set[str]) -> None:
        """Let go of all versions but these."""
        for digest in set(self._samplers) - digests:
            self._let_go(digest)

    def rest(self) -> None:
        """Give the device back: the next job loads its weights again."""
        self.keep(set())

    def _let_go(self, digest: str) -> None:
        del self._samplers[digest]
        metrics.MODELS_LOADED.set(len(self._samplers))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with freed_memory_returned():
            log(f"weights {digest[:12]} let go")
