"""What one volume in [0, 1] shows: where its brain is, how sharp, noisy and shaded it is, what it contrasts.

Needs no torch: monitors measure generated volumes with it.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
from scipy import ndimage

# Voxels under the brain's surface that are partly air.
RIM_VOXELS = 2
AXES = "xyz"
"""Left to right, back to front, bottom to top."""
QUANTILES = (5, 25, 50, 75, 95)
COARSE = 8
# A second difference along all three axes of white noise of standard deviation 1 has 6 to the power of 3 / 2.
_NOISE_GAIN = 6**1.5
_MAD = 1.4826  # median absolute value of a normal distribution to its standard deviation
_SHADING_VOXELS = 20_000
_SIGNIFICANT_DIGITS = 5
# A hundred steps of a 32-bit number near 1 could not be told apart by a histogram.
_LEAST_CONTRAST = 1e-4

IMAGE_FEATURES = (
    *(f"intensity_p{percent:02d}" for percent in QUANTILES),
    "brain_volume_ml",
    *(f"brain_spread_{axis}_mm" for axis in AXES),
    *(f"brain_skew_{axis}" for axis in AXES),
    *("sharpness", "structure", "tissue_spread", "dark_share", "bright_share"),
    *("noise", "fine_detail", "shading"),
)
"""What `image_features` gives."""


def image_features(volume: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Figures of one volume, by the names in `IMAGE_FEATURES`.

    - `intensity_p05` to `intensity_p95`: quantiles of the brain's voxels: its contrast;
    - `brain_volume_ml`; `brain_spread_*_mm`, `brain_skew_*`: standard deviation and skewness of the brain's voxels
      along each axis: size, and which way it is turned;
    - `sharpness`, `structure`, `tissue_spread`, `dark_share`, `bright_share`: as `inside` gives them;
    - `noise`: standard deviation of noise, from second differences along all axes (Immerkaer 1996, in 3-D), of which
      anatomy leaves little, in units of the white-to-black range;
    - `fine_detail`: detail below a voxel or two against that of one to four voxels; blur lowers it, noise raises it;
    - `shading`: standard deviation of the second-order polynomial in space that fits the logarithm of tissue best: a
      bias field.

    Args:
        volume: (X, Y, Z) in [0, 1], RAS.
        spacing: voxel size in mm (3).

    Returns:
        Five significant digits of each; all 0 where there is no brain.
    """
    volume = np.asarray(volume, dtype=np.float32)
    mask = brain_mask(volume)
    depth = _depth(mask)
    core = depth > depth.max() / 4
    if not core.any():
        return dict.fromkeys(IMAGE_FEATURES, 0.0)
    figures = dict(zip(IMAGE_FEATURES, np.percentile(volume[mask], QUANTILES), strict=False))
    figures["brain_volume_ml"] = np.count_nonzero(mask) * float(np.prod(spacing)) / 1000
    for axis, name in enumerate(AXES):
        spread, figures[f"brain_skew_{name}"] = _spread_and_skew(mask, axis)
        figures[f"brain_spread_{name}_mm"] = spread * spacing[axis]
    within = _figures(volume, depth)
    figures |= {
        "sharpness": within["gradient"],
        "structure": within["band"],
        "tissue_spread": within["spread"],
        "dark_share": within["dark"],
        "bright_share": within["bright"],
        "noise": _noise(volume, core),
        "fine_detail": within["fine"] / max(within["band"], 1e-9),
        "shading": _shading(volume, core),
    }
    return {name: rounded(figures[name]) for name in IMAGE_FEATURES}


def rounded(value: float) -> float:
    """Five significant digits: more would tell volumes apart, not sets of them."""
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


def coarse(volume: np.ndarray) -> np.ndarray:
    """(8, 8, 8) means of a volume (X, Y, Z); of an axis with fewer voxels some stand there more than once."""
    for axis, length in enumerate(volume.shape):
        edges = np.linspace(0, length, COARSE + 1).astype(int)
        shape = [-1 if a == axis else 1 for a in range(3)]
        volume = np.add.reduceat(volume, edges[:-1], axis) / np.maximum(np.diff(edges), 1).reshape(shape)
    return volume


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two `coarse` images."""
    return rounded(np.sqrt(np.mean(np.square(one - other))))


def match(image: np.ndarray, mean: np.ndarray) -> float:
    """Pearson correlation of two `coarse` images: what is turned or mirrored is unlike the mean of what is not."""
    a, b = image - image.mean(), mean - mean.mean()
    return rounded(float((a * b).sum()) / max(float(np.sqrt(np.square(a).sum() * np.square(b).sum())), 1e-12))


def brain_mask(volume: np.ndarray) -> np.ndarray:
    """What is head and not air: the largest part above half of Otsu's threshold (Otsu 1979), holes filled.

    Returns:
        (X, Y, Z) bool; all False for a volume without contrast.
    """
    smooth = ndimage.gaussian_filter(np.asarray(volume, dtype=np.float32), 1)
    if np.ptp(smooth) < _LEAST_CONTRAST:
        return np.zeros(smooth.shape, dtype=bool)
    # Half of it: Otsu's own threshold can fall between tissue and a bright lesion.
    parts, count = ndimage.label(smooth > _otsu(smooth) / 2)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    head: np.ndarray = ndimage.binary_fill_holes(parts == 1 + sizes.argmax())
    return head


def _otsu(values: np.ndarray) -> float:
    counts, edges = np.histogram(values, 128)
    centres = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + np.nanargmax(between)])


def inside(volume: np.ndarray) -> dict[str, float]:
    """Sharpness and structure inside the brain, as `ldm3d.interior` describes them. All 0 where there is no brain."""
    volume = np.asarray(volume, dtype=np.float32)
    return _figures(volume, _depth(brain_mask(volume)))


def _depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each voxel of the brain from its surface, in voxels."""
    padded = np.pad(mask, 1)  # a brain that touches the edge of the grid ends there
    depth: np.ndarray = ndimage.distance_transform_edt(padded)[1:-1, 1:-1, 1:-1]
    return depth


def _figures(volume: np.ndarray, depth: np.ndarray) -> dict[str, float]:
    core, middle = depth > depth.max() / 4, depth > depth.max() / 2
    if not middle.any():
        return dict.fromkeys(("gradient", "band", "spread", "dark", "bright", "fine"), 0.0)
    tissue = float(np.median(volume[core]))
    filled = np.where(depth > min(RIM_VOXELS, depth.max() / 4), volume, np.float32(tissue))
    smooth = ndimage.gaussian_filter(filled, 1)
    gradient = np.sqrt(sum(np.square(g) for g in np.gradient(filled)))
    band = smooth - ndimage.gaussian_filter(filled, 4)
    low, high = np.percentile(smooth[core], (5, 95))
    return {
        "gradient": float(gradient[core].mean()),
        "band": float(band[core].std()),
        "spread": float(high - low),
        "dark": float((smooth[middle] < 0.75 * tissue).mean()),
        "bright": float((smooth[middle] > 1.25 * tissue).mean()),
        "fine": float((filled - smooth)[core].std()),
    }


def _spread_and_skew(mask: np.ndarray, axis: int) -> tuple[float, float]:
    """Standard deviation in voxels, and skewness, of the mask's voxels along an axis."""
    counts = mask.sum(tuple({0, 1, 2} - {axis}))
    places = np.arange(len(counts)) - np.average(np.arange(len(counts)), weights=counts)
    spread = float(np.sqrt(np.average(places**2, weights=counts)))
    return spread, float(np.average(places**3, weights=counts)) / max(spread, 1e-9) ** 3


def _noise(volume: np.ndarray, core: np.ndarray) -> float:
    for axis in range(3):
        volume = np.diff(volume, 2, axis)
    found = np.abs(volume[core[1:-1, 1:-1, 1:-1]])
    return _MAD * float(np.median(found)) / _NOISE_GAIN if found.size else 0.0


def _shading(volume: np.ndarray, core: np.ndarray) -> float:
    places = np.argwhere(core)
    places = places[:: max(1, len(places) // _SHADING_VOXELS)]
    values = volume[tuple(places.T)]
    # Fluid is no tissue, and a lesion no shading.
    tissue = (values > np.median(values) / 2) & (values < 2 * np.median(values))
    if np.count_nonzero(tissue) < 10:
        return 0.0
    x = (places[tissue] - places.mean(0)) / np.maximum(np.ptp(places, axis=0) / 2, 1)
    products = [x[:, i] * x[:, j] for i, j in combinations_with_replacement(range(3), 2)]
    terms = np.column_stack([np.ones(len(x)), x, *products])
    fit = np.linalg.lstsq(terms, np.log(values[tissue]), rcond=None)[0]
    return float(np.std(terms[:, 1:] @ fit[1:]))
