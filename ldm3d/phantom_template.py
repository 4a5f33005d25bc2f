"""The anatomy that every phantom is bent from: the ICBM152 2009 template, prepared once in a process."""

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ldm3d.errors import DataError

FILE_NAME = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
# Position of MNI (0, 0, 0) in the template's grid of 1 mm voxels.
MNI_ORIGIN = np.array([98.0, 134.0, 72.0])
# Middle of the bounding box of the brain (mm, MNI), the lowest part of the brain stem left out.
BRAIN_CENTRE_MNI = np.array([0.0, -17.0, 9.5])
# Room kept around the brain so that a sample just outside meets zeros, not the edge of the array.
PADDING = 4
# The template is an average of 152 heads, its borders are soft. This exponent makes them those of one head.
SHARPNESS = 2.2
# Mean template T1 intensity of pure CSF, grey and white matter, as measured where one map exceeds 0.9.
TEMPLATE_T1 = (68.0, 166.0, 222.0)


@dataclass(frozen=True)
class Template:
    """Template maps, cropped to the brain, 1 mm voxels, smoothed for one output spacing.

    Attributes:
        maps: (5, I, J, K) float32: fractions of CSF, grey and white matter (they sum to 1 inside the brain and to 0
            outside), the fraction that is ventricle, and the T1 detail that the three classes do not explain
            (in units of white matter's T1).
        halo: (I, J, K) float32, in [0, 1]: how near a ventricle is, seen over about 4 mm.
        widening: (3, I, J, K) float32: towards the inside of the ventricles, longest vector 1.
        depth: (I, J, K) float32: distance to the surface of the brain in mm, 0 outside.
        origin: position of MNI (0, 0, 0) in these arrays, in voxels.
    """

    maps: np.ndarray
    halo: np.ndarray
    widening: np.ndarray
    depth: np.ndarray
    origin: np.ndarray


@lru_cache(maxsize=2)
def load_template(spacing: float) -> Template:
    """The template ready to be sampled on a grid of `spacing` mm without aliasing.

    Source: Fonov et al. 2009, ICBM152 2009a non-linear symmetric, as shipped in nilearn.

    Raises:
        DataError: nilearn is not installed, or ships other files than it did.
    """
    fine = _fine_template()
    # Blur as much as the mean over an output voxel does, beyond the template's own 1 mm.
    sigma = np.sqrt(max(spacing**2 - 1.0, 0.0) / 12)
    return replace(fine, maps=np.stack([ndimage.gaussian_filter(volume, sigma) for volume in fine.maps]))


@lru_cache(maxsize=1)
def _fine_template() -> Template:
    t1, grey, white = (_read(kind) for kind in ("t1", "gm", "wm"))
    brain = ndimage.binary_fill_holes(t1 > 0)
    places = np.argwhere(brain)
    low, high = places.min(0), places.max(0) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    t1, grey, white, brain = (np.pad(volume[box], PADDING) for volume in (t1, grey / 255, white / 255, brain))
    fractions = np.stack([np.clip(1 - grey - white, 0, 1), grey, white]) * brain
    detail = _unexplained(t1, fractions) * brain
    fractions = _sharpen(fractions) * brain
    origin = MNI_ORIGIN - low + PADDING
    depth = ndimage.distance_transform_edt(brain).astype(np.float32)
    ventricle = _ventricles(fractions[0], depth, origin)
    return Template(
        maps=np.stack([*fractions, ventricle * fractions[0], detail]).astype(np.float32),
        halo=np.clip(2.0 * ndimage.gaussian_filter(ventricle, 2.5), 0, 1),
        widening=_inwards(ventricle),
        depth=depth,
        origin=origin,
    )


def _read(kind: str) -> np.ndarray:
    # nilearn's own loader is not used: importing nilearn.datasets takes seconds and looks for a network.
    try:
        folder = Path(str(resources.files("nilearn"))) / "datasets" / "data"
        return np.asarray(nib.load(folder / FILE_NAME.format(kind)).dataobj).astype(np.float32)
    except (ModuleNotFoundError, OSError) as error:
        raise DataError(
            f"the brain template of the embedded data set cannot be read ({error}); pip install nilearn brings it"
        ) from error


def _unexplained(t1: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """What the T1 template shows beyond three flat classes: deep nuclei, brain stem, myelin of the cortex."""
    expected = sum(value * fraction for value, fraction in zip(TEMPLATE_T1, fractions, strict=True))
    detail: np.ndarray = np.clip((t1 - expected) / TEMPLATE_T1[2], -0.15, 0.15).astype(np.float32)
    return detail


def _sharpen(fractions: np.ndarray) -> np.ndarray:
    powered = np.maximum(fractions, 1e-3) ** SHARPNESS
    sharpened: np.ndarray = (powered / powered.sum(0)).astype(np.float32)
    return sharpened


def _ventricles(csf: np.ndarray, depth: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Lateral and third ventricles: the CSF that hangs together around the lateral ventricles, deep inside."""
    x, y, z = (np.arange(n, dtype=np.float32) - o for n, o in zip(csf.shape, origin, strict=True))
    inside = (np.abs(x) < 42)[:, None, None] & ((y > -58) & (y < 42))[:, None] & ((z > -16) & (z < 34))
    # The cisterns behind and below the third ventricle are CSF too, but not ventricle.
    inside &= ~((np.abs(x) < 7)[:, None, None] & ((y < -24) | (y > 24))[:, None])
    parts, _ = ndimage.label((csf > 0.5) & (depth > 14) & inside)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    large = np.flatnonzero(sizes > 600)
    ventricle: np.ndarray = ndimage.binary_dilation(np.isin(parts, large), iterations=2) & (csf > 0.1)
    return ventricle.astype(np.float32)


def _inwards(ventricle: np.ndarray) -> np.ndarray:
    field = np.stack(np.gradient(ndimage.gaussian_filter(ventricle, 5.0)))
    inwards: np.ndarray = (field / np.sqrt((field**2).sum(0)).max()).astype(np.float32)
    return inwards
