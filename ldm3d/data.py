"""From prepared volumes to batches. What an epoch holds is a function of (seed, epoch, position) alone."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm3d import distributed
from ldm3d.cache import VolumeCache, to_float
from ldm3d.cases import CHANNELS, Case, cache_folder, find_cases
from ldm3d.console import log
from ldm3d.errors import ConfigError, UserError
from ldm3d.schema import Config, Environment
from ldm3d.sections import Optimization
from ldm3d.splits import Split, split_cases
from ldm3d.volumes import crop_or_pad, padded_size

T = TypeVar("T")
# A socket's path has at most 103 characters (macOS; Linux: 107), of which Python's own part takes 32.
LONGEST_TEMPORARY_PATH = 70
Stage = Literal["autoencoder", "diffusion"]
Key = tuple[int, int]
"""Epoch, and visit: the number of a volume, counted on past the last one where volumes are visited again."""


@dataclass(frozen=True)
class Prepared:
    """The data set, ready to be read: which cases are on which side, and their prepared volumes."""

    split: Split
    cache: VolumeCache

    def digest(self, cases: Sequence[Case] | None = None) -> str:
        """Digest of cases (the training cases) as prepared: contents and settings, 16 hexadecimal digits."""
        keys = sorted(self.cache.key(case) for case in (self.split.train if cases is None else cases))
        return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


def prepare_data(cfg: Config, env: Environment, remember_split: bool = True) -> Prepared:
    """Find, check, prepare and split the data set; all ranks call this together.

    The split is kept in `model_dir/split.json`, so that no stage ever trains on what another validates with. Who trains
    nothing keeps to it and leaves `remember_split` off: what was not trained on has no side in that folder, and a dry
    run with another `val_fraction` than the training's decides nothing for it.

    Raises:
        DataError: no data, damaged cases, too few cases; on every rank.
        OutputError: the cache or `model_dir` cannot be written to; on every rank.
    """
    cases = on_main(lambda: find_cases(env.data_base_dir, cfg.data, cfg.channel))
    cache = VolumeCache(cache_folder(env.data_base_dir, cfg.data), cfg.spacing)
    cases = cache.build(cases, cfg.data.on_error)
    store = env.model_dir / "split.json"
    split = on_main(lambda: split_cases(cases, cfg.data.val_fraction, cfg.data.split_seed, store, remember_split))
    log(
        f"{env.data_base_dir}: {len(cases)} cases of {CHANNELS[cfg.channel]}, "
        f"{len(split.train)} to train on, {len(split.validation)} to validate with"
    )
    return Prepared(split, cache)


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and hand its result, or its `UserError`, to every rank."""
    outcome: T | UserError | None = None
    if distributed.is_main():
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = distributed.broadcast_object(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return cast(T, outcome)


class PatchDataset(Dataset[dict[str, Any]]):
    """Boxes of one size, cut at random or out of the middle; volumes that are smaller are padded with zeros.

    Args:
        cache: prepared volumes.
        cases: which of them.
        size: voxels a side (3).
        seed: seed of crops and flips.
        random_crop: cut at a random place, else out of the middle.
        flip: mirror left and right in one half of the visits.
    """

    def __init__(
        self,
        cache: VolumeCache,
        cases: Sequence[Case],
        size: Sequence[int],
        seed: int = 0,
        random_crop: bool = False,
        flip: bool = False,
    ):
        self.cache, self.cases, self.size = cache, tuple(cases), tuple(size)
        self.seed, self.random_crop, self.flip = seed, random_crop, flip

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        """`{"image": (1, X, Y, Z) float32 in [0, 1], "case": name}` of an epoch's visit (a mere number: epoch 0)."""
        epoch, visit = key if isinstance(key, tuple) else (0, key)
        case = self.cases[visit % len(self.cases)]
        volume = self.cache.get(case)
        # NumPy takes (1, 2) and (1, 2, 0) for the same seed, and (seed, epoch) is the order's.
        random = np.random.default_rng((self.seed, epoch, visit + 1))
        # Drawn in any case, so that one setting does not change what the other draws.
        mirrored = random.random() < 0.5 and self.flip
        room = np.maximum(0, np.subtract(volume.shape, self.size))
        start = random.integers(0, room, endpoint=True).tolist() if self.random_crop else None
        box = crop_or_pad(volume, self.size, start)
        return _item(box[::-1] if mirrored else box, case)


class WholeVolumes(Dataset[dict[str, Any]]):
    """Whole volumes, padded with zeros on both sides until `factor` divides them."""

    def __init__(self, cache: VolumeCache, cases: Sequence[Case], factor: int):
        self.cache, self.cases, self.factor = cache, tuple(cases), factor

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"image": (1, X, Y, Z) float32 in [0, 1], "case": name}`."""
        volume = self.cache.get(self.cases[index])
        return _item(crop_or_pad(volume, padded_size(volume.shape, self.factor)), self.cases[index])


def _item(voxels: np.ndarray, case: Case) -> dict[str, Any]:
    return {"image": torch.from_numpy(to_float(voxels))[None], "case": case.name}


class EpochSampler(Sampler[list[Key]]):
    """Batches of one rank: a new order in each epoch, the same number of batches on every rank.

    An epoch goes through a permutation of the volumes, `batch_size` of them on each rank at each step, until too few
    are left for all ranks. Only where there are too few for a single step are volumes visited again to fill it.

    Args:
        num_volumes: size of the training set.
        batch_size: volumes of one step on each rank.
        seed: seed of the order.
        rank: which share; this process's by default.
        ranks: number of shares; the number of processes by default.
    """

    def __init__(self, num_volumes: int, batch_size: int, seed: int, rank: int | None = None, ranks: int | None = None):
        self.num_volumes, self.batch_size, self.seed = num_volumes, batch_size, seed
        self.rank = distributed.rank() if rank is None else rank
        self.ranks = distributed.world_size() if ranks is None else ranks
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that is iterated next, and the step at which it begins."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return max(1, self.num_volumes // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_volumes)
        for step in range(self.start, len(self)):
            first = (step * self.ranks + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            n = self.num_volumes
            yield [(self.epoch, int(order[place % n]) + place // n * n) for place in places]


def train_loader(prepared: Prepared, cfg: Config, stage: Stage) -> "DataLoader[dict[str, Any]]":
    """Batches `{"image": (B, 1, X, Y, Z) float32 in [0, 1], "case": [name, ...]}` of this rank.

    Stage 1 cuts at random, stage 2 out of the middle. Before each epoch call
    `loader.batch_sampler.set_epoch(epoch, start)`.

    Raises:
        ConfigError: the temporary folder's path is too long for the sockets of the processes that load.
    """
    train: Optimization = cfg.autoencoder_train if stage == "autoencoder" else cfg.diffusion_train
    cases = prepared.split.train
    dataset = PatchDataset(
        prepared.cache, cases, train.patch_size, cfg.seed, random_crop=stage == "autoencoder", flip=train.flip
    )
    workers = cfg.data.num_workers
    _require_short_sockets(workers)
    return DataLoader(
        dataset,
        batch_sampler=EpochSampler(len(cases), train.batch_size * train.accumulate_steps, cfg.seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # A loader without its own generator draws from torch's global one, and resume would not be exact.
        generator=torch.Generator(),
    )


def _require_short_sockets(workers: int) -> None:
    """Refuse what would make the loaders' processes hang: Python does not say that its sockets cannot be made."""
    folder = tempfile.gettempdir()
    if workers and len(folder) > LONGEST_TEMPORARY_PATH:
        raise ConfigError(
            f"TMPDIR {folder}: processes that load data need sockets there, whose paths must be short; "
            f"use one of at most {LONGEST_TEMPORARY_PATH} characters, or data.num_workers=0"
        )


def validation_loader(prepared: Prepared, cfg: Config, stage: Stage) -> "DataLoader[dict[str, Any]]":
    """One volume at a time, each on exactly one rank, the same in every run.

    Batches are `{"image": (1, 1, X, Y, Z) float32 in [0, 1], "case": [name]}`.

    Stage 1: whole volumes padded to a multiple of the autoencoder's factor, or the middle `val_patch_size`.
    Stage 2: the middle `patch_size`. With fewer volumes than ranks some ranks get none.
    """
    cases = prepared.split.validation[distributed.rank() :: distributed.world_size()]
    size = cfg.autoencoder_train.val_patch_size if stage == "autoencoder" else cfg.diffusion_train.patch_size
    dataset: Dataset[dict[str, Any]]
    if size is None:
        dataset = WholeVolumes(prepared.cache, cases, cfg.autoencoder_def.downsampling)
    else:
        dataset = PatchDataset(prepared.cache, cases, size)
    return DataLoader(dataset, batch_size=1, pin_memory=torch.cuda.is_available(), generator=torch.Generator())
