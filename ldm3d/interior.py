"""What is inside the brains: sharpness and structure, relative to real ones.

A metric of whole volumes is mostly one of outlines; these fail a blob with the right outline.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ldm3d.metrics import Metric, TooFewVolumes, jackknife, make_metric

LIKE_REAL = "1 is like real"
# Voxels under the brain's surface that are partly air.
RIM_VOXELS = 2


def brain_mask(volume: np.ndarray) -> np.ndarray:
    """What is head and not air: the largest part above half of Otsu's threshold (Otsu 1979), holes filled.

    Returns:
        (X, Y, Z) bool; all False for a volume without contrast.
    """
    smooth = ndimage.gaussian_filter(np.asarray(volume, dtype=np.float32), 1)
    if np.ptp(smooth) < 1e-6:
        return np.zeros(smooth.shape, dtype=bool)
    # Half of it: Otsu's own threshold can fall between tissue and a bright lesion.
    parts, count = ndimage.label(smooth > _otsu(smooth) / 2)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    return ndimage.binary_fill_holes(parts == 1 + sizes.argmax())


def _otsu(values: np.ndarray) -> float:
    counts, edges = np.histogram(values, 128)
    centres = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + np.nanargmax(between)])


def interior(
    real: Sequence[np.ndarray], synthetic: Sequence[np.ndarray], reconstructed: Sequence[np.ndarray] | None = None
) -> dict[str, Metric]:
    """Sharpness and interior structure of synthetic volumes, as ratios to the real set's.

    All are measured deeper than a quarter of the brain's largest depth, with air and rim replaced by the median of the
    tissue, so that a blob with the right outline fails them:

    - `sharpness`: mean gradient magnitude. Blur lowers it, noise raises it;
    - `interior_contrast`: standard deviation of a band-pass of 1 to 4 voxels: sulci, ventricles, nuclei;
    - `interior_spread`: 5th to 95th percentile of lightly smoothed intensities: tissue contrast; noise adds little;
    - `central_dark`, `central_bright`: share of the central brain that is clearly darker or brighter than tissue: the
      ventricles where fluid is dark (T1, FLAIR) or bright (T2), lesions in the other. None where real brains have none.

    Args:
        real: reference set; its mean is the unit.
        synthetic: the same grid and spacing, because lengths are in voxels.
        reconstructed: reconstructions of real volumes, if there are any: what the autoencoder alone takes away.

    Raises:
        TooFewVolumes: a set is empty.
    """
    if not len(real) or not len(synthetic):
        raise TooFewVolumes(f"needs real and synthetic volumes; there are {len(real)} and {len(synthetic)}")
    sets = {"real": real, "synthetic": synthetic, "reconstructions": reconstructed if reconstructed is not None else []}
    figures = {name: [_inside(volume) for volume in volumes] for name, volumes in sets.items()}
    n = {"real": len(real), "synthetic": len(synthetic)}
    where = "deeper than 1/4 of the brain"
    how = {
        "sharpness": f"mean gradient magnitude, {where}",
        "interior_contrast": f"standard deviation of Gaussian sigma 1 minus sigma 4 voxels, {where}",
        "interior_spread": f"5th to 95th percentile after Gaussian sigma 1 voxel, {where}",
        "central_dark": "share of voxels deeper than 1/2 of the brain that are 25 % below the median of the brain",
        "central_bright": "share of voxels deeper than 1/2 of the brain that are 25 % above the median of the brain",
    }
    keys = dict(zip(how, ("gradient", "band", "spread", "dark", "bright"), strict=True))
    return {
        name: _ratio({of: [f[keys[name]] for f in found] for of, found in figures.items()}, n, how[name])
        for name in how
    }


def _inside(volume: np.ndarray) -> dict[str, float]:
    """Figures of one volume, of which `interior` takes the ratios. All 0 where there is no brain."""
    volume = np.asarray(volume, dtype=np.float32)
    mask = brain_mask(volume)
    padded = np.pad(mask, 1)  # a brain that touches the edge of the grid ends there
    depth = ndimage.distance_transform_edt(padded)[1:-1, 1:-1, 1:-1]
    core, middle = depth > depth.max() / 4, depth > depth.max() / 2
    if not (mask & middle).any():
        return dict.fromkeys(("gradient", "band", "spread", "dark", "bright"), 0.0)
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
    }


def _ratio(figures: dict[str, list[float]], n: dict[str, int], how: str) -> Metric:
    """Mean of the synthetic figures over the mean of the real ones."""
    how = f"{how}; divided by the mean of the real set"
    unit = float(np.mean(figures["real"]))
    if unit < 1e-9:
        return make_metric(np.nan, LIKE_REAL, n, how)
    real, synthetic = np.array(figures["real"]) / unit, np.array(figures["synthetic"]) / unit
    references = {
        "min_max": {name: [float(r.min()), float(r.max())] for name, r in (("real", real), ("synthetic", synthetic))},
        "synthetic_within_real": float(((synthetic >= real.min()) & (synthetic <= real.max())).mean()),
    }
    if figures["reconstructions"]:
        references["reconstructions"] = float(np.mean(figures["reconstructions"])) / unit
    error = jackknife(lambda kept: float(synthetic[kept].mean()), len(synthetic))
    return make_metric(synthetic.mean(), LIKE_REAL, n, how, references, error)
