"""What all pictures have in common: size, letters, colours, and how they are written.

The README shows a picture about 800 pixels wide, which is as wide as `WIDTH` inches on paper.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm3d.errors import DataError
from ldm3d.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, DPI = 8.0, 150
SMALLEST = 8.0
"""Points of the smallest letters."""
CHARACTERS = 120
"""Of these letters, in a line."""
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
"""Told apart by the colour-blind (Okabe and Ito 2008; Tol 2021), and beside each other in grey by their line styles."""
GREY = "#595959"
STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "legend.fontsize": SMALLEST,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    # Opaque: pages in dark mode would swallow black letters.
    "figure.facecolor": "white",
}
SOURCES = "Sources"
"""Text in a PNG file: name and digest of everything that it was drawn from."""


def page(
    height: float, rows: int = 1, columns: int = 1, layout: Any = "constrained", **more: Any
) -> tuple[Figure, Any]:
    """A figure as wide as the README shows, so many inches high, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    return figure, figure.subplots(rows, columns, **more)


def foot(figure: Any, text: str) -> None:
    """Lines at the foot: which command measured this, when and where."""
    lines = [line for paragraph in text.splitlines() for line in wrap(paragraph, CHARACTERS)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=SMALLEST, color=GREY)


def made_by(made: dict[str, Any]) -> str:
    """The `made` of a benchmark's result as one line."""
    machine = made["machine"]
    load = f", load {machine['load']:.0f}" if machine["load"] > machine["cores"] else ""
    return (
        f"{made['command']}, {made['date'][:10]}, {machine['cores']} cores, {machine['cpu']}{load}, "
        f"torch {machine['torch'].split('+')[0]}"
    )


def as_image(figure: Figure) -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return Image.open(buffer)


def write(image: Image.Image, path: Path, sources: Sequence[Path], greys: int = 0) -> None:
    """Write a small PNG file that says what it was drawn from.

    Args:
        image: any.
        path: where to.
        sources: of what names and digests are noted.
        greys: write so many evenly spaced greys; if 0, the 256 colours that suit the image best.
    """
    text = PngInfo()
    text.add_text(SOURCES, digests(sources))
    if greys:
        small = image.convert("L").point([round(round(v * (greys - 1) / 255) * 255 / (greys - 1)) for v in range(256)])
    else:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with atomic_path(path) as temporary:
        small.save(temporary, format="PNG", optimize=True, pnginfo=text, dpi=(DPI, DPI))


def digests(sources: Iterable[Path]) -> str:
    """Names, from the root, and digests of files, as they stand in a picture."""
    found = {}
    for source in sources:
        if not source.is_file():
            raise DataError(f"{source}: missing; `make figures` makes what the pictures are drawn from")
        name = source.resolve().relative_to(ROOT).as_posix() if source.resolve().is_relative_to(ROOT) else source.name
        found[name] = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return json.dumps(found)
