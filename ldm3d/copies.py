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
from ldm3d.metrics import LOWER, Metric, TooFewVolumes, make_metric

# Finer grids are averaged down to at most this many voxels a side: a copy with other noise is still a copy.
LARGEST_SIDE = 64
SMOOTHING_VOXELS = 1.0
# Where the mean training volume is brighter than this share of its own maximum, there is brain in it.
BRAIN_SHARE = 0.2
HOW = (
    "relative distance: 1 - Pearson correlation with the nearest training volume, divided by the median over the other "
    "training volumes; inside the training set's mean brain, grids averaged to at most "
    f"{LARGEST_SIDE} voxels a side, Gaussian sigma {SMOOTHING_VOXELS:g}, also tried mirrored left to right"
)


@dataclass(frozen=True)
class Nearest:
    """The training volume closest to one volume.

    Args:
        index: number of the training volume.
        distance: 0 is the same image (up to brightness and contrast), 1 is unrelated.
        relative: `distance` divided by the median distance to the other training volumes. Blurred or average images
            are close to all volumes, copies to one: this tells them apart (after Carlini et al. 2023, section 4.2).
        mirrored: whether the volume is closer when mirrored left to right.
    """

    index: int
    distance: float
    relative: float
    mirrored: bool


class TrainingSet:
    """Training volumes, kept small, to find the nearest in.

    Args:
        volumes: (X, Y, Z) each in RAS, [0, 1]; may be a generator, of which one volume at a time is in memory.

    Raises:
        TooFewVolumes: there are fewer than two.
        DataError: they are all empty.
    """

    def __init__(self, volumes: Iterable[np.ndarray]):
        small = [_small(volume) for volume in volumes]
        if len(small) < 2:
            raise TooFewVolumes(f"needs 2 training volumes or more; there are {len(small)}")
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
        closest = distances.min(axis=0)
        index = int(closest.argmin())
        others = float(np.median(np.delete(closest, index)))
        distance = max(0.0, float(closest[index]))
        mirrored = bool(distances[1, index] < distances[0, index])
        return Nearest(index, distance, distance / max(others, 1e-6), mirrored)


def _small(volume: np.ndarray) -> np.ndarray:
    volume = np.asarray(volume, dtype=np.float32)
    factor = -(-max(volume.shape) // LARGEST_SIDE)
    if factor > 1:
        image = torch.from_numpy(volume.copy())[None, None]
        volume = F.avg_pool3d(image, factor, ceil_mode=True, count_include_pad=False)[0, 0].numpy()
    smooth: np.ndarray = ndimage.gaussian_filter(volume, SMOOTHING_VOXELS)
    return smooth


def _unit(values: np.ndarray) -> np.ndarray:
    """Centred and of norm 1, so that a dot product is a correlation; zeros for a constant."""
    centred: np.ndarray = values - values.mean()
    centred /= max(float(np.linalg.norm(centred)), 1e-12)
    return centred


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
        The metric, whose value is the share of samples closer (relative distance) than the 5th percentile of held-out
        volumes: 0.05 by chance. And for each sample its name, nearest case, distances, whether mirrored, and whether it
        is closer than every held-out volume.

    Raises:
        TooFewVolumes: there is no held-out volume or no sample.
        DataError: a grid differs.
    """
    real = [training.nearest(volume) for volume in held_out]
    found = [training.nearest(volume) for volume in synthetic]
    if not real or not found:
        raise TooFewVolumes(f"needs samples and held-out real volumes; there are {len(found)} and {len(real)}")
    limits = np.array([nearest.relative for nearest in real])
    relative = np.array([nearest.relative for nearest in found])
    first, fifth = np.percentile(limits, (1, 5))
    samples = [
        {
            "sample": name,
            "nearest": training_names[nearest.index],
            "distance": nearest.distance,
            "relative_distance": nearest.relative,
            "mirrored": nearest.mirrored,
            "closer_than_all_real": bool(nearest.relative < limits.min()),
        }
        for name, nearest in zip(synthetic_names, found, strict=True)
    ]
    references = {
        "closer_than_real_min": int((relative < limits.min()).sum()),
        "closer_than_real_1st_percentile": int((relative < first).sum()),
        "closer_than_real_5th_percentile": int((relative < fifth).sum()),
        "real_min": float(limits.min()),
        "real_1st_percentile": float(first),
        "real_5th_percentile": float(fifth),
        "real_median": float(np.median(limits)),
        "synthetic_min": float(relative.min()),
        "synthetic_median": float(np.median(relative)),
        "real_median_distance": float(np.median([nearest.distance for nearest in real])),
        "synthetic_median_distance": float(np.median([nearest.distance for nearest in found])),
    }
    n = {"training": len(training_names), "held_out": len(real), "synthetic": len(found)}
    how = f"share of samples nearer to a training volume than the 5th percentile of held-out real volumes; {HOW}"
    return make_metric((relative < fifth).mean(), f"{LOWER}; 0.05 by chance", n, how, references), samples
