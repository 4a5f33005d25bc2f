"""How far one set of volumes is from another, in features of the image itself.

The features are computed, not learned, and never taken from a model under evaluation: an autoencoder is blind to what
it cannot encode. They hold where tissue lies (a coarse image), which intensities occur, and how much detail of which
size stands where, so that a set of blurred, noisy or empty volumes is far from real ones.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

EXTRACTOR = "ldm3d-image-features-1"
PREPROCESSING = "volumes in [0, 1] as given; each block of features scaled by its spread in the real set"
IMAGE_GRID, DETAIL_GRID, LEVELS, BINS = 8, 4, 3, 32
# Detail weaker than this (in units of the white-to-black range) cannot be seen: the logarithm ends there.
FAINTEST_DETAIL = 0.005
AIR = 0.02


def extract(volumes: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Features of each volume.

    Args:
        volumes: (X, Y, Z) each, at least 8 voxels a side, in [0, 1].

    Returns:
        name of a block -> (N, D): "image" 8x8x8 means; "detail" log of the root mean square of three Laplacian bands
        (Burt and Adelson 1983) in 4x4x4 places; "intensity" square roots of a 32-bin histogram of what is not air.
    """
    rows: dict[str, list[np.ndarray]] = {"image": [], "detail": [], "intensity": []}
    for volume in volumes:
        image = torch.from_numpy(np.array(volume, dtype=np.float32))[None, None]
        rows["image"].append(F.adaptive_avg_pool3d(image, IMAGE_GRID).flatten().numpy())
        rows["detail"].append(_detail(image))
        rows["intensity"].append(_intensity(image))
    return {name: np.stack(block).astype(np.float64) for name, block in rows.items()}


def _detail(image: torch.Tensor) -> np.ndarray:
    """(LEVELS * 4 * 4 * 4,) log strength of detail, from finest to coarsest."""
    strengths = []
    for _ in range(LEVELS):
        coarse = F.avg_pool3d(image, 2, ceil_mode=True, count_include_pad=False)
        band = image - F.interpolate(coarse, size=image.shape[2:], mode="trilinear")
        strengths.append(F.adaptive_avg_pool3d(band**2, DETAIL_GRID).sqrt().flatten())
        image = coarse
    return (torch.cat(strengths) + FAINTEST_DETAIL).log().numpy()


def _intensity(image: torch.Tensor) -> np.ndarray:
    counts = torch.histc(image[image > AIR].clamp(max=1), BINS, 0, 1)
    return (counts / max(1.0, float(counts.sum()))).sqrt().numpy()


class FeatureSpace:
    """The ruler by which sets are compared: it depends on the real set alone, so that all comparisons share it.

    Args:
        real: `extract` of the real set, N >= 2.
    """

    def __init__(self, real: Mapping[str, np.ndarray]):
        # One scale per block, not per feature: a place where real volumes never differ would otherwise decide alone.
        self._means = {name: block.mean(0) for name, block in real.items()}
        self._scales = {
            name: max(float(np.sqrt(((block - self._means[name]) ** 2).mean())), 1e-6) for name, block in real.items()
        }
        inside = self(real)
        between = _squared_distances(inside, inside)[np.triu_indices(len(inside), 1)]
        self.bandwidth = max(float(np.median(between)), 1e-12)

    def __call__(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """(N, D) points; each block has the same weight, whatever its length; real points have norm^2 D on average."""
        total = sum(mean.size for mean in self._means.values())
        blocks = [
            (features[name] - mean) / self._scales[name] * np.sqrt(total / (len(self._means) * mean.size))
            for name, mean in self._means.items()
        ]
        return np.concatenate(blocks, axis=1)

    def kid(self, real: np.ndarray, other: np.ndarray) -> float:
        """Kernel distance (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3; 0 for equal sets."""
        return _unbiased_mmd2(*((a @ b.T / real.shape[1] + 1) ** 3 for a, b in _pairs(real, other)))

    def mmd(self, real: np.ndarray, other: np.ndarray) -> float:
        """Unbiased MMD^2 (Gretton et al. 2012, eq. 3), Gaussian kernel as wide as the median distance of real pairs.

        Between 0 (equal; a little below by chance) and 2.
        """
        kernels = (np.exp(-_squared_distances(a, b) / (2 * self.bandwidth)) for a, b in _pairs(real, other))
        return _unbiased_mmd2(*kernels)


def _pairs(x: np.ndarray, y: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    return (x, x), (y, y), (x, y)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares: np.ndarray = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    return squares


def _unbiased_mmd2(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    def mean_of_pairs(k: np.ndarray) -> float:
        return float((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)))

    return mean_of_pairs(xx) + mean_of_pairs(yy) - 2 * float(xy.mean())
