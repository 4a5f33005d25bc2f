"""Are samples copies of training volumes? Nearest neighbours, judged against those of real volumes never trained on.

A published 3-D latent diffusion model repeated 37 % of its training volumes (Dar et al. 2024). A distance alone says
nothing: what counts is whether samples lie closer to the training set than unseen real volumes do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ldm3d.errors import DataError
from ldm3d.metrics import LOWER, Metric, make_metric

# Finer grids are averaged down to at most this many voxels a side: a copy with other noise is still a copy.
LARGEST_SIDE = 64
SMOOTHING_VOXELS = 1.0
# Where the mean training volume is brighter than this share of its own maximum, there is brain in it.
BRAIN_SHARE = 0.2
HOW = (
    "1 - Pearson correlation inside the training set's mean brain, grids averaged to at most "
    f"{LARGEST_SIDE} voxels a side, Gaussian sigma {SMOOTHING_VOXELS:g}; samples are also tried mirrored left to right"
)


@dataclass(frozen=True)
class Nearest:
    """The training volume closest to one volume.

    Args:
        index: number of the training volume.
        distance: 0 is the same image (up to brightness and contrast), 1 is unrelated.
        mirrored: whether the volume is closer when mirrored left to right.
    """

    index: int
    distance: float
    mirrored: bool


class TrainingSet:
    """Training volumes, kept small, to find the nearest in.

    Args:
        volumes: (X, Y, Z) each in RAS, [0, 1]; may be a generator, of which one volume at a time is in memory.

    Raises:
        DataError: there are none, or they are all empty.
    """

    def __init__(self, volumes: Iterable[np.ndarray]):
        small = [_small(volume) for volume in volumes]
        if not small:
            raise DataError("the copy check needs the training volumes; there are none")
        mean = np.mean(small, axis=0)
        self._brain = mean > BRAIN_SHARE * mean.max()
        if not self._brain.any():
            raise DataError("the copy check found no brain: all training volumes are empty")
        self._rows = np.stack([_unit(volume[self._brain]) for volume in small])

    def nearest(self, volume: np.ndarray) -> Nearest:
        """The closest training volume to one of the same grid (X, Y, Z)."""
        small = _small(volume)
        if small.shape != self._brain.shape:
            raise DataError(f"a volume of shape {np.shape(volume)} is not on the grid of the training volumes")
        both = np.stack([_unit(small[self._brain]), _unit(small[::-1][self._brain])])
        distances = 1 - both @ self._rows.T
        mirrored, index = np.unravel_index(distances.argmin(), distances.shape)
        return Nearest(int(index), float(distances[mirrored, index]), bool(mirrored))


def _small(volume: np.ndarray) -> np.ndarray:
    volume = np.asarray(volume, dtype=np.float32)
    factor = -(-max(volume.shape) // LARGEST_SIDE)
    if factor > 1:
        image = torch.as_tensor(volume)[None, None]
        volume = F.avg_pool3d(image, factor, ceil_mode=True, count_include_pad=False)[0, 0].numpy()
    return ndimage.gaussian_filter(volume, SMOOTHING_VOXELS)


def _unit(values: np.ndarray) -> np.ndarray:
    """Centred and of norm 1, so that a dot product is a correlation; zeros for a constant."""
    centred = values - values.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-12)


def copy_check(
    training: TrainingSet,
    training_names: Sequence[str],
    synthetic: Iterable[np.ndarray],
    synthetic_names: Sequence[str],
    held_out: Iterable[np.ndarray],
) -> tuple[Metric, list[dict[str, Any]]]:
    """How many samples lie closer to the training set than held-out real volumes do.

    Args:
        training: the training set.
        training_names: names of its cases.
        synthetic: samples on the same grid.
        synthetic_names: their names.
        held_out: real volumes that were not trained on; without any there is nothing to judge by.

    Returns:
        The metric, whose value is the share of samples closer than the 5th percentile of the held-out volumes (by chance
        0.05), and for each sample its name, nearest case, distance, whether mirrored, and whether it is closer than
        every held-out volume.

    Raises:
        DataError: there is no held-out volume, or a grid differs.
    """
    real = np.array([training.nearest(volume).distance for volume in held_out])
    if not real.size:
        raise DataError("the copy check needs held-out real volumes to compare with; the validation split is empty")
    found = [training.nearest(volume) for volume in synthetic]
    distances = np.array([nearest.distance for nearest in found])
    first, fifth, median = np.percentile(real, (1, 5, 50))
    samples = [
        {
            "sample": name,
            "nearest": training_names[nearest.index],
            "distance": nearest.distance,
            "mirrored": nearest.mirrored,
            "closer_than_all_real": nearest.distance < real.min(),
        }
        for name, nearest in zip(synthetic_names, found, strict=True)
    ]
    references = {
        "closer_than_real_min": int((distances < real.min()).sum()),
        "closer_than_real_1st_percentile": int((distances < first).sum()),
        "closer_than_real_5th_percentile": int((distances < fifth).sum()),
        "real_min": float(real.min()),
        "real_1st_percentile": float(first),
        "real_5th_percentile": float(fifth),
        "real_median": float(median),
        "synthetic_min": float(distances.min()),
        "synthetic_median": float(np.median(distances)),
    }
    n = {"training": len(training_names), "held_out": real.size, "synthetic": len(found)}
    how = f"share of samples nearer to a training volume than the 5th percentile of held-out real volumes; {HOW}"
    return make_metric((distances < fifth).mean(), f"{LOWER}; 0.05 by chance", n, how, references), samples
