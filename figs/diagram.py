"""How it works, in one picture: both trainings and the sampling, with shapes from a configuration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patches import FancyBboxPatch

from figs.diagram_pictures import CHANNELS, LEVELS, Pictures
from figs.page import BLUE, GREEN, ORANGE, SMALLEST, WIDTH, page
from ldm3d.losses import AutoencoderLoss
from ldm3d.schema import Config
from ldm3d.sections import RFlowSchedule

# One unit of the drawing is a twentieth of an inch.
ACROSS, HIGH = 20 * WIDTH, 176.0
TIMES = " \N{MULTIPLICATION SIGN} "
TILE = 18.0
"""Height of a picture of a volume."""
PALE = {BLUE: "#d6e8f5", ORANGE: "#fbe3d3", GREEN: "#d9f0e6"}


def texts(cfg: Config) -> dict[str, str]:
    """What the drawing says of a configuration.

    Raises:
        ValueError: it is not rectified flow, whose formulas are drawn.
    """
    if not isinstance(cfg.noise_schedule, RFlowSchedule):
        raise ValueError(f"the diagram has the formulas of rectified flow, not of {cfg.noise_schedule.type}")
    size, coder, unet = cfg.diffusion_train.patch_size, cfg.autoencoder_def, cfg.diffusion_def
    voxels, numbers = int(np.prod((cfg.image_channels, *size))), int(np.prod(cfg.latent_shape))
    levels = {
        f"unet {level}": f"{channels}{TIMES}{_product(n // 2**level for n in cfg.latent_shape[1:])}"
        + " + attention" * unet.attention_levels[level]
        for level, channels in enumerate(unet.channels)
    }
    first = f"blocks of {coder.patchify}³ voxels\n" if coder.patchify > 1 else ""
    return levels | {
        "volume": _product((cfg.image_channels, *size)),
        "spacing": f"{cfg.spacing[0]:g} mm" if len(set(cfg.spacing)) == 1 else f"{_product(cfg.spacing)} mm",
        "latent": _product(cfg.latent_shape),
        "coder": f"{first}{', '.join(map(str, coder.channels))} channels",
        "factor": f"{coder.downsampling} times shorter on each side, {voxels / numbers:.1f} times fewer numbers",
        "loss": AutoencoderLoss(cfg.autoencoder_train).formula().replace("l1", "L1").replace("kl", "KL"),
        "batch": f"{cfg.autoencoder_train.batch_size} boxes of\n{_product(cfg.autoencoder_train.patch_size)}",
        "latents": f"{cfg.diffusion_train.batch_size} latents",
        "normalised": "centred on the mean of all, and scaled" if cfg.diffusion_train.center_latents else "and scaled",
        "steps": str(cfg.sampling.steps),
    }


def _product(numbers: Any) -> str:
    return TIMES.join(f"{n:g}" for n in numbers)


def draw_diagram(cfg: Config, shown: Pictures) -> Any:
    """The drawing for a configuration, with real pictures in it."""
    said = texts(cfg)
    figure, axes = page(HIGH / 20, layout=None)
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, ACROSS), ylim=(0, HIGH))
    axes.axis("off")
    sheet = Sheet(axes)
    _autoencoder(sheet, said, shown)
    _diffusion(sheet, said, shown, cfg)
    _sampling(sheet, said, shown)
    return figure


class Sheet:
    """What the drawing is made of; places are in units from the lower left corner.

    Args:
        axes: that everything is drawn on.
    """

    def __init__(self, axes: Any):
        self.axes = axes

    def band(self, low: float, high: float, title: str, script: str, colour: str) -> None:
        """A frame for one of the three parts."""
        self.box(1, low, ACROSS - 2, high - low, "", colour, "white")
        self.text(4, high - 4.2, title, size=11, weight="bold", ha="left")
        self.text(ACROSS - 4, high - 4.2, script, size=9, ha="right", family="monospace")

    def text(self, x: float, y: float, text: str, size: float = SMALLEST, **more: Any) -> None:
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "linespacing": 1.35} | more)

    def box(self, x: float, y: float, width: float, height: float, text: str, colour: str, fill: str) -> None:
        style = "round,pad=0,rounding_size=1.2"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, ec=colour, fc=fill, lw=1.2))
        self.text(x + width / 2, y + height / 2, text)

    def funnel(self, x: float, y: float, width: float, left: float, right: float, text: str) -> None:
        """An encoder or a decoder: its left and right side are so high, around y."""
        corners = [(x, y - left / 2), (x, y + left / 2), (x + width, y + right / 2), (x + width, y - right / 2)]
        self.axes.fill(*zip(*corners, strict=True), ec=BLUE, fc=PALE[BLUE], lw=1.2)
        self.text(x + width / 2, y, text)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **more: Any) -> None:
        shape = {"arrowstyle": "-|>", "color": "black", "lw": 1.1, "shrinkA": 0, "shrinkB": 0} | more
        self.axes.annotate("", end, start, arrowprops=shape)

    def picture(self, x: float, y: float, plane: np.ndarray, height: float, **more: Any) -> float:
        """A plane around the height y, from x to the right; returns its width."""
        width = height * plane.shape[1] / plane.shape[0]
        place = (x, x + width, y - height / 2, y + height / 2)
        look = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "lanczos", "zorder": 3} | more
        self.axes.imshow(plane, extent=place, aspect="auto", **look)
        return width

    def latent(self, x: float, y: float, planes: Sequence[np.ndarray], height: float = TILE * 0.72) -> float:
        """Channels behind each other, the first in front; returns the width of all."""
        shift = 1.5
        for depth in range(len(planes) - 1, -1, -1):
            left, middle = x + depth * shift, y + (depth - (len(planes) - 1) / 2) * shift
            width = self.picture(left, middle, planes[depth], height, interpolation="nearest", zorder=4 - 0.1 * depth)
            edge = ([left, left + width], [middle - height / 2, middle + height / 2])
            xs, ys = ([edge[0][i] for i in (0, 1, 1, 0, 0)], [edge[1][i] for i in (0, 0, 1, 1, 0)])
            self.axes.plot(xs, ys, color=GREEN, lw=1.2, zorder=4.05 - 0.1 * depth)
        return width + (len(planes) - 1) * shift


def _autoencoder(sheet: Sheet, said: dict[str, str], shown: Pictures) -> None:
    low, high = 120.0, HIGH - 1
    sheet.band(low, high, "1  The autoencoder learns to squeeze", "train_autoencoder.py", BLUE)
    y, under, size = low + 30.5, low + 15.5, TILE * 1.35
    width = sheet.picture(5, y, shown.volume[0], size)
    sheet.text(5 + width / 2, under, f"volume\n{said['volume']}\nvoxels of {said['spacing']}", va="top")
    x = 5 + width
    sheet.arrow((x + 1, y), (x + 4.5, y))
    sheet.funnel(x + 5, y, 23, 24, 13, f"encoder\n{said['coder']}")
    x += 28
    sheet.arrow((x + 0.8, y), (x + 4.5, y))
    wide = sheet.latent(x + 5.5, y, shown.latent)
    sheet.text(x + 5.5 + wide / 2, y + 10.5, f"{CHANNELS} of the channels")
    sheet.text(x + 5.5 + wide / 2, under, f"latent: mean and deviation,\neach {said['latent']}", va="top")
    sheet.text(x + 5.5 + wide / 2, low + 3.6, said["factor"], style="italic")
    x += 5.5 + wide
    sheet.arrow((x + 1, y), (x + 18.5, y))
    sheet.text(x + 9.7, y + 1.5, "a sample:", va="bottom")
    sheet.text(x + 9.7, y - 1.5, "mean +\ndeviation · e", va="top")
    sheet.funnel(x + 19, y, 23, 13, 24, f"decoder\n{said['coder']}")
    x += 42
    sheet.arrow((x + 0.8, y), (x + 4.5, y))
    width = sheet.picture(x + 5.5, y, shown.reconstruction[0], size)
    sheet.text(x + 5.5 + width / 2, under, f"reconstruction\n{said['volume']}", va="top")
    sheet.text(x + width + 7.5, y, f"loss:\n{said['loss']}\n\na step:\n{said['batch']}", ha="left")


def _diffusion(sheet: Sheet, said: dict[str, str], shown: Pictures, cfg: Config) -> None:
    low, high = 60.0, 118.0
    sheet.band(low, high, "2  The diffusion network learns the latents", "train_diffusion.py", ORANGE)
    y, x = high - 20, 5.0
    for level, plane in zip(LEVELS, shown.noised, strict=True):
        width = sheet.latent(x, y, [plane], TILE)
        sheet.text(x + width / 2, y - 11.2, f"s = {level:g}")
        x += width + 1.5
    words = f"Latents z are encoded once by the finished encoder,\n{said['normalised']}. Noise e is mixed in:"
    sheet.text(5, y - 18, words, ha="left")
    sheet.text(5, y - 25, "z(s) = (1 \N{MINUS SIGN} s) z + s e,   s random in 0 to 1", size=9.5, ha="left")
    sheet.text(
        5, y - 32, f"loss: mean squared error of the output;\na step: {said['latents']} of {said['latent']}", ha="left"
    )
    sheet.arrow((x - 0.5, y), (x + 3, y))
    left, wide, step, inset = x + 3.5, 54.0, 10.2, 3.6
    for level in range(len(cfg.diffusion_def.channels)):
        middle, start, end = y - level * step, left + level * inset, left + wide - level * inset
        sheet.box(start, middle - 4, end - start, 8, said[f"unet {level}"], ORANGE, PALE[ORANGE])
        if level:
            sheet.arrow((start + 2.5, middle + step - 4), (start + 2.5, middle + 4))
            sheet.arrow((end - 2.5, middle + 4), (end - 2.5, middle + step - 4))
    sheet.text(left + wide / 2, y + 6.5, "U-Net", size=9, weight="bold")
    sheet.text(
        left + wide / 2,
        middle - 9,
        "told s; goes down on the left, up on the right;\neach level also goes straight across",
    )
    sheet.arrow((left + wide + 0.5, y), (left + wide + 4, y))
    sheet.text(left + wide + 5, y, "z \N{MINUS SIGN} e:\nthe way\nfrom noise\nto latent", ha="left")


def _sampling(sheet: Sheet, said: dict[str, str], shown: Pictures) -> None:
    low, high = 1.0, 58.0
    sheet.band(low, high, "3  Sampling goes the other way", "inference.py", GREEN)
    upper, lower, x, between = high - 20.5, low + 11.5, 11.0, 14.0
    width = shown.denoised[0].shape[1] / shown.denoised[0].shape[0] * TILE
    sheet.text(6, upper, "latent", rotation=90)
    sheet.text(6, lower, "decoded,\nto look at it", rotation=90)
    for number, (step, latent, volume) in enumerate(zip(shown.steps, shown.denoised, shown.decoded, strict=True)):
        centre = x + width / 2
        sheet.latent(x, upper, [latent], TILE)
        sheet.picture(centre - TILE * volume.shape[1] / volume.shape[0] / 2, lower, volume, TILE)
        sheet.arrow((centre, upper - TILE / 2 - 0.8), (centre, lower + TILE / 2 + 0.6))
        sheet.text(centre, upper + TILE / 2 + 2.2, f"after {step} steps" if number else "noise e, s = 1")
        x += width
        if number + 1 < len(shown.steps):
            sheet.arrow((x + 1, upper), (x + between - 1, upper))
            sheet.text(x + between / 2, upper + 2.6, f"{shown.steps[number + 1] - step}{TIMES}U-Net")
            x += between
    sheet.text(x + 2, upper, f"a step:\nz + output / {said['steps']}", ha="left")
    sheet.text(x + 2, lower, f"clipped to 0 to 1,\nwritten as NIfTI,\n{said['spacing']}", ha="left")
