"""The latent cache: every training volume is encoded once, then read from a memory map.

    CACHE/latents-KEY/posteriors.npy   mean and standard deviation of each volume's posterior
                      encoded.jsonl    while it is filled: the volumes that are there already
                      index.json       their names, written last: the entry is whole
                      moments.npy      mean and mean square of each latent voxel, once a training has asked for them

Kept are mean and standard deviation of the posterior, never one fixed sample of it: a network that sees the same
sample in every epoch learns its noise by heart.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from ldm3d import distributed
from ldm3d.console import log, progress
from ldm3d.encoding import EncodedVolumes, begin, encode_in_rounds
from ldm3d.errors import LatentsError, OutputError, WeightsError
from ldm3d.files import atomic_path, write_text
from ldm3d.lock import only_writer
from ldm3d.randomness import StepRandom
from ldm3d.training import value_range

CACHE_VERSION = 1
MOMENTS = "moments.npy"
Volumes = Dataset[dict[str, object]]


@dataclass(frozen=True)
class LatentStatistics:
    """Of all training latents: what brings them to zero mean (where centred) and unit spread.

    Args:
        mean: (C, X, Y, Z) to subtract, or zeros (1, 1, 1, 1).
        scale_factor: to multiply by afterwards, 1 / standard deviation (Rombach et al. 2022, section G).
    """

    mean: Tensor
    scale_factor: float

    def normalise(self, latent: Tensor) -> Tensor:
        """(B, C, X, Y, Z) from the autoencoder -> what diffusion works on."""
        return (latent - self.mean.to(latent.device)) * self.scale_factor

    def restore(self, latent: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return latent / self.scale_factor + self.mean.to(latent.device)


class LatentCache:
    """Posterior mean and standard deviation of every training volume, float16, on disk.

    Args:
        folder: an entry made by `build_latent_cache`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.posteriors: np.memmap = np.load(folder / "posteriors.npy", mmap_mode="r")
        self.cases: list[str] = json.loads((folder / "index.json").read_text())["cases"]

    def __len__(self) -> int:
        return len(self.posteriors)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, X, Y, Z)."""
        return self.posteriors.shape[-4:]

    def sample(self, indices: Sequence[int], random: StepRandom, flip: bool = False) -> Tensor:
        """Draw fresh latents (B, C, X, Y, Z), float32, where `random` draws.

        Args:
            indices: volumes, by position in the cache.
            random: of the training step.
            flip: mirror left and right at random, if the mirrored volumes were encoded too.
        """
        sides = random.coins if flip and self.posteriors.shape[1] > 1 else [0] * len(indices)
        picked = np.stack([self.posteriors[i, int(side)] for i, side in zip(indices, sides, strict=True)])
        mean, sigma = torch.from_numpy(picked).to(random.device).float().unbind(1)
        return mean + sigma * random.normal(self.latent_shape)

    def mean(self, index: int, device: torch.device) -> Tensor:
        """Posterior mean of one volume, (1, C, X, Y, Z), float32."""
        return torch.from_numpy(self.posteriors[index, 0, :1].astype(np.float32)).to(device)

    def statistics(self, centre: bool) -> LatentStatistics:
        """Mean and spread over the whole training set; all ranks call this together.

        Args:
            centre: subtract the mean of each latent voxel, for data that lie in one template space.

        Raises:
            WeightsError: the latents are not finite, or all alike: nothing can be learned of them.
        """
        voxel_mean, voxel_square = self._moments()
        if centre:
            variance = (voxel_square - voxel_mean.square()).mean()
        else:
            variance = voxel_square.mean() - voxel_mean.mean().square()
        if not 0 < variance < torch.inf:
            raise WeightsError(
                f"{self.posteriors.filename}: the latents have variance {variance:.4g}, of which nothing can be "
                "learned: train the autoencoder again, or remove this file if it was; see docs/NaN_FIX_GUIDE.md"
            )
        mean = voxel_mean.float() if centre else torch.zeros(1, 1, 1, 1)
        return LatentStatistics(mean, float(variance.rsqrt()))

    def _moments(self) -> Tensor:
        """Mean and mean square of each latent voxel (2, C, X, Y, Z), float64, kept once they are known.

        To find them the whole cache is read, each process its share: hundreds of gigabytes where there are 100,000
        volumes, which a later start need not read again.
        """
        path = self.folder / MOMENTS
        kept = distributed.broadcast_object(_read_moments(path, self.latent_shape) if distributed.is_main() else None)
        if kept is not None:
            return torch.from_numpy(kept)
        total = torch.zeros(2, *self.latent_shape, dtype=torch.float64)
        count = torch.zeros(1, dtype=torch.float64)
        for i in range(distributed.rank(), len(self), distributed.world_size()):
            mean, sigma = torch.from_numpy(self.posteriors[i].astype(np.float64)).unbind(1)
            total[0] += mean.sum(0)
            total[1] += (mean.square() + sigma.square()).sum(0)
            count += len(mean)
        moments = distributed.all_sum(total) / distributed.all_sum(count)
        if distributed.is_main():
            _keep_moments(path, moments.numpy())
        return moments


def _read_moments(path: Path, latent_shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        moments = np.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        log(f"{path}: is damaged; computed anew")
        return None
    return moments if (moments.shape, moments.dtype) == ((2, *latent_shape), np.float64) else None


def _keep_moments(path: Path, moments: np.ndarray) -> None:
    try:
        with atomic_path(path) as temporary:
            np.save(temporary, moments)
    except OutputError as error:
        # Only a later start becomes slower by this.
        log(f"warning: {error}")


def build_latent_cache(
    root: Path,
    autoencoder: AutoencoderKL,
    autoencoder_sha256: str,
    volumes: Volumes,
    contents: Sequence[str],
    flip: bool,
    device: torch.device,
) -> LatentCache:
    """Encode what has not been encoded yet, all processes together, each its share; killed, it goes on where it was.

    Args:
        root: folder of all cache entries.
        autoencoder: in evaluation mode, on `device`.
        autoencoder_sha256: digest of its weights; other weights make another entry.
        volumes: `volumes[i]["image"]` is (1, X, Y, Z) in [0, 1], `volumes[i]["case"]` its name.
        contents: digest of each volume's content and preparation.
        flip: encode the mirrored volumes too.
        device: where to encode.

    Raises:
        OutputError: the cache cannot be written, or another training is encoding the same.
        LatentsError: a volume's latents are not finite, or too large for float16.
    """
    image_shape = list(volumes[0]["image"].shape)  # type: ignore[attr-defined]
    key = json.dumps([CACHE_VERSION, autoencoder_sha256, list(contents), flip, image_shape])
    digest = hashlib.sha256(key.encode()).hexdigest()
    folder = root / f"latents-{digest[:16]}"
    if not _is_whole(folder):
        with only_writer(folder, "encoding these latents", "start again when it has: they serve both"):
            # Another training may have finished them before this one got the lock.
            if not _is_whole(folder):
                _encode_all(folder, digest, autoencoder, volumes, len(contents), flip, device)
                log(f"latents of {len(contents)} volumes are in {folder}")
    return LatentCache(folder)


def _is_whole(folder: Path) -> bool:
    return distributed.broadcast_object((folder / "index.json").is_file())


def _encode_all(
    folder: Path, key: str, autoencoder: AutoencoderKL, volumes: Volumes, count: int, flip: bool, device: torch.device
) -> None:
    """Fill one file together; its index, written last, says that it is whole.

    Each process writes what it has encoded for some seconds, and flushes it to the disk. Then they meet, and rank 0
    notes which volumes are there, so that a run that was killed goes on with the others, in any number of processes.
    """
    path = folder / "posteriors.npy"
    journal = EncodedVolumes(folder / "encoded.jsonl", key)
    if distributed.is_main():
        first, _ = _encode(autoencoder, volumes, 0, flip, device)
        begin(path, journal, (count, *first.shape))
        if not journal.cases:
            (folder / MOMENTS).unlink(missing_ok=True)
    cases: dict[int, str] = distributed.broadcast_object(journal.cases)
    rest = [i for i in range(count) if i not in cases]
    if cases:
        log(f"{folder}: {len(cases)} of {count} volumes have been encoded before; going on with the others")
    share = progress(rest[distributed.rank() :: distributed.world_size()], "encoding", unit="volume")
    rounds = encode_in_rounds(path, share, lambda i: _encode(autoencoder, volumes, i, flip, device))
    for encoded in rounds:
        gathered = distributed.gather_objects(encoded)
        if not any(gathered):
            break
        if distributed.is_main():
            journal.add({i: name for part in gathered for i, name in part.items()})
    if distributed.is_main():
        write_text(folder / "index.json", json.dumps({"cases": [journal.cases[i] for i in range(count)]}))
        journal.path.unlink()
    distributed.barrier()


@torch.inference_mode()
def _encode(
    autoencoder: AutoencoderKL, volumes: Volumes, index: int, flip: bool, device: torch.device
) -> tuple[np.ndarray, str]:
    """Posterior (V, 2, C, X, Y, Z) of a volume and, where wanted, of its mirror image: V = 1 or 2."""
    item = volumes[index]
    image: Tensor = item["image"]  # type: ignore[assignment]
    views = torch.stack([image, image.flip(1)] if flip else [image]).to(device)
    mean, sigma = autoencoder.encode(views)
    return _as_float16(torch.stack([mean, sigma], dim=1), str(item["case"])), str(item["case"])


def _as_float16(posterior: Tensor, case: str) -> np.ndarray:
    """For the cache; a sigma too small for float16 becomes 0, which only takes that little noise away.

    Raises:
        LatentsError: a value is not finite there.
    """
    stored = posterior.half()
    if not torch.isfinite(stored).all():
        largest = torch.finfo(stored.dtype).max
        raise LatentsError(
            f"{case}: its latents are {value_range(posterior)}; float16, in which they are kept, ends at {largest:g}. "
            "The autoencoder has diverged: train it again; see docs/NaN_FIX_GUIDE.md"
        )
    return stored.cpu().numpy()
