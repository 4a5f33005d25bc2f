"""What generated volumes are like, and how far from the volumes that their weights were trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm3d.brain import IMAGE_FEATURES, coarse, distance, image_features
from ldm3d.errors import DataError, WeightsError
from ldm3d.nifti import read_volume, spacing_of
from ldm3d.reference_profile import FILE, ReferenceProfile, read_profile
from mlops.api.weights_store import store_dir

TOLERANCE = 1e-3


class EmptyVolume(DataError):
    """It shows no brain."""


class Measured(NamedTuple):
    """What is kept of a volume."""

    features: np.ndarray
    """(F,), in the order of `IMAGE_FEATURES`."""
    coarse: np.ndarray
    """(8, 8, 8) means."""


def measure(path: Path) -> Measured:
    """Measure a generated volume.

    Raises:
        EmptyVolume: it shows no brain.
        DataError: it cannot be read, or has values that no generated volume has.
    """
    volume, affine = read_volume(path)
    low, high = float(volume.min()), float(volume.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN is neither
        raise DataError(f"{path}: values run from {low:g} to {high:g}; generated volumes are in [0, 1]")
    found = image_features(volume, spacing_of(affine))
    if found["brain_volume_ml"] == 0:
        raise EmptyVolume(f"{path}: shows no brain")
    return Measured(np.array([found[name] for name in IMAGE_FEATURES]), coarse(volume))


class Reference:
    """The training data of some weights, as a ruler: each feature in standard deviations of the training data.

    Args:
        profile: of the training data.
    """

    def __init__(self, profile: ReferenceProfile):
        values = np.array([profile.features[name] for name in IMAGE_FEATURES])
        self._means = values.mean(1)
        # Where training volumes hardly differ, a hundredth of the value is the unit; where all are 0 (no lesions, say)
        # there is none, and the feature is left out.
        spreads = np.maximum(values.std(1), np.abs(self._means) / 100)
        self._spreads = np.where(spreads > 0, spreads, np.inf)
        self._points = self._scaled(values.T)
        self._within = float(np.mean([_mean_difference(column) for column in self._points.T]))
        self._pair_difference = float(np.mean(profile.pair_distances))
        self.trained_on = profile.trained_on

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = (features - self._means) / self._spreads
        return scaled

    def deviations(self, volumes: Sequence[Measured]) -> dict[str, float]:
        """Mean of each feature that can be judged, less the training data's."""
        means = self._scaled(_features(volumes)).mean(0)
        return {name: float(means[i]) for i, name in enumerate(IMAGE_FEATURES) if np.isfinite(self._spreads[i])}

    def to_training(self, volumes: Sequence[Measured]) -> np.ndarray:
        """(N,) mean distance of each volume from the training volumes, over all features."""
        points = self._scaled(_features(volumes))
        distances: np.ndarray = np.abs(points[:, None, :] - self._points[None]).mean((1, 2))
        return distances

    def apart(self, one: Measured, other: Measured) -> float:
        """Distance of two volumes, over all features."""
        return float(np.abs(one.features - other.features) @ (1 / self._spreads)) / len(self._spreads)

    def energy(self, to_training: float, apart: float) -> float:
        """Energy distance (Szekely and Rizzo 2013) from its parts: 2 E|X - R| - E|X - X'| - E|R - R'|."""
        return 2 * to_training - apart - self._within

    def distance(self, volumes: Sequence[Measured]) -> float:
        """Energy distance of the features, one by one, to the training data's: 0 for equal sets, unbiased.

        It grows where volumes are elsewhere than the training data, and where they are less or more varied.
        """
        points = self._scaled(_features(volumes))
        apart = float(np.mean([_mean_difference(column) for column in points.T]))
        return self.energy(float(self.to_training(volumes).mean()), apart)

    def diversity(self, volumes: Sequence[Measured]) -> float:
        """How different two volumes are, against two training volumes; 1 is as varied."""
        return pair_difference(volumes) / self._pair_difference


def read_reference(data_dir: Path, digest: str) -> Reference | None:
    """The reference of stored weights; None where they came without one, or it cannot be used."""
    try:
        profile = read_profile(store_dir(data_dir) / digest / FILE)
    except WeightsError:
        return None
    # Of one volume, or of copies of one, there is no variety to compare with.
    return Reference(profile) if any(profile.pair_distances) else None


def has_reference(data_dir: Path, digest: str) -> bool:
    return (store_dir(data_dir) / digest / FILE).is_file()


def pair_difference(volumes: Sequence[Measured]) -> float:
    """Mean of `ldm3d.brain.distance` over all pairs."""
    pairs = [distance(a.coarse, b.coarse) for i, a in enumerate(volumes) for b in volumes[:i]]
    return float(np.mean(pairs))


def feature_means(volumes: Sequence[Measured]) -> Mapping[str, float]:
    return dict(zip(IMAGE_FEATURES, _features(volumes).mean(0), strict=True))


def _features(volumes: Sequence[Measured]) -> np.ndarray:
    return np.stack([volume.features for volume in volumes])


def _mean_difference(values: np.ndarray) -> float:
    """E|X - X'| of different ones (Gini's mean difference), from N values."""
    n = len(values)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return float(2 * (np.sort(values) * ranks).sum() / (n * (n - 1)))
