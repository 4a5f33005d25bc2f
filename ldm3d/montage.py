"""Pictures by which a person can judge volumes: three planes of each, rows that can be compared, on black.

Planes are upright (front or top of the head upwards) and in the radiological convention: the patient's right is on the
left of axial and coronal planes, the face is on the left of the sagittal plane.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ldm3d.files import atomic_path

PLANES = ("axial", "coronal", "sagittal")
# Red, yellow, cyan, green, magenta, orange: far apart from grey and from each other.
LABEL_COLOURS = ((255, 64, 64), (255, 214, 10), (64, 200, 255), (80, 220, 100), (230, 90, 230), (255, 150, 40))
LABEL_ALPHA = 0.25
LIGHT, GREY = (235, 235, 235), (150, 150, 150)
PICTURE_WIDTH, HIGHEST_TILE = 1800, 380
MARGIN, GAP, GROUP_GAP = 14, 6, 26
# Letters of at least 7 points where the picture is shown 800 pixels wide, as pages on the web do.
TITLE, NAME, CAPTION, SIDE = 28, 25, 22, 21
# What nobody can tell from black on a screen.
BLACK = 0.02


@dataclass(frozen=True)
class Cell:
    """One volume of a montage, with what is to be said about it.

    Args:
        volume: (X, Y, Z) in RAS; [0, 1] is black to white.
        label: (X, Y, Z) integers, 0 is background; drawn over the volume.
        caption: a few words above the planes.
        centre: voxel (x, y, z) through which the planes go; if None where the label is largest, else the middle.
        spacing: voxel size in mm (3), where it is not that of the whole picture.
    """

    volume: Any
    label: Any = None
    caption: str = ""
    centre: Sequence[int] | None = None
    spacing: Sequence[float] | None = None


def as_volume(volume: Any) -> np.ndarray:
    """Array or tensor of (X, Y, Z), or of (1, X, Y, Z) and more leading ones, as float32 (X, Y, Z) in memory.

    Raises:
        ValueError: it is more or less than one volume.
    """
    array = volume.detach().float().cpu().numpy() if isinstance(volume, torch.Tensor) else np.asarray(volume)
    if array.ndim < 3 or array.size != np.prod(array.shape[-3:]):
        raise ValueError(f"shape {array.shape} is not that of one volume (X, Y, Z)")
    return array.reshape(array.shape[-3:]).astype(np.float32, copy=False)


def three_planes(volume: Any, centre: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The axial, coronal and sagittal plane through a voxel, as pictures whose first row is at the top.

    Args:
        volume: (X, Y, Z) in RAS.
        centre: voxel (x, y, z); the middle of the volume if None.

    Returns:
        axial (Y, X), coronal (Z, X) and sagittal (Z, Y).
    """
    volume = as_volume(volume)
    x, y, z = centre if centre is not None else [n // 2 for n in volume.shape]
    flipped = volume[::-1, ::-1, ::-1]
    z, y, x = (n - 1 - i for n, i in zip(volume.shape[::-1], (z, y, x), strict=True))
    return flipped[:, :, z].T, flipped[:, y, :].T, flipped[x].T


def largest_slices(label: Any) -> tuple[int, int, int] | None:
    """The voxel through which the three planes show most of a label (X, Y, Z); None where there is no label."""
    mask = as_volume(label) > 0
    if not mask.any():
        return None
    x, y, z = (int(mask.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))
    return x, y, z


def window(volume: Any, low: float = 0.5, high: float = 99.5) -> np.ndarray:
    """Map percentiles of what is not background to black and white.

    Args:
        volume: (X, Y, Z), any range; values that are not finite become black.
        low: percentile shown as black.
        high: percentile shown as white.

    Returns:
        (X, Y, Z) float32 in [0, 1].
    """
    volume = as_volume(volume)
    finite = np.isfinite(volume)
    values = volume[finite & (volume != 0)]
    if not values.size:
        return np.zeros_like(volume)
    black, white = np.percentile(values, (low, high))
    # Without negative values 0 is air: leave it black, and do not stretch noise in a nearly uniform volume.
    black = min(black, 0.0) if values.min() >= 0 else black
    shown = (np.where(finite, volume, black) - black) / max(white - black, 1e-12)
    grey: np.ndarray = shown.clip(0, 1).astype(np.float32)
    return grey


def tensorboard_image(original: Any, reconstruction: Any, spacing: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """Three planes of a volume, and below them those of its reconstruction, for `Tracker.image`.

    Args:
        original: (X, Y, Z) or (1, X, Y, Z) in [0, 1], array or tensor on any device.
        reconstruction: the same.
        spacing: voxel size in mm (3).

    Returns:
        (1, H, W) float32 in [0, 1].
    """
    rows = []
    for volume in (original, reconstruction):
        cell = _settled(Cell(volume), spacing)
        rows.append(_beside(_tiles(cell, _pixels_per_mm([cell], PICTURE_WIDTH // 2)), GAP))
    picture = np.asarray(_below(rows, GAP).convert("L"), dtype=np.float32) / 255
    return picture[None]


def montage(
    rows: Mapping[str, Sequence[Any]],
    spacing: Sequence[float],
    path: str | Path,
    title: str | None = None,
    per_line: int = 4,
) -> None:
    """Draw rows of volumes, three planes each, and write the picture atomically as PNG.

    Args:
        rows: what stands before a row -> its volumes: (X, Y, Z) in [0, 1], or `Cell`s with label and caption.
        spacing: voxel size in mm (3); planes are drawn in true proportions.
        path: where to write.
        title: a line above everything.
        per_line: volumes side by side; a row with more goes on below.

    Raises:
        OutputError: the file cannot be written.
    """
    cells = {name: [v if isinstance(v, Cell) else Cell(v) for v in volumes] for name, volumes in rows.items()}
    widest = max(1, min(per_line, max(map(len, cells.values()), default=1)))
    boxes = _boxes([cell for row in cells.values() for cell in row])
    cells = {
        name: [_settled(cell, spacing, boxes[as_volume(cell.volume).shape]) for cell in row]
        for name, row in cells.items()
    }
    everything = [cell for row in cells.values() for cell in row]
    width = (PICTURE_WIDTH - 2 * MARGIN - (widest - 1) * GROUP_GAP) // widest
    scale = _pixels_per_mm(everything, width)
    lines = [_text(title, TITLE, LIGHT)] if title else []
    for name, row in cells.items():
        lines.append(_text(name, NAME, LIGHT))
        for start in range(0, len(row), per_line):
            groups = [_group(cell, scale) for cell in row[start : start + per_line]]
            lines.append(_beside(groups, GROUP_GAP, align="top"))
    picture = _below(lines, GAP)
    page = Image.new("RGB", (picture.width + 2 * MARGIN, picture.height + 2 * MARGIN))
    page.paste(picture, (MARGIN, MARGIN))
    is_grey = all(cell.label is None for cell in everything)
    with atomic_path(path) as temporary:
        # Grey and lightly compressed: a third of the time, and no larger than coloured and well compressed.
        page.convert("L" if is_grey else "RGB").save(temporary, format="PNG", compress_level=1 if is_grey else 6)


def _boxes(cells: Sequence[Cell]) -> dict[tuple[int, ...], tuple[slice, ...]]:
    """What of each grid is not black in any of its volumes, so that no room is spent on air."""
    seen: dict[tuple[int, ...], np.ndarray] = {}
    for cell in cells:
        volume = as_volume(cell.volume)
        mask = seen.setdefault(volume.shape, np.zeros(volume.shape, dtype=bool))
        mask |= volume > BLACK
        mask[_centre(cell)] = True
        if cell.label is not None:
            mask |= as_volume(cell.label) > 0
    return {shape: ndimage.find_objects(mask.view(np.int8))[0] for shape, mask in seen.items()}


def _centre(cell: Cell) -> tuple[int, int, int]:
    if cell.centre is not None:
        x, y, z = map(int, cell.centre)
    elif cell.label is not None and (largest := largest_slices(cell.label)):
        return largest
    else:
        x, y, z = (n // 2 for n in as_volume(cell.volume).shape)
    return x, y, z


def _settled(cell: Cell, spacing: Sequence[float], box: tuple[slice, ...] | None = None) -> Cell:
    """The cell cut to a box, with the planes' centre and the spacing decided."""
    volume = as_volume(cell.volume)
    box = box or tuple(slice(0, n) for n in volume.shape)
    x, y, z = (c - s.start for c, s in zip(_centre(cell), box, strict=True))
    label = None if cell.label is None else as_volume(cell.label)[box]
    return Cell(volume[box], label, cell.caption, (x, y, z), cell.spacing or spacing)


def _plane_sizes_mm(cell: Cell) -> list[tuple[float, float]]:
    """Width and height in mm of the three planes."""
    x, y, z = (n * s for n, s in zip(cell.volume.shape, cell.spacing or (1, 1, 1), strict=True))
    return [(x, y), (x, z), (y, z)]


def _pixels_per_mm(cells: Sequence[Cell], width: int) -> float:
    """The largest scale at which three planes of every volume fit into `width` and none is too high."""
    scale = float("inf")
    for cell in cells:
        sizes = _plane_sizes_mm(cell)
        across = (width - 2 * GAP) / sum(w for w, _ in sizes)
        scale = min(scale, across, HIGHEST_TILE / max(h for _, h in sizes))
    return scale


def _group(cell: Cell, scale: float) -> Image.Image:
    """Caption and three planes."""
    tiles = _tiles(cell, scale)
    for tile, name in zip(tiles, PLANES, strict=True):
        _mark_sides(tile, "A" if name == "sagittal" else "R", "P" if name == "sagittal" else "L")
    planes = _beside(tiles, GAP)
    if not cell.caption:
        return planes
    return _below([_text(cell.caption, CAPTION, GREY, planes.width), planes], GAP // 2)


def _mark_sides(tile: Image.Image, left: str, right: str) -> None:
    """Letters in the upper corners, where a head leaves room."""
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(SIDE)
    draw.text((2, 1), left, GREY, font, anchor="lt")
    draw.text((tile.width - 2, 1), right, GREY, font, anchor="rt")


def _tiles(cell: Cell, scale: float) -> list[Image.Image]:
    """The three planes of a settled cell as RGB pictures in true proportions, label drawn over them."""
    sizes = [(max(1, round(w * scale)), max(1, round(h * scale))) for w, h in _plane_sizes_mm(cell)]
    tiles = []
    for index, size in enumerate(sizes):
        grey = _resize(three_planes(cell.volume, cell.centre)[index], size, Image.Resampling.LANCZOS).clip(0, 1)
        tile = np.repeat(grey[..., None] * 255, 3, axis=2)
        if cell.label is not None:
            label = _resize(three_planes(cell.label, cell.centre)[index], size, Image.Resampling.NEAREST)
            tile = _overlay(tile, label)
        tiles.append(Image.fromarray(tile.round().astype(np.uint8)))
    return tiles


def _resize(plane: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, resampling))


def _overlay(tile: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Tint each label and draw its outline, so that what lies under it can still be seen."""
    for value in np.unique(label[label > 0]):
        colour = np.array(LABEL_COLOURS[(round(float(value)) - 1) % len(LABEL_COLOURS)], dtype=tile.dtype)
        mask = label == value
        tile[mask] = (1 - LABEL_ALPHA) * tile[mask] + LABEL_ALPHA * colour
        tile[mask & ~ndimage.binary_erosion(mask, border_value=1)] = colour
    return tile


def _text(text: str, size: int, colour: tuple[int, int, int], width: int | None = None) -> Image.Image:
    """One line of text as a picture; shortened with an ellipsis where it is wider than `width`."""
    font = ImageFont.load_default(size)
    while width and len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    image = Image.new("RGB", (int(font.getlength(text)) + 2, round(size * 1.4)))
    ImageDraw.Draw(image).text((0, image.height // 2), text, colour, font, anchor="lm")
    return image


def _beside(images: Sequence[Image.Image], gap: int, align: str = "middle") -> Image.Image:
    height = max((i.height for i in images), default=1)
    page = Image.new("RGB", (max(1, sum(i.width for i in images) + gap * (len(images) - 1)), height))
    left = 0
    for image in images:
        page.paste(image, (left, (height - image.height) // 2 if align == "middle" else 0))
        left += image.width + gap
    return page


def _below(images: Sequence[Image.Image], gap: int) -> Image.Image:
    width = max((i.width for i in images), default=1)
    page = Image.new("RGB", (width, max(1, sum(i.height for i in images) + gap * (len(images) - 1))))
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height + gap
    return page
