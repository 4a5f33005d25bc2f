"""Generated brains in one plane each: rows are samples, columns are slices through them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figs.page import ROOT, SMALLEST, WIDTH, page
from ldm3d.errors import DataError
from ldm3d.montage import BLACK, PLANES, three_planes
from ldm3d.nifti import read_volume, spacing_of

FOLDER = ROOT / "results" / "sample"
SHOWN, SLICES = 4, 6
LEFT, TOP, GAP = 0.2, 0.2, 0.025
"""Inches for the words beside and above the tiles, and between tiles."""
MINUS = "\N{MINUS SIGN}"
AXES = {"axial": ("z", 2, "RL"), "coronal": ("y", 1, "RL"), "sagittal": ("x", 0, "AP")}
"""Of a plane: the axis across it, that axis's number, and what is on the left and the right of the picture."""
SHARES = {"axial": (0.12, 0.86), "coronal": (0.12, 0.88), "sagittal": (0.14, 0.86)}
"""Between which shares of the brains' extent slices are taken: the outermost show next to nothing."""


def read_samples(folder: Path = FOLDER) -> tuple[list[np.ndarray], tuple[float, float, float]]:
    """The volumes (X, Y, Z) in [0, 1] that `make sample` writes, and their spacing in mm. Raises `DataError`."""
    paths = [folder / f"synimg_0_{number}.nii.gz" for number in range(SHOWN)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such volume; make some: make sample")
    volumes = [read_volume(path) for path in paths]
    return [volume for volume, _ in volumes], spacing_of(volumes[0][1])


def draw_samples(plane: str, volumes: Sequence[np.ndarray], spacing: Sequence[float]) -> Any:
    """Slices of generated volumes, in the radiological convention, with their distance from the volume's middle."""
    name, axis, sides = AXES[plane]
    shown = np.max(volumes, axis=0) > BLACK
    box = [np.flatnonzero(shown.any(axis=tuple({0, 1, 2} - {i}))) for i in range(3)]
    low, high = (box[axis][0] + share * (box[axis][-1] - box[axis][0]) for share in SHARES[plane])
    cut = np.rint(np.linspace(low, high, SLICES)).astype(int)
    inside = tuple(slice(None) if i == axis else slice(where[0], where[-1] + 1) for i, where in enumerate(box))
    ratio = _height_over_width(volumes[0][inside], axis, spacing)
    tile = (WIDTH - LEFT) / SLICES - GAP
    height = TOP + len(volumes) * (tile * ratio + GAP)
    figure, charts = page(height, len(volumes), SLICES, layout=None)
    figure.subplots_adjust(LEFT / WIDTH, 0, 1, 1 - TOP / height, wspace=GAP / tile, hspace=GAP / tile / ratio)
    for number, (volume, row) in enumerate(zip(volumes, charts, strict=True)):
        for place, chart in zip(cut, row, strict=True):
            centre = [n // 2 for n in volume[inside].shape]
            centre[axis] = place
            picture = three_planes(volume[inside], centre)[PLANES.index(plane)]
            chart.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="lanczos")
            chart.set(xticks=[], yticks=[])
            for x, side, align in ((0.03, sides[0], "left"), (0.97, sides[1], "right")):
                chart.text(x, 0.97, side, transform=chart.transAxes, color="#bbbbbb", fontsize=7.5, ha=align, va="top")
            if number == 0:
                mm = (place - (volume.shape[axis] - 1) / 2) * spacing[axis]
                chart.set_title(f"{name} = {mm:+.0f} mm".replace("-", MINUS), fontsize=SMALLEST, pad=3)
        row[0].set_ylabel(f"volume {number}", fontsize=SMALLEST, labelpad=3)
    return figure


def _height_over_width(volume: np.ndarray, axis: int, spacing: Sequence[float]) -> float:
    """Of a plane across an axis, in mm."""
    size = [n * mm for n, mm in zip(volume.shape, spacing, strict=True)]
    width, height = (size[i] for i in range(3) if i != axis)
    return height / width
