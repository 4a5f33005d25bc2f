"""The head of a phantom: its shape, ventricles and sulci, and the tissue maps that follow from them."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ldm3d.phantom_fields import Axes, RandomField
from ldm3d.phantom_template import BRAIN_CENTRE_MNI, Template

# A head larger than this (mm) is made smaller, so that the default grid holds it with an empty voxel all around.
ROOM_MM = np.array([147.0, 198.0, 147.0])


@dataclass(frozen=True)
class Anatomy:
    """What makes one head differ from another; everything in mm, in the subject's space unless said otherwise."""

    matrix: np.ndarray  # (3, 3): from subject to template
    shift: np.ndarray  # (3,): place in the template (mm, MNI) of the subject's origin
    warps: tuple[tuple[float, RandomField], ...]  # (amplitude in mm, field of 3 components)
    ventricles: tuple[float, float]  # widening on the left and on the right, negative to narrow
    sulci: float  # log of how much wider than the template's the outer CSF spaces are
    sulci_field: RandomField
    cortex: float  # log of how much thicker grey matter is
    stem_cut: float  # height at which the brain stem ends (mm, MNI)

    def to_template(self, axes: Axes) -> np.ndarray:
        """Places in the template (3, X, Y, Z), mm MNI, of the grid spanned by `axes`."""
        x, y, z = axes
        m = self.matrix.astype(np.float32)
        linear = (
            m[:, 0, None, None, None] * x[:, None, None]
            + m[:, 1, None, None, None] * y[:, None]
            + m[:, 2, None, None, None] * z
        )
        linear += self.shift.astype(np.float32)[:, None, None, None]
        for amplitude, field in self.warps:
            linear += np.float32(amplitude) * field.on_grid(axes)
        return linear

    def to_subject(self, place: np.ndarray) -> np.ndarray:
        """Where in the subject (3,) the template's `place` (3,) lies, to about 0.1 mm."""
        inverse = np.linalg.inv(self.matrix)
        point: np.ndarray = inverse @ (place - self.shift)
        for _ in range(8):
            bent = sum(amplitude * field.at(point) for amplitude, field in self.warps)
            point = inverse @ (place - self.shift - bent)
        return point


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a head: ranges of size and shape as of adults, a little smaller than the template (which is large)."""
    scale = rng.normal(0.955, 0.025) * (1 + np.clip(rng.normal(0, 0.022, 3), -0.05, 0.05))
    angles = np.deg2rad(np.clip(rng.normal(0, [2.5, 2.0, 2.0]), -5, 5))
    shear = np.eye(3) + np.triu(np.clip(rng.normal(0, 0.018, (3, 3)), -0.04, 0.04), 1)
    age = rng.uniform()
    widening = 6.0 * age**1.5 - 1.2 + rng.normal(0, 0.7)
    asymmetry = rng.normal(0, 0.5)
    return Anatomy(
        matrix=np.linalg.inv(_rotation(angles) @ shear @ np.diag(scale)),
        shift=BRAIN_CENTRE_MNI + np.clip(rng.normal(0, [0.5, 1.5, 0.5]), -2, 2),
        warps=tuple((mm, RandomField(rng, knot, 3)) for knot, mm in ((52.0, 2.2), (26.0, 1.7), (14.0, 1.25))),
        ventricles=(float(np.clip(widening + asymmetry, -1.6, 5.5)), float(np.clip(widening - asymmetry, -1.6, 5.5))),
        sulci=1.1 * age + rng.normal(0.35, 0.25),
        sulci_field=RandomField(rng, 13.0),
        cortex=rng.normal(0.0, 0.12) - 0.15 * age,
        stem_cut=rng.uniform(-63, -57),
    )


def fit(template: Template, anatomy: Anatomy) -> tuple[np.ndarray, float]:
    """Middle of the subject's bounding box (3,), mm, and by how much the head is too large for `ROOM_MM` (at least 1).

    The template's depth tells of a ball of brain around each place looked at, so that a coarse look is exact enough.
    """
    across, along = (np.arange(-half, half + 1, 6.0, dtype=np.float32) for half in (84, 108))
    axes = (across, along, across)
    place = anatomy.to_template(axes)
    depth = _sample(template.depth, place, template.origin)
    depth = np.minimum(depth, place[2] - anatomy.stem_cut)
    ends = []
    for axis, coordinates in enumerate(axes):
        ball = depth.max(tuple({0, 1, 2} - {axis}))
        inside = ball > 0
        ends.append(((coordinates - ball)[inside].min(), (coordinates + ball)[inside].max()))
    low, high = np.array(ends).T
    return (low + high) / 2, float(max(1.0, ((high - low) / ROOM_MM).max()))


def _rotation(angles: np.ndarray) -> np.ndarray:
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    rotation: np.ndarray = about_z @ about_y @ about_x
    return rotation


@dataclass(frozen=True)
class Tissue:
    """Maps of one subject on its own grid, each (X, Y, Z) float32.

    `csf`, `grey` and `white` are fractions of the voxel; their sum `brain` is below 1 only at the surface.
    `ventricle` is a fraction, `halo` nearness to a ventricle, `detail` as in `Template`, `across` the signed distance
    from the plane between the hemispheres in mm (right is positive).
    """

    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    brain: np.ndarray
    ventricle: np.ndarray
    halo: np.ndarray
    detail: np.ndarray
    across: np.ndarray


def tissue_maps(template: Template, anatomy: Anatomy, push: np.ndarray, axes: Axes) -> Tissue:
    """What is where in this head.

    Args:
        template: maps for the grid's spacing.
        anatomy: the head.
        push: (3, X, Y, Z) mm, what a tumour's mass effect adds to a place, as if nothing held it up.
        axes: coordinates of the grid in mm.
    """
    everywhere = anatomy.to_template(axes)
    depth = _sample(template.depth, everywhere, template.origin)
    # The skull does not give way: the tumour's push fades towards the surface of the brain. So the brain stays where
    # it is already seen to be, and the rest is sampled there alone.
    near = ndimage.binary_dilation(depth > 0)
    pushed = np.einsum("ij,jn->in", anatomy.matrix.astype(np.float32), push[:, near])
    place = everywhere[:, near] + pushed * np.clip(depth[near] / 15, 0, 1)
    right = 0.5 + 0.5 * np.tanh(place[0] / 6)
    widening_left, widening_right = anatomy.ventricles
    inwards = np.stack([_sample(component, place, template.origin) for component in template.widening])
    place += (widening_left + (widening_right - widening_left) * right) * inwards
    csf, grey, white, ventricle, detail = (_sample(volume, place, template.origin) for volume in template.maps)
    brain = (csf + grey + white) * np.clip((place[2] - anatomy.stem_cut) / 3 + 0.5, 0, 1)
    brain *= _one_piece(brain > 0.3, near)
    csf *= np.exp(np.clip(anatomy.sulci + 0.7 * anatomy.sulci_field.on_grid(axes)[0][near], -1.0, 2.2))
    grey *= np.float32(np.exp(anatomy.cortex))
    csf, grey, white = np.stack([csf, grey, white]) * brain / np.maximum(csf + grey + white, 1e-6)
    halo = _sample(template.halo, place, template.origin)
    maps = np.zeros((8, *near.shape), np.float32)
    maps[:, near] = csf, grey, white, brain, ventricle, halo, detail, place[0]
    return Tissue(*maps)


def _one_piece(brain: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The largest connected part of `brain` (N,), given at the N voxels of `where` (X, Y, Z)."""
    volume = np.zeros(where.shape, bool)
    volume[where] = brain
    parts, count = ndimage.label(volume)
    if count > 1:
        volume = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    largest: np.ndarray = volume[where]
    return largest


def _sample(volume: np.ndarray, place: np.ndarray, origin: np.ndarray) -> np.ndarray:
    index = place + origin.astype(np.float32).reshape(3, *[1] * (place.ndim - 1))
    values: np.ndarray = ndimage.map_coordinates(
        volume, index, order=1, mode="constant", output=np.float32, prefilter=False
    )
    return values
