"""What the figures are called, and what it probably was that changed them."""

from collections.abc import Sequence

from ldm3d.reference_profile import ReferenceProfile
from mlops.monitoring.drift_folder import Folder

_ALONG = {"x": "left to right", "y": "back to front", "z": "bottom to top"}

WORDS: dict[str, tuple[str, str]] = {
    "raw_low": ("lowest value of the file", ""),
    "raw_median": ("median value of the head in the file", ""),
    "raw_high": ("99.5th percentile of the file's values", ""),
    **{f"spacing_{axis}_mm": (f"voxel size, {along}", "mm") for axis, along in _ALONG.items()},
    **{f"extent_{axis}_mm": (f"field of view, {along}", "mm") for axis, along in _ALONG.items()},
    **{
        f"intensity_p{percent}": (f"{percent.lstrip('0')}th percentile of the brain, normalised", "")
        for percent in ("05", "25", "50", "75", "95")
    },
    "brain_volume_ml": ("volume of the brain", "ml"),
    **{f"brain_spread_{axis}_mm": (f"size of the brain, {along}", "mm") for axis, along in _ALONG.items()},
    **{f"brain_skew_{axis}": (f"asymmetry of the brain, {along}", "") for axis, along in _ALONG.items()},
    "sharpness": ("sharpness (mean gradient)", ""),
    "structure": ("structure of 1 to 4 voxels", ""),
    "tissue_spread": ("range of tissue intensities", ""),
    "dark_share": ("share of dark voxels in the middle", ""),
    "bright_share": ("share of bright voxels in the middle", ""),
    "noise": ("noise", ""),
    "fine_detail": ("finest detail against structure", ""),
    "mean_match": ("likeness to the mean training volume", ""),
    "shading": ("shading (bias field)", ""),
    "orientation": ("orientation of the stored axes", ""),
    "scanner": ("scanner", ""),
    "latents": ("latents of the autoencoder", ""),
}
"""Label and unit of everything that is compared."""


def causes(drifted: Sequence[str], profile: ReferenceProfile, folder: Folder) -> list[str]:
    return []
