"""Curves of both stages: what training and validation said, epoch by epoch."""

from typing import Any

import numpy as np

from figs.page import BLUE, GREEN, GREY, ORANGE, foot, page

Stage = dict[str, Any]
SMOOTHED_OVER = 5
"""Epochs of a running mean."""
ERROR_TIMES = 4


def train_recon(curves: dict[str, Any]) -> Any:
    """Stage 1: the loss and its terms, the gradient, the learning rate."""
    stage = curves["autoencoder"]
    figure, (loss, gradient, rate) = page(3.1, 1, 3, width_ratios=(2, 1, 1))
    lines = (("loss", "loss, the sum", BLUE, "-"), ("reconstruction", "reconstruction: mean |error|", ORANGE, "--"))
    for name, label, colour, line in (*lines, ("kl", "KL, with its weight", GREEN, ":")):
        loss.plot(*points(stage, f"train/{name}"), line, marker="o", color=colour, label=label)
    loss.set(title="training loss, mean of each epoch", ylabel="loss (intensities 0 to 1)", ylim=(0, None))
    loss.legend(loc="center", bbox_to_anchor=(0.6, 0.33))
    _gradient(gradient, stage)
    _rate(rate, stage)
    _epochs((loss, gradient, rate), stage)
    foot(figure, _run(stage))
    return figure


def train_diffusion(curves: dict[str, Any]) -> Any:
    """Stage 2: the loss, the gradient, the learning rate."""
    stage = curves["diffusion"]
    figure, (loss, gradient, rate) = page(3.1, 1, 3, width_ratios=(2, 1, 1))
    epochs, values = points(stage, "train/loss")
    loss.plot(epochs, values, "o", color=BLUE, alpha=0.35, markersize=3, label="mean of each epoch")
    loss.plot(epochs, smooth(values), color=BLUE, label=f"running mean of {SMOOTHED_OVER} epochs")
    loss.set(title="training loss", ylabel="squared error of the network's output")
    loss.legend()
    _gradient(gradient, stage)
    _rate(rate, stage)
    _epochs((loss, gradient, rate), stage)
    foot(figure, _run(stage))
    return figure


def val_recon(curves: dict[str, Any], volume: list[np.ndarray], reconstruction: list[np.ndarray]) -> Any:
    """Stage 1: how near reconstructions of held-out volumes come, and what one looks like.

    Args:
        curves: both stages.
        volume: planes (H, W) in [0, 1] of a volume that was not trained on.
        reconstruction: the same of its reconstruction.
    """
    stage = curves["autoencoder"]
    figure, charts = page(4.7, 2, 3, height_ratios=(1.4, 1))
    measures = (("l1", "mean |error|, intensities 0 to 1", "L1: lower is better"),)
    measures += (("psnr_db", "dB", "PSNR: higher is better"), ("ssim", "SSIM", "SSIM: higher is better"))
    for chart, (name, unit, title) in zip(charts[0], measures, strict=True):
        chart.plot(*points(stage, f"validation/{name}"), marker="o", color=BLUE, label="held out, the latent's mean")
        chart.set(title=title, ylabel=unit)
    charts[0, 0].plot(*points(stage, "train/reconstruction"), "--", color=ORANGE, label="training, latents sampled")
    charts[0, 0].set_ylim(0)
    charts[0, 0].legend(loc="lower left")
    _epochs(charts[0], stage)
    error = [ERROR_TIMES * np.abs(a - b) for a, b in zip(volume, reconstruction, strict=True)]
    titles = ("phantom, not trained on", "its reconstruction", f"|error|, {ERROR_TIMES} times as bright")
    for chart, planes, title in zip(charts[1], (volume, reconstruction, error), titles, strict=True):
        chart.imshow(beside(planes), cmap="gray", vmin=0, vmax=1, interpolation="lanczos")
        chart.set(xticks=[], yticks=[], title=title)
        chart.spines[:].set_visible(False)
    foot(figure, _run(stage))
    return figure


def beside(planes: list[np.ndarray]) -> np.ndarray:
    """Planes side by side on black, each in the middle of the height."""
    height = max(len(plane) for plane in planes)
    rows = [height - len(plane) for plane in planes]
    return np.hstack([np.pad(p, ((n // 2, n - n // 2), (0, 0))) for p, n in zip(planes, rows, strict=True)])


def val_diffusion(curves: dict[str, Any]) -> Any:
    """Stage 2: the loss on held-out latents with fixed noise, over time and over the share of noise."""
    stage = curves["diffusion"]
    levels = [name for name in stage["scalars"] if name.startswith("validation/level_")]
    noise = (np.arange(len(levels)) + 0.5) / len(levels)
    by_level = np.array([stage["scalars"][f"validation/level_{i + 1}"]["values"] for i in range(len(levels))])
    figure, (loss, level) = page(3.3, 1, 2)
    epochs, values = points(stage, "validation/loss")
    loss.plot(epochs, values, marker="o", color=BLUE)
    loss.set(title="validation loss, mean of all noise levels", ylabel="squared error of the network's output")
    _epochs((loss,), stage)
    chosen = sorted({0, len(epochs) // 4, len(epochs) // 2, len(epochs) - 1})
    for place, line in zip(chosen, (":", "-.", "--", "-"), strict=False):
        depth = 0.35 + 0.65 * place / max(1, len(epochs) - 1)
        colour = tuple(1 - depth * (1 - part) for part in (0, 0.447, 0.698))
        level.plot(noise, by_level[:, place], line, marker="o", color=colour, label=f"epoch {epochs[place]:.0f}")
    level.set(title="the same by noise level", xlabel="share of noise s in the latent, 0 to 1", xlim=(0, 1))
    level.legend(ncols=2)
    foot(figure, _run(stage))
    return figure


def points(stage: Stage, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs that a curve was measured after, 0 being the start, and its values."""
    curve = stage["scalars"][name]
    return np.array(curve["steps"]) / stage["steps_per_epoch"], np.array(curve["values"])


def smooth(values: np.ndarray, width: int = SMOOTHED_OVER) -> np.ndarray:
    """Running mean, centred; of fewer values at both ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _gradient(axes: Any, stage: Stage) -> None:
    axes.plot(*points(stage, "train/gradient_norm"), color=BLUE)
    axes.axhline(stage["max_grad_norm"], color=GREY, linestyle=":", label="clipped above")
    axes.set(title="norm of the gradient", ylabel="mean of each epoch", ylim=(0, None))
    axes.legend()


def _rate(axes: Any, stage: Stage) -> None:
    epochs, values = points(stage, "train/learning_rate")
    axes.plot(epochs, 1000 * values, color=BLUE)
    axes.set(title="learning rate", ylabel="thousandths", ylim=(0, None))


def _epochs(charts: Any, stage: Stage) -> None:
    """The same axis for all: epochs below, volumes seen above."""
    volumes = stage["steps_per_epoch"] * stage["batch_size"] / 1000
    for axes in charts:
        axes.set(xlabel="epoch", xlim=(0, stage["epochs"] * 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        above = axes.secondary_xaxis("top", functions=(lambda x: x * volumes, lambda x: x / volumes))
        above.tick_params(labelsize=8, colors=GREY)
        above.set_xlabel("thousand volumes seen", fontsize=8, color=GREY)


def _run(stage: Stage) -> str:
    command = stage["run"].replace("runs/", "make ").replace("_", "-")
    return (
        f"{command}, {stage['began'][:10]}; an epoch has {stage['steps_per_epoch']} steps of "
        f"{stage['batch_size']} volumes"
    )
