"""Fresh phantoms as they are, and changed as other scanners and other hands would change them."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ldm3d.phantom import Phantom
from ldm3d.volumes import resample

Changed = tuple[np.ndarray, np.ndarray]
FLAIR, T1, T1GD, T2 = range(4)


def contrast(phantom: Phantom, channel: int) -> Changed:
    # As the embedded data set stores them.
    return np.rint(phantom.image[channel]).astype(np.float32), phantom.affine


def as_it_is(phantom: Phantom, random: np.random.Generator) -> Changed:
    return contrast(phantom, FLAIR)


def t1(phantom: Phantom, random: np.random.Generator) -> Changed:
    return contrast(phantom, T1)


def t1gd(phantom: Phantom, random: np.random.Generator) -> Changed:
    return contrast(phantom, T1GD)


def t2(phantom: Phantom, random: np.random.Generator) -> Changed:
    return contrast(phantom, T2)


def blur(phantom: Phantom, random: np.random.Generator) -> Changed:
    """A Gaussian of 0.6 voxels standard deviation: 4.5 mm wide at half its height."""
    image, affine = contrast(phantom, FLAIR)
    return ndimage.gaussian_filter(image, 0.6), affine


def noise(phantom: Phantom, random: np.random.Generator) -> Changed:
    """Rician noise of 3 % of the brightest tissue, about three times that of the phantoms."""
    image, affine = contrast(phantom, FLAIR)
    sigma = 0.03 * np.percentile(image, 99.5)
    real, imaginary = random.normal(0, sigma, (2, *image.shape))
    return np.where(image > 0, np.hypot(image + real, imaginary), 0).astype(np.float32), affine


def bias_field(phantom: Phantom, random: np.random.Generator) -> Changed:
    """From 40 % brighter to 40 % darker, corner to corner of the grid, in another direction for each volume."""
    image, affine = contrast(phantom, FLAIR)
    direction = random.normal(size=3)
    direction /= np.abs(direction).sum()
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    ramp = sum(d * axis for d, axis in zip(direction, axes, strict=True))
    return (image * (1 + 0.4 * ramp)).astype(np.float32), affine


def spacing(phantom: Phantom, random: np.random.Generator) -> Changed:
    """Voxels of 4 mm instead of 3.2."""
    image, _ = contrast(phantom, FLAIR)
    return resample(image, (3.2,) * 3, (4.0,) * 3), np.diag([4.0, 4.0, 4.0, 1.0])


def intensity_scale(phantom: Phantom, random: np.random.Generator) -> Changed:
    """Twice as bright."""
    image, affine = contrast(phantom, FLAIR)
    return 2 * image, affine


def front_to_back(phantom: Phantom, random: np.random.Generator) -> Changed:
    """Voxels mirrored, while the header says what it said."""
    image, affine = contrast(phantom, FLAIR)
    return image[:, ::-1].copy(), affine


def upside_down(phantom: Phantom, random: np.random.Generator) -> Changed:
    image, affine = contrast(phantom, FLAIR)
    return image[:, :, ::-1].copy(), affine


def axes_exchanged(phantom: Phantom, random: np.random.Generator) -> Changed:
    """Sagittal slices that the header takes for axial ones."""
    image, affine = contrast(phantom, FLAIR)
    return image.transpose(2, 1, 0).copy(), affine


CHANGES: dict[str, Callable[[Phantom, np.random.Generator], Changed]] = {
    "as it is": as_it_is,
    "contrast T1": t1,
    "contrast T1 with gadolinium": t1gd,
    "contrast T2": t2,
    "blur": blur,
    "noise": noise,
    "bias field": bias_field,
    "spacing": spacing,
    "intensity scale": intensity_scale,
    "front to back": front_to_back,
    "upside down": upside_down,
    "axes exchanged": axes_exchanged,
}
