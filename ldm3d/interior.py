"""What is inside the brains: sharpness and structure, relative to real ones.

A metric of whole volumes is mostly one of outlines; these fail a blob with the right outline.
"""

from collections.abc import Sequence

import numpy as np

from ldm3d.brain import inside
from ldm3d.metrics import Metric, TooFewVolumes, jackknife, make_metric

LIKE_REAL = "1 is like real"


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
    figures = {name: [inside(volume) for volume in volumes] for name, volumes in sets.items()}
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
