"""What the training data were like, for comparison with new volumes and with generated ones: `reference_profile.json`.

Training writes it into `model_dir` together with the weights, `python -m mlops.monitoring.make_profile` for weights
that have none. Reading it needs neither torch nor the data.

    format_version   1
    code_version     of ldm3d
    trained_on       digest of the training volumes; the same as in the weights made from them
    num_train        training volumes, of which at most 256 were measured, drawn by a hash of their names
    channel          contrast, as in the config
    spacing          voxel size of the model's grid in mm (3)
    size             voxels a side of the model's grid (3): `diffusion_train.patch_size`
    features         name -> N numbers, one for each measured volume, SORTED, each feature by itself; NAMES BELOW
    facts            "orientation", "scanner" -> {value: how many volumes}
    mean_image       512 numbers: the mean of the measured volumes' 8x8x8 means
    pair_distances   N numbers, sorted: how far two training volumes are apart, for random pairs
    latents          null until stage 2 has encoded; else {"autoencoder_sha256": ..., "rows": N rows of 2 C numbers}

Features of the file (`ldm3d.volume_facts`): `raw_low`, `raw_median`, `raw_high` (in the file's own units),
`spacing_x_mm`, `spacing_y_mm`, `spacing_z_mm`, `extent_x_mm`, `extent_y_mm`, `extent_z_mm`.

Features of the image (`ldm3d.brain.image_features(volume, spacing)`), measured on the model's grid in [0, 1], where
generated volumes live, so that the same function measures these: `intensity_p05`, `intensity_p25`, `intensity_p50`,
`intensity_p75`, `intensity_p95` (of the brain's voxels), `brain_volume_ml`, `brain_spread_x_mm`, `brain_spread_y_mm`,
`brain_spread_z_mm`, `brain_skew_x`, `brain_skew_y`, `brain_skew_z`, `sharpness`, `structure`, `tissue_spread`,
`dark_share`, `bright_share`, `noise`, `fine_detail`, `shading`.

And `mean_match`: correlation (`ldm3d.brain.match`) of a volume's 8x8x8 means with `mean_image`; of a training volume,
with the mean of the others.

`pair_distances` is of `ldm3d.brain.distance(coarse(a), coarse(b))`, the root mean square difference of two volumes'
8x8x8 means: the variety that generated volumes should have too. A row of `latents` holds mean and standard deviation
over space of each channel of the posterior's mean.

Privacy: no names, no dates, no voxels but those of the mean image. Each feature is sorted by itself, so that no line of
the file belongs to one patient; the rows of `latents` do, but 2 C numbers without any place in them give no image back.
Free text of headers is never taken, of a BIDS sidecar only manufacturer, model and field strength.
"""

import json
import re
from itertools import chain
from math import isfinite
from pathlib import Path

from pydantic import ValidationError

from ldm3d import __version__
from ldm3d.brain import AXES, COARSE, IMAGE_FEATURES
from ldm3d.definitions import Strict
from ldm3d.errors import WeightsError
from ldm3d.files import write_text

FILE = "reference_profile.json"
FORMAT_VERSION = 1
FILE_FEATURES = (
    *("raw_low", "raw_median", "raw_high"),
    *(f"spacing_{axis}_mm" for axis in AXES),
    *(f"extent_{axis}_mm" for axis in AXES),
)
FEATURES = (*FILE_FEATURES, *IMAGE_FEATURES, "mean_match")
FACTS = ("orientation", "scanner")


class ProfileLatents(Strict):
    """Of the measured volumes' latents."""

    autoencoder_sha256: str
    """Digest of the weights that made them."""
    rows: list[list[float]]
    """Mean and standard deviation of each channel, for each volume."""


class ReferenceProfile(Strict):
    """The content of `reference_profile.json`; the module says what each key holds."""

    format_version: int = FORMAT_VERSION
    code_version: str = __version__
    trained_on: str
    num_train: int
    channel: int
    spacing: tuple[float, float, float]
    size: tuple[int, int, int]
    features: dict[str, list[float]]
    facts: dict[str, dict[str, int]]
    mean_image: list[float]
    pair_distances: list[float]
    latents: ProfileLatents | None = None


def read_profile(path: Path) -> ReferenceProfile:
    """Read a profile, given itself or the folder that holds it.

    Raises:
        WeightsError: it is not there, damaged, or of another format.
    """
    path = path / FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: there is no such profile; training writes one, python -m mlops.monitoring.make_profile makes one "
            "for weights that were trained before"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as a profile: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise WeightsError(f"{path}: format version {version}; this code reads version {FORMAT_VERSION}")
    try:
        profile = ReferenceProfile.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(f"{path}: is no whole profile: {first['loc']}: {first['msg']}") from error
    problem = _what_is_wrong(profile)
    if problem:
        raise WeightsError(f"{path}: is no whole profile: {problem}")
    return profile


def _what_is_wrong(profile: ReferenceProfile) -> str:
    """Of a profile whose types are right; empty where nothing is."""
    for what, expected, found in (("features", FEATURES, profile.features), ("facts", FACTS, profile.facts)):
        odd = sorted({*expected} ^ {*found})
        if odd:
            return f"its {what} are others than expected: {', '.join(odd[:3])}{' and more' if odd[3:] else ''}"
    lengths = {len(values) for values in profile.features.values()}
    if len(lengths) != 1 or 0 in lengths:
        return f"its features have {' and '.join(map(str, sorted(lengths)))} values; all must have the same number"
    if len(profile.mean_image) != COARSE**3:
        return f"its mean image has {len(profile.mean_image)} values; {COARSE**3} are needed"
    if not all(counts and min(counts.values()) > 0 for counts in profile.facts.values()):
        return "its facts count no volumes"
    if min(*profile.spacing, *profile.size) <= 0:
        return "its spacing and size must be positive"
    rows = profile.latents.rows if profile.latents else []
    if len({len(row) for row in rows}) > 1:
        return "the rows of its latents differ in length"
    numbers = chain(*profile.features.values(), *rows, profile.mean_image, profile.pair_distances, profile.spacing)
    if not all(map(isfinite, numbers)):  # JSON has none, but Python reads them, and every comparison with NaN is False
        return "some of its values are no numbers"
    return ""


def write_profile(model_dir: Path, profile: ReferenceProfile) -> None:
    """Write the profile beside the weights, atomically, each list on one line. Raises `OutputError`."""
    text = json.dumps(profile.model_dump(mode="json"), indent=1, allow_nan=False)
    one_line = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    write_text(model_dir / FILE, one_line + "\n")
