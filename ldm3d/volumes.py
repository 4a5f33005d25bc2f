"""From a case to a prepared volume: RAS, one voxel size, intensities in [0, 1]."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ldm3d.cases import Case
from ldm3d.checks import examine
from ldm3d.errors import DataError
from ldm3d.nifti import spacing_of

PERCENTILES = (0.0, 99.5)
"""Intensities that become 0 and 1."""
PREPARATION = 1
"""Number of this way of preparing; raise it when a change here gives other voxels, so that caches are made anew."""

SPACING_TOLERANCE_MM = 1e-3
STRIPPED_SHARE = 0.25
"""Share of voxels that are exactly 0 from which on a volume counts as skull-stripped."""
_FWHM = 2.3548  # full width at half maximum of a Gaussian of standard deviation 1


def load_prepared(case: Case, spacing: Sequence[float]) -> np.ndarray:
    """Read, check and prepare one volume.

    Args:
        case: what to read.
        spacing: voxel size in mm (3).

    Returns:
        (X, Y, Z) float32 in [0, 1], RAS.

    Raises:
        DataError: as `examine` does.
    """
    volume, affine = examine(case)
    return scale_intensity(resample(volume, spacing_of(affine), spacing), case.name)


def resample(volume: np.ndarray, old: Sequence[float], new: Sequence[float]) -> np.ndarray:
    """Bring a volume to another voxel size; its middle stays where it is.

    Linear interpolation. An axis that becomes coarser is first smoothed with the Gaussian whose width at half maximum
    is sqrt(new^2 - old^2), which takes the point spread of an old voxel to that of a new one (Cardoso et al. 2015,
    Scale factor point spread function matching, section 2). Neither step can leave the range of the input.

    Args:
        volume: (X, Y, Z).
        old: voxel size now, in mm (3).
        new: voxel size wanted, in mm (3).

    Returns:
        (X', Y', Z') float32 with X' = round(X * old / new), at least 1; the input itself where the sizes agree.
    """
    before, after = np.asarray(old, dtype=float), np.asarray(new, dtype=float)
    if np.abs(before - after).max() < SPACING_TOLERANCE_MM:
        return volume
    shape = np.maximum(1, np.rint(volume.shape * before / after)).astype(int)
    step = after / before
    # Voxel centres are whole numbers, so the middle of n voxels is at (n - 1) / 2.
    start = (np.array(volume.shape) - 1) / 2 - step * (shape - 1) / 2
    sigma = np.sqrt(np.maximum(0, step**2 - 1)) / _FWHM
    smooth = ndimage.gaussian_filter(volume.astype(np.float32, copy=False), sigma, mode="nearest")
    resampled: np.ndarray = ndimage.affine_transform(smooth, step, start, tuple(shape), order=1, mode="nearest")
    return resampled


def scale_intensity(volume: np.ndarray, name: str) -> np.ndarray:
    """Map the whole volume's `PERCENTILES` to 0 and 1, and clip what lies outside.

    This comes before any crop, so that a voxel's value does not depend on what else a crop contains. Where air is
    exactly 0, as in skull-stripped data, negative values are the ringing of somebody's interpolation: they count as 0,
    else the air of these volumes would be grey and that of others black.

    Returns:
        float32 in [0, 1], same shape.

    Raises:
        DataError: both percentiles are the same intensity.
    """
    if np.count_nonzero(volume) < (1 - STRIPPED_SHARE) * volume.size:
        volume = np.maximum(volume, 0)
    low, high = percentiles(volume, PERCENTILES)
    if not high > low:
        raise DataError(f"{name}: is nearly empty: its {PERCENTILES[1]} % percentile is its lowest value, {low:g}")
    scaled: np.ndarray = np.clip((volume - np.float32(low)) / np.float32(high - low), 0, 1, dtype=np.float32)
    return scaled


def percentiles(volume: np.ndarray, percents: Sequence[float]) -> list[float]:
    """The same as `np.percentile`, 5 times faster on whole volumes."""
    places = [(volume.size - 1) * percent / 100 for percent in percents]
    below = [int(place) for place in places]
    above = [min(index + 1, volume.size - 1) for index in below]
    ordered = np.partition(volume, sorted({*below, *above}), axis=None)
    return [
        float(ordered[i] + (place - i) * (ordered[j] - ordered[i]))
        for place, i, j in zip(places, below, above, strict=True)
    ]


def crop_or_pad(volume: np.ndarray, size: Sequence[int], start: Sequence[int] | None = None) -> np.ndarray:
    """Cut a box out of a volume; where the volume is smaller, pad with zeros, half on each side.

    Args:
        volume: (X, Y, Z); of a memory map only the box is read.
        size: voxels a side (3).
        start: first voxel on each axis, where the volume is larger than `size`; the middle if None.

    Returns:
        (*size), same type, never a view of the volume.
    """
    box = np.zeros(tuple(size), dtype=volume.dtype)
    source, target = [], []
    for axis, (have, want) in enumerate(zip(volume.shape, size, strict=True)):
        first = start[axis] if start is not None and have > want else max(0, (have - want) // 2)
        offset = max(0, (want - have) // 2)
        length = min(have, want)
        source.append(slice(first, first + length))
        target.append(slice(offset, offset + length))
    box[tuple(target)] = volume[tuple(source)]
    return box


def padded_size(shape: Sequence[int], factor: int) -> tuple[int, ...]:
    """The smallest multiples of `factor` that hold `shape`."""
    return tuple(-(-n // factor) * factor for n in shape)
