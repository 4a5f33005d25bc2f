"""How good volumes are: reconstruction, fidelity, diversity.

Every figure is a `Metric`: the value, which way is better, the number of volumes and how it was computed stand beside
it, because the same name computed in another way is another figure. All volumes are (X, Y, Z) in [0, 1]; sets of them
are arrays, tensors or lists (N, X, Y, Z). What is inside the brains is judged in `ldm3d.interior`, whether samples are
copies in `ldm3d.copies`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim, compute_ssim_and_cs

from ldm3d.errors import DataError
from ldm3d.features import EXTRACTOR, PREPROCESSING, FeatureSpace, extract

HIGHER, LOWER = "higher is better", "lower is better"
# Wang, Simoncelli, Bovik 2003: weights of five scales, from fine to coarse.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SSIM_KERNEL, SSIM_SIGMA = 11, 1.5


class TooFewVolumes(DataError):
    """A metric cannot be computed of so few volumes; others can."""


class Metric(TypedDict, total=False):
    """A figure and what is needed to read it. Single metrics add reference values of their own."""

    value: float | None
    standard_error: float | None
    """Of the choice of synthetic volumes. That of real ones is the same for all that is compared."""
    direction: str
    n: dict[str, int]
    how: str
    references: dict[str, Any]


def reconstruction(real: Iterable[np.ndarray], reconstructed: Iterable[np.ndarray]) -> dict[str, Metric]:
    """PSNR (dB), SSIM (Wang et al. 2004) and L1 between volumes and their reconstructions, averaged over volumes.

    Raises:
        TooFewVolumes: there is none.
        DataError: a pair differs in shape.
    """
    rows, kernel = [], SSIM_KERNEL
    for original, copy in zip(real, reconstructed, strict=True):
        x, y = _tensor(original), _tensor(copy)
        if x.shape != y.shape:
            raise DataError(f"a reconstruction has shape {tuple(y.shape[2:])}, its original {tuple(x.shape[2:])}")
        kernel = _odd_kernel(x.shape[2:])
        ssim, _ = compute_ssim_and_cs(x, y, 3, (kernel,) * 3, (SSIM_SIGMA,) * 3)
        mse = float(((x - y) ** 2).mean())
        rows.append((-10 * np.log10(mse) if mse > 0 else np.inf, float(ssim.mean()), float((x - y).abs().mean())))
    if not rows:
        raise TooFewVolumes("there is no volume to reconstruct")
    psnr, ssim_mean, l1 = np.mean(rows, axis=0)
    n = {"volumes": len(rows)}
    how_ssim = f"3-D, Gaussian kernel {kernel}, sigma {SSIM_SIGMA}, data range 1, air included"
    return {
        "psnr_db": make_metric(psnr, HIGHER, n, "-10 log10 of a volume's mean squared error, air included"),
        "ssim": make_metric(ssim_mean, HIGHER, n, how_ssim),
        "l1": make_metric(l1, LOWER, n, "mean absolute difference, air included"),
    }


def fidelity(
    real: Sequence[np.ndarray],
    synthetic: Sequence[np.ndarray],
    reconstructed: Sequence[np.ndarray] | None = None,
    mean_image: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Metric]:
    """KID and MMD between real and synthetic volumes, in features of the image (`ldm3d.features`).

    Beside each value stand what real volumes get against real ones, what reconstructions get, and what the mean image,
    which has no detail and no variety, gets: a value is read between those.

    Args:
        real: reference set, 2 volumes or more; 4 for the comparison of its halves.
        synthetic: 2 or more.
        reconstructed: reconstructions of real volumes, if there are any.
        mean_image: (X, Y, Z); the mean of `real` if None.
        seed: of the random halves.

    Raises:
        TooFewVolumes: fewer than 2 in a set.
        DataError: volumes under 8 voxels a side.
    """
    if min(len(real), len(synthetic)) < 2:
        raise TooFewVolumes(f"needs 2 real and 2 synthetic volumes; there are {len(real)} and {len(synthetic)}")
    if min(np.shape(real[0])) < 8:
        raise DataError(f"volumes {np.shape(real[0])} are too small: features need 8 voxels a side")
    features = extract(real)
    space = FeatureSpace(features)
    points = space(features)
    sets = {"synthetic": space(extract(synthetic))}
    if reconstructed is not None and len(reconstructed) > 1:
        sets["reconstructions"] = space(extract(reconstructed))
    blurred = mean_of(real) if mean_image is None else np.asarray(mean_image)
    sets["mean_image"] = np.repeat(space(extract([blurred])), len(real), axis=0)
    n = {"real": len(real), "synthetic": len(synthetic)}
    result = {}
    for name, distance, kernel in (
        ("kid", space.kid, "unbiased MMD^2, polynomial kernel (x.y / D + 1)^3"),
        ("mmd", space.mmd, "unbiased MMD^2, Gaussian kernel, median distance of real pairs"),
    ):
        references: dict[str, Any] = {s: distance(points, p) for s, p in sets.items() if s != "synthetic"}
        references["real_halves"] = _halves(points, distance, seed)
        how = f"{kernel}; features {EXTRACTOR}, D = {points.shape[1]}; {PREPROCESSING}"
        error = jackknife(partial(_distance_of, distance, points, sets["synthetic"]), len(sets["synthetic"]))
        result[name] = make_metric(distance(points, sets["synthetic"]), LOWER, n, how, references, error)
    return result


def _distance_of(distance: Any, points: np.ndarray, others: np.ndarray, kept: list[int]) -> float:
    return float(distance(points, others[kept]))


def _halves(points: np.ndarray, distance: Any, seed: int, splits: int = 20) -> dict[str, Any] | None:
    """Mean and spread of the distance between random halves of the real set: what chance alone gives."""
    half = len(points) // 2
    if half < 2:
        return None
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(len(points)) for _ in range(splits))
    values = [distance(points[order[:half]], points[order[half:]]) for order in orders]
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "n": half, "splits": splits}


def jackknife(figure: Callable[[list[int]], float], count: int) -> float | None:
    """Standard error of a figure (Efron and Stein 1981, eq. 1.4), from what it is without each volume in turn.

    Args:
        figure: of the volumes with these indices.
        count: how many volumes there are; None is returned under 4.
    """
    if count < 4:
        return None
    values = np.array([figure([i for i in range(count) if i != left_out]) for left_out in range(count)])
    return float(np.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))


def mean_of(volumes: Iterable[np.ndarray]) -> np.ndarray:
    """Mean image (X, Y, Z), one volume at a time."""
    total, count = np.zeros(1), 0
    for count, volume in enumerate(volumes, start=1):  # noqa: B007
        total = total + np.asarray(volume, dtype=np.float64)
    return (total / max(count, 1)).astype(np.float32)


def diversity(
    real: Sequence[np.ndarray], synthetic: Sequence[np.ndarray], pairs: int = 100, seed: int = 0
) -> dict[str, Metric]:
    """MS-SSIM between different samples, and between different real volumes: equal is as varied as real.

    Kernel and scales are those that fit into the volumes (`ms_ssim_settings`), the same for both sets.

    Args:
        real: 2 volumes or more.
        synthetic: 2 or more.
        pairs: at most so many random pairs of each set.
        seed: of the choice of pairs.

    Raises:
        TooFewVolumes: fewer than 2 in a set.
    """
    if min(len(real), len(synthetic)) < 2:
        raise TooFewVolumes(f"needs 2 real and 2 synthetic volumes; there are {len(real)} and {len(synthetic)}")
    kernel, weights = ms_ssim_settings(np.shape(real[0]))
    values, counts, chosen = {}, {}, []
    for name, volumes in (("real", real), ("synthetic", synthetic)):
        chosen = _random_pairs(len(volumes), pairs, seed)
        values[name] = np.array([ms_ssim(volumes[i], volumes[j]) for i, j in chosen])
        counts[f"{name}_pairs"] = len(chosen)
    references = {"real": float(values["real"].mean()), "synthetic_max": float(values["synthetic"].max())}
    references["real_max"] = float(values["real"].max())
    how = (
        f"3-D MS-SSIM of random pairs, air included, Gaussian kernel {kernel}, weights {[round(w, 4) for w in weights]}"
    )
    n = {"real": len(real), "synthetic": len(synthetic), **counts}

    def without(kept: list[int]) -> float:
        inside = np.isin(chosen, kept).all(axis=1)  # `chosen` are the synthetic pairs, the last ones
        return float(values["synthetic"][inside].mean())

    error = jackknife(without, len(synthetic))
    return {"ms_ssim_pairs": make_metric(values["synthetic"].mean(), "lower is more varied", n, how, references, error)}


def ms_ssim_settings(shape: Sequence[int]) -> tuple[int, tuple[float, ...]]:
    """The published kernel of 11 voxels and as many of the published five scales as MONAI allows for the shape.

    160 voxels and fewer a side are too few for five: 48 take three, 112 take four. The weights are scaled to sum to 1.

    Returns:
        kernel size, and the weight of each scale from fine to coarse.
    """
    smallest = min(shape)
    fits = [s for s in range(2, 6) if min(smallest // (s - 1) ** 2, smallest // 2 ** (s - 1)) >= SSIM_KERNEL]
    scales = max(fits, default=1)
    weights = MS_SSIM_WEIGHTS[:scales]
    return _odd_kernel(shape), tuple(w / sum(weights) for w in weights)


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """MS-SSIM (Wang, Simoncelli, Bovik 2003) of two volumes (X, Y, Z) in [0, 1], by `ms_ssim_settings`."""
    kernel, weights = ms_ssim_settings(np.shape(a))
    value = compute_ms_ssim(_tensor(a), _tensor(b), 3, kernel_size=kernel, kernel_sigma=SSIM_SIGMA, weights=weights)
    return float(value.mean())


def _odd_kernel(shape: Sequence[int]) -> int:
    return min(SSIM_KERNEL, (min(shape) - 1) // 2 * 2 + 1)


def _random_pairs(n: int, most: int, seed: int) -> list[tuple[int, int]]:
    first, second = np.triu_indices(n, 1)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(first))[:most])
    return [(int(first[k]), int(second[k])) for k in chosen]


def _tensor(volume: Any) -> torch.Tensor:
    # torch takes no views with negative strides, such as mirrored volumes.
    return torch.from_numpy(np.array(volume, dtype=np.float32))[None, None]


def make_metric(
    value: float,
    direction: str,
    n: dict[str, int],
    how: str,
    references: dict[str, Any] | None = None,
    standard_error: float | None = None,
) -> Metric:
    """A figure with what is needed to read it; what is not a finite number becomes None, because JSON has none."""
    metric = Metric(value=_finite(float(value)), direction=direction, n=n, how=how)
    if standard_error is not None:
        metric["standard_error"] = _finite(standard_error)
    if references:
        metric["references"] = {key: _finite(reference) for key, reference in references.items()}
    return metric


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
