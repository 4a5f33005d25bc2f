"""The tumour of a phantom: where it starts, how it grows, what it displaces."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from ldm3d.phantom_anatomy import Tissue
from ldm3d.phantom_fields import Axes, RandomField
from ldm3d.phantom_template import load_template

# Edema fades into white matter over about this many mm; the solid tumour's border is as sharp as the voxel allows.
EDEMA_SOFT_MM = 2.0
EDEMA_LABEL, CORE_LABEL, RIM_LABEL = 1, 2, 3


@dataclass(frozen=True)
class Tumour:
    """A tumour as functions of space (mm, the subject's).

    Attributes:
        centre: (3,) where it started.
        side: -1 in the left hemisphere, 1 in the right.
        stretch: (3, 3) from space to a space where it would be a ball.
        radius: of that ball.
        rim: thickness of the enhancing rim.
        reach: how far edema spreads beyond the core in white matter.
        push_mm: how far the tissue at its edge is displaced.
        shape: two fields, coarse and fine, that make the outline irregular.
        fingers: a field that makes edema advance unevenly.
    """

    centre: np.ndarray
    side: float
    stretch: np.ndarray
    radius: float
    rim: float
    reach: float
    push_mm: float
    shape: tuple[RandomField, RandomField]
    fingers: RandomField

    def _ball(self, axes: Axes) -> tuple[np.ndarray, np.ndarray]:
        """Offset from the centre (3, X, Y, Z) and distance in the stretched space (X, Y, Z), mm."""
        offset = np.stack(
            np.meshgrid(*(a - np.float32(c) for a, c in zip(axes, self.centre, strict=True)), indexing="ij")
        )
        stretched = np.einsum("ij,jxyz->ixyz", self.stretch.astype(np.float32), offset)
        return offset, np.sqrt((stretched**2).sum(0))

    def push(self, axes: Axes) -> np.ndarray:
        """Mass effect: what to add to a place (3, X, Y, Z) to find the tissue that was pushed there, mm."""
        offset, distance = self._ball(axes)
        ratio = distance / self.radius
        strength = self.push_mm / self.radius * np.exp((1 - ratio**2) / 2 * 0.6)
        return -offset * strength

    def grow(self, axes: Axes, tissue: Tissue, spacing: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Fractions of the voxel that are edema, necrosis and rim, and the labels (X, Y, Z) uint8.

        Tumour replaces brain but not ventricles; edema follows white matter, is held up by grey matter, and crosses
        neither CSF nor, but for the corpus callosum, to the other hemisphere.
        """
        _, distance = self._ball(axes)
        coarse, fine, fingers = (field.on_grid(axes)[0] for field in (*self.shape, self.fingers))
        # Irregular outside, but there is always a core: the middle is spared.
        uneven = np.clip(distance / (0.6 * self.radius), 0, 1) * (0.26 * coarse + 0.13 * fine)
        inside = self.radius * (1 + uneven) - distance
        beyond = np.maximum(-self.side * tissue.across, 0)
        inside -= 1.5 * beyond
        soft = max(0.3 * spacing, 0.4)
        core = _sigmoid(inside / soft) * np.clip(1 - 1.5 * tissue.ventricle, 0, 1)
        thickness = np.minimum(self.rim * np.clip(1 + 0.45 * fine + 0.3 * fingers, 0.5, 2.2), 0.55 * self.radius)
        dead = _sigmoid((inside - thickness) / soft)
        white = tissue.white / np.maximum(tissue.brain, 1e-6)
        spread = inside + self.reach * np.clip(1 + 0.45 * fingers, 0.2, 2) - (self.reach + 4) * 1.1 * (1 - white)
        swollen = _sigmoid(spread / max(soft, EDEMA_SOFT_MM)) * (1 - core) * np.clip(1 - 1.6 * tissue.csf, 0, 1)
        swollen *= _hangs_together((swollen + core > 0.5) & (tissue.brain > 0.5), core > 0.5)
        parts = {"edema": 0.9 * swollen, "necrosis": core * dead, "rim": core * (1 - dead)}
        return parts, _labels(core, dead, swollen, tissue.brain)


def draw_tumour(rng: np.random.Generator, to_subject: Callable[[np.ndarray], np.ndarray]) -> Tumour:
    """Draw a tumour that starts in the white matter of either hemisphere.

    Args:
        rng: source of every choice.
        to_subject: brings a place in the template to the subject's space.
    """
    places = tumour_starts()
    place = places[rng.integers(len(places))] + rng.uniform(-1, 1, 3)
    radius = float(8.5 + 15 * rng.beta(1.3, 1.8))
    axes_ratio = np.exp(np.clip(rng.normal(0, 0.2, 3), -0.4, 0.4))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return Tumour(
        centre=to_subject(place),
        side=float(np.sign(place[0])),
        stretch=turn @ np.diag(axes_ratio / np.prod(axes_ratio) ** (1 / 3)) @ turn.T,
        radius=radius,
        rim=float(rng.uniform(3.0, 3.5 + 0.15 * radius)),
        reach=float(rng.uniform(5, 22)),
        push_mm=float(radius * rng.uniform(0.08, 0.3)),
        shape=(RandomField(rng, max(0.8 * radius, 9.0)), RandomField(rng, 7.0)),
        fingers=RandomField(rng, 10.0),
    )


@lru_cache(maxsize=1)
def tumour_starts() -> np.ndarray:
    """Places (N, 3), mm MNI, where a tumour may start: white matter of the hemispheres, not next to the surface.

    Taken from the template at 1 mm whatever the output's spacing, so that a subject keeps its tumour at any spacing.
    """
    template = load_template(1.0)
    voxels = np.argwhere((template.maps[2] > 0.6) & (template.depth > 9) & (template.halo < 0.3))
    places = voxels - template.origin
    x, _, z = places.T
    hemisphere = (np.abs(x) > 13) & ((z > -8) | ((np.abs(x) > 28) & (z > -28)))
    starts: np.ndarray = places[hemisphere][::7].astype(np.float64)
    return starts


def _sigmoid(value: np.ndarray) -> np.ndarray:
    share: np.ndarray = 1 / (1 + np.exp(-np.clip(2 * value, -30, 30)))
    return share


def _hangs_together(candidate: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Where edema may be: the parts of `candidate` that reach the core, and the soft edge around them."""
    parts, _ = ndimage.label(candidate | core)
    touched = np.unique(parts[core])
    where: np.ndarray = ndimage.binary_dilation(np.isin(parts, touched[touched > 0]))
    return where


def _labels(core: np.ndarray, dead: np.ndarray, swollen: np.ndarray, brain: np.ndarray) -> np.ndarray:
    label = np.zeros(core.shape, np.uint8)
    label[swollen > 0.5] = EDEMA_LABEL
    label[core > 0.5] = RIM_LABEL
    label[(core > 0.5) & (dead > 0.5)] = CORE_LABEL
    label[brain < 0.5] = 0
    return label
