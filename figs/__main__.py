"""Draw the pictures of this folder from runs, weights and results.

    python -m figs
    python -m figs ldm growth
    python -m figs --tree ../other-clone

What costs time is done elsewhere:
`make sample` samples, `make demo` and `make demo-scratch` train, `make bench` measures.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from PIL import Image

import utils
from figs import costs, curves, trainings
from figs.diagram import draw_diagram
from figs.diagram_pictures import Pictures, pictures
from figs.page import ROOT, STYLE, as_image, write
from figs.samples import draw_samples, read_samples
from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.config import load_config
from ldm3d.console import log
from ldm3d.files import write_text
from ldm3d.schema import Config

HERE = ROOT / "figs"
CONFIG, WEIGHTS = ROOT / "config" / "config_demo.json", ROOT / "checkpoints" / "demo"
MODEL = (CONFIG, WEIGHTS / AUTOENCODER, WEIGHTS / UNET)
CURVES, DEMO = HERE / "curves.json", HERE / "demo_metrics.json"
DEMO_WIDTH = 1200
BRAIN_GREYS = 86
"""Of pictures that are mostly brains: noise hides the steps between so many greys, and the files stay small."""


class Figure(NamedTuple):
    """A picture, what it is drawn from, and how many greys it has if it has no colours."""

    draw: Callable[[], Any]
    sources: tuple[Path, ...]
    greys: int = 0


def results(*names: str) -> tuple[Path, ...]:
    return tuple(ROOT / "benchmarks" / "results" / f"{name}.json" for name in names)


def drawn_from(draw: Callable[..., Any], *sources: Path) -> Figure:
    """A figure of JSON files, which are handed to the function that draws it."""
    return Figure(lambda: draw(*(json.loads(source.read_text(encoding="utf-8")) for source in sources)), sources)


@cache
def config() -> Config:
    return load_config(CONFIG, [])


@cache
def shown() -> Pictures:
    return pictures(config(), WEIGHTS)


def val_recon() -> Any:
    curves_of_run = json.loads(CURVES.read_text(encoding="utf-8"))
    axial, _, sagittal = range(3)
    volume, reconstruction = ([planes[axial], planes[sagittal]] for planes in (shown().volume, shown().reconstruction))
    return trainings.val_recon(curves_of_run, volume, reconstruction)


def samples(plane: str) -> Figure:
    return Figure(lambda: draw_samples(plane, *read_samples()), MODEL, BRAIN_GREYS)


FIGURES = {
    "ldm": Figure(lambda: draw_diagram(config(), shown()), MODEL),
    "train_recon": drawn_from(trainings.train_recon, CURVES),
    "val_recon": Figure(val_recon, (CURVES, *MODEL)),
    "train_diffusion": drawn_from(trainings.train_diffusion, CURVES),
    "val_diffusion": drawn_from(trainings.val_diffusion, CURVES),
    "syn_axial": samples("axial"),
    "syn_cor": samples("coronal"),
    "syn_sag": samples("sagittal"),
    "steps": drawn_from(costs.draw_steps, *results("quality", "sampling"), DEMO),
    "memory": drawn_from(costs.draw_memory, *results("memory_cpu")),
    "growth": drawn_from(costs.draw_growth, *results("growth")),
}


def main() -> None:
    parser = utils.script_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which pictures; all if none: {', '.join(FIGURES)}")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the clone in which the demos were run")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in FIGURES]
    if unknown:
        parser.error(f"{unknown[0]}: no such picture; there are {', '.join(FIGURES)}")
    if not args.names:  # else pictures that are not drawn would be of other data than the new
        curves.renew(args.tree / "runs" / "demo_scratch", CURVES)
        renew_demo(args.tree / "results" / "demo", HERE)
    for name in args.names or FIGURES:
        draw(FIGURES[name], HERE / f"{name}.png")


def draw(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        write(as_image(figure.draw()), path, figure.sources, figure.greys)
    log(f"{path.relative_to(path.parents[1])}: {path.stat().st_size / 1000:.0f} kB")


def renew_demo(found: Path, here: Path) -> None:
    """What `make demo` has made, smaller; what is here stays where it has not been run to its end."""
    if not (found / "metrics.json").is_file():
        return
    write_text(here / "demo_metrics.json", (found / "metrics.json").read_text(encoding="utf-8"))
    for name in ("montage", "metrics"):
        with Image.open(found / f"{name}.png") as image:
            height = round(image.height * DEMO_WIDTH / image.width)
            smaller = image.convert("L").resize((DEMO_WIDTH, height), Image.Resampling.LANCZOS)
        write(smaller, here / f"demo_{name}.png", [here / "demo_metrics.json"], BRAIN_GREYS)


if __name__ == "__main__":
    utils.run_script(main)
