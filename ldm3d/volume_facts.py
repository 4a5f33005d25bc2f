"""The facts of one case by which sets of volumes are compared: of its file, and of the image that the model sees."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm3d.brain import AXES, IMAGE_FEATURES, coarse, image_features, rounded
from ldm3d.nifti import spacing_of, stem_of
from ldm3d.volumes import PERCENTILES, crop_or_pad, percentiles

FILE_FEATURES = (
    *("raw_low", "raw_median", "raw_high"),
    *(f"spacing_{axis}_mm" for axis in AXES),
    *(f"extent_{axis}_mm" for axis in AXES),
)
FEATURES = FILE_FEATURES + IMAGE_FEATURES
UNKNOWN = "unknown"
# Of BIDS. Serial numbers, institutions, dates and free text would tell who was scanned.
_SCANNER_KEYS = ("Manufacturer", "ManufacturersModelName", "MagneticFieldStrength")
# Share of the range above the lowest value from which on a voxel is no air.
_AIR = 0.02
_MILLIMETRE_DIGITS = 3  # NIfTI keeps affines as 32-bit numbers


class VolumeFacts(NamedTuple):
    """Of one volume."""

    features: dict[str, float]
    """By the names in `FEATURES`."""
    orientation: str
    """Where the file's axes point, `RAS`."""
    scanner: str
    """Manufacturer, model, field strength, where a BIDS sidecar beside the file says."""
    coarse: np.ndarray
    """(8, 8, 8) means of the image that the model sees."""


def volume_facts(
    path: Path,
    orientation: str,
    raw: np.ndarray,
    affine: np.ndarray,
    prepared: np.ndarray,
    spacing: Sequence[float],
    size: Sequence[int],
) -> VolumeFacts:
    """Measure one case.

    Args:
        path: of its file; a sidecar is looked for beside it.
        orientation: where the file's axes point.
        raw: (X, Y, Z) in the file's own intensities, RAS.
        affine: (4, 4) of `raw`.
        prepared: (X', Y', Z') in [0, 1] with voxels of `spacing`, as `ldm3d.volumes` makes it.
        spacing: voxel size of the model's grid in mm (3).
        size: voxels a side of the model's grid (3); the volume is cut or padded to it, as for training.
    """
    image = crop_or_pad(prepared, size)
    features = _of_file(raw, affine) | image_features(image, spacing)
    return VolumeFacts(features, orientation, scanner(path), coarse(image))


def _of_file(raw: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    # The percentiles that become 0 and 1: a volume that is twice as bright is the same to the model, and a drift.
    low, high = percentiles(raw, PERCENTILES)
    head = raw[raw > low + _AIR * (high - low)]
    values = [low, float(np.median(head)) if head.size else low, high]
    millimetres = [*spacing_of(affine), *np.multiply(spacing_of(affine), raw.shape)]
    values = [rounded(value) for value in values] + [round(float(value), _MILLIMETRE_DIGITS) for value in millimetres]
    return dict(zip(FILE_FEATURES, values, strict=True))


def scanner(path: Path) -> str:
    """What a BIDS sidecar (`<name>.json` beside the file) says of the scanner; `unknown` where there is none."""
    try:
        content: Any = json.loads(path.with_name(f"{stem_of(path)}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return UNKNOWN
    found = [str(content[key]) for key in _SCANNER_KEYS if content.get(key)] if isinstance(content, dict) else []
    return " ".join(found) or UNKNOWN


def latent_facts(latent: np.ndarray) -> list[float]:
    """Mean and standard deviation over space of each channel of a latent (C, X, Y, Z): 2 C numbers."""
    channels = np.asarray(latent, dtype=np.float64).reshape(len(latent), -1)
    return [rounded(value) for value in (*channels.mean(1), *channels.std(1))]
