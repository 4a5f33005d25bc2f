"""What a scanner makes of a phantom's tissue: four contrasts, shading, noise, units."""

import numpy as np

from ldm3d.phantom_anatomy import Tissue
from ldm3d.phantom_fields import Axes, RandomField


def _signal(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Signal of each tissue per contrast, white matter of T1w being 1, after the look of BraTS scans.
#                  FLAIR  T1w  t1gd  T2w
WHITE = _signal(0.52, 1.00, 1.00, 0.50)
GREY = _signal(0.68, 0.72, 0.74, 0.72)
CSF = _signal(0.12, 0.25, 0.26, 1.30)
EDEMA = _signal(1.02, 0.70, 0.70, 1.00)
NECROSIS = _signal(0.62, 0.46, 0.42, 1.10)
RIM = _signal(0.88, 0.66, 1.55, 0.82)
# How strongly the template's own T1 detail shows in each contrast, and a bright lining of wide ventricles.
DETAIL = _signal(-0.45, 1.00, 1.00, -0.55)
LINING = _signal(0.45, -0.05, -0.05, 0.25)
# Standard deviation of the noise in units of white matter's signal.
NOISE = 0.013


def scan(rng: np.random.Generator, axes: Axes, tissue: Tissue, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The contrasts FLAIR, T1w, t1gd, T2w as (4, X, Y, Z) float32, in scanner units, 0 outside the brain.

    Args:
        rng: source of the subject's signals, of shading and noise; used last, since noise depends on the grid.
        axes: coordinates of the grid in mm.
        tissue: the head.
        parts: fractions of the voxel that are "edema", "necrosis" and "rim".
    """
    grey, csf = _jitter(rng, GREY, 0.025), _jitter(rng, CSF, 0.06)
    sick = {
        "edema": _jitter(rng, EDEMA, 0.06),
        "necrosis": _jitter(rng, NECROSIS, 0.12),
        "rim": _jitter(rng, RIM, 0.08),
    }
    lining, unit = np.float32(rng.uniform(0, 0.5)), rng.uniform(350, 900, 4).astype(np.float32)
    shade = RandomField(rng, 90.0, 5).on_grid(axes)
    texture = RandomField(rng, 9.0, 2).on_grid(axes)
    grain = {"edema": 0.06 * texture[1], "necrosis": 0.12 * texture[1], "rim": 0.09 * texture[0]}
    solid = tissue.grey + tissue.white
    remaining = 1 - sum(parts.values())
    images = np.empty((4, *solid.shape), np.float32)
    for c in range(4):
        signal = WHITE[c] * tissue.white + grey[c] * tissue.grey + csf[c] * tissue.csf
        signal += (DETAIL[c] * tissue.detail + LINING[c] * lining * tissue.halo) * solid
        signal *= (1 + 0.012 * texture[0]) * remaining
        for name, fraction in parts.items():
            signal += sick[name][c] * (1 + grain[name]) * fraction * tissue.brain
        signal *= np.exp(0.035 * shade[4] + 0.025 * shade[c])
        images[c] = _rician(rng, signal, NOISE * WHITE[c]) * (tissue.brain > 0) * unit[c]
    return images


def _jitter(rng: np.random.Generator, signal: np.ndarray, spread: float) -> np.ndarray:
    return signal * np.exp(np.clip(rng.normal(0, spread, len(signal)), -0.2, 0.2)).astype(np.float32)


def _rician(rng: np.random.Generator, signal: np.ndarray, sigma: np.floating) -> np.ndarray:
    """Magnitude of a complex signal with Gaussian noise in both parts (Gudbjartsson and Patz 1995)."""
    real, imaginary = rng.standard_normal((2, *signal.shape), dtype=np.float32) * np.float32(sigma)
    magnitude: np.ndarray = np.hypot(signal + real, imaginary)
    return magnitude
