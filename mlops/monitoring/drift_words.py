"""What the figures are called, and what it probably was that changed them."""

from collections.abc import Iterator, Sequence

import numpy as np

from ldm3d.brain import AXES
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


_RAW = ("raw_low", "raw_median", "raw_high")
_SIZE = ("brain_volume_ml", *(f"brain_spread_{axis}_mm" for axis in AXES))
# Quantiles that blur, noise and shading leave where they are, but for less than this share of the training's spread.
_TISSUE = ("intensity_p25", "intensity_p50", "intensity_p75")
_ANOTHER_CONTRAST = 0.6
_CONTRAST = (
    "another contrast: after normalisation tissue is brighter or darker than in training; is it the same sequence, and "
    "prepared (skull-stripped, corrected) in the same way?"
)


def causes(drifted: Sequence[str], profile: ReferenceProfile, folder: Folder) -> list[str]:
    """What probably happened, `kind: explanation` each, from the figures that drifted and the way they went.

    One change moves many figures: another contrast also changes sharpness and noise, coarser voxels blur. What explains
    most comes first and takes away what it explains. A guess for a person to check, no part of the verdict.
    """
    shifts = _Shifts(drifted, profile, folder)
    found = [*_of_the_file(shifts, profile, folder)]
    other_contrast = any(abs(shifts[name]) >= _ANOTHER_CONTRAST for name in _TISSUE)
    if other_contrast:
        found.append(_CONTRAST)
    elif shifts["mean_match"] < 0 and not shifts["shading"] > 0:  # shading moves the brightness about, too
        found.append(
            "turned, mirrored or shifted: tissue lies elsewhere than in training, whatever the header says of "
            "orientation; or the heads are cut"
        )
    if not other_contrast:
        found += _of_the_image(shifts)
    if not found and any(name in drifted for name in _SIZE):
        found.append("anatomy: brains of another size than in training: another population, or another stripping")
    if not found and any(name.startswith("intensity_") for name in drifted):
        found.append(_CONTRAST)
    if not found and list(drifted) == ["latents"]:
        found.append("unclear: the autoencoder sees a difference that none of the simple figures shows")
    elif not found and drifted:
        found.append("unclear: no simple change explains the figures that drifted")
    return found


class _Shifts:
    """By how many of the training's standard deviations the median of a drifted feature has moved; 0 of all others."""

    def __init__(self, drifted: Sequence[str], profile: ReferenceProfile, folder: Folder):
        self.drifted, self.profile, self.folder = drifted, profile, folder

    def __getitem__(self, name: str) -> float:
        if name not in self.drifted:
            return 0.0
        old, new = self.medians(name)
        return (new - old) / max(float(np.std(self.profile.features[name])), 1e-9)

    def medians(self, name: str) -> tuple[float, float]:
        return float(np.median(self.profile.features[name])), float(np.median(self.folder.features[name]))

    def times(self, name: str) -> str:
        old, new = self.medians(name)
        return f"{new / old:.2g} times that of training" if old > 0 else f"{new:.3g}, in training {old:.3g}"


def _of_the_file(shifts: _Shifts, profile: ReferenceProfile, folder: Folder) -> Iterator[str]:
    if any(f"spacing_{axis}_mm" in shifts.drifted for axis in AXES):
        old, new = (" x ".join(f"{shifts.medians(f'spacing_{axis}_mm')[which]:g}" for axis in AXES) for which in (0, 1))
        yield f"voxel size: {new} mm, in training {old} mm; brought to the model's, they are smoother or sharper"
    elif any(f"extent_{axis}_mm" in shifts.drifted for axis in AXES):
        old, new = (
            " x ".join(f"{shifts.medians(f'extent_{axis}_mm')[which]:.0f}" for axis in AXES) for which in (0, 1)
        )
        yield f"field of view: {new} mm, in training {old} mm"
    if "orientation" in shifts.drifted:
        names = ", ".join(sorted(folder.facts["orientation"]))
        yield (
            f"orientation: files are stored {names}, in training {', '.join(profile.facts['orientation'])}; volumes "
            "are turned when they are read, so this alone does no harm, but says that they came another way"
        )
    if "scanner" in shifts.drifted:
        names = ", ".join(sorted(folder.facts["scanner"]))
        yield f"scanner: {names}; in training {', '.join(profile.facts['scanner'])}"
    if any(name in shifts.drifted for name in _RAW) and not any(shifts[name] for name in _TISSUE):
        yield (
            f"intensity scale: the median in the files is {shifts.times('raw_median')}; normalisation takes that away, "
            "so this alone does the model no harm, but another scaling came in somewhere"
        )


def _of_the_image(shifts: _Shifts) -> Iterator[str]:
    if shifts["noise"] < 0 and (shifts["fine_detail"] < 0 or shifts["sharpness"] < 0):
        yield "blur: finest detail is missing; smoothed, interpolated, thicker slices, or movement"
    if shifts["noise"] > 0:
        yield f"noise: {shifts.times('noise')}"
    if shifts["shading"] > 0:
        yield f"bias field: shading is {shifts.times('shading')}; was it corrected for, as in training?"
