"""From the costs of one volume to those of a run: arithmetic under the assumptions that are written here."""

from collections.abc import Mapping
from typing import Any

from ldm3d.schema import Config

ASSUMED: dict[str, float] = {
    "volumes": 100_000,
    "stage 1 epochs": 10,
    "stage 2 epochs": 50,
    "GPU FLOP/s": 0.4 * 800e12,
    "GPUs a machine": 8,
    "cores a GPU": 12,
    "bytes/s a GPU within a machine": 200e9,
    "bytes/s a GPU between machines": 40e9,
    "dollars a GPU hour": 3,
}
GPUS = (1, 8, 64, 512)
HOUR = 3600


def plan(units: Mapping[str, Any], cfg: Config) -> list[dict[str, Any]]:
    """A row for each number of GPUs. Mirrored latents are encoded too, so each volume is encoded twice."""
    return [row(units, cfg, gpus) for gpus in GPUS]


def row(units: Mapping[str, Any], cfg: Config, gpus: int) -> dict[str, Any]:
    volumes = ASSUMED["volumes"]
    prepare_hours = volumes * units["prepare s"] / (gpus * ASSUMED["cores a GPU"]) / HOUR
    encode_hours = volumes * 2 * units["encode FLOP"] / (gpus * ASSUMED["GPU FLOP/s"]) / HOUR
    one = stage(units, gpus, 1, cfg.autoencoder_train.batch_size * cfg.autoencoder_train.accumulate_steps)
    two = stage(units, gpus, 2, cfg.diffusion_train.batch_size * cfg.diffusion_train.accumulate_steps)
    hours = prepare_hours + encode_hours
    hours += ASSUMED["stage 1 epochs"] * one["epoch h"] + ASSUMED["stage 2 epochs"] * two["epoch h"]
    return {
        "GPUs": gpus,
        "prepare h": prepare_hours,
        "encode h": encode_hours,
        **{f"1: {name}": value for name, value in one.items()},
        "1: first read GB/s": 1e-9 * units["prepared bytes"] * one["steps/s"] * one["global batch"],
        "1: later read GB/s": 1e-9 * units["crop bytes"] * one["steps/s"] * one["global batch"],
        **{f"2: {name}": value for name, value in two.items()},
        "2: read GB/s": 1e-9 * units["latent bytes read a draw"] * two["steps/s"] * two["global batch"],
        "whole run h": hours,
        "dollars": hours * gpus * ASSUMED["dollars a GPU hour"],
    }


def stage(units: Mapping[str, Any], gpus: int, number: int, batch: int) -> dict[str, float]:
    """A step waits for the slower of computing and exchanging: DDP exchanges while it computes backward."""
    computing = batch * units[f"step {number} FLOP a volume"] / ASSUMED["GPU FLOP/s"]
    exchanging = all_reduce_seconds(units[f"gradient {number} bytes"], gpus)
    hidden = min(exchanging, computing * 2 / 3)  # backward is two thirds of the work
    step = computing + exchanging - hidden
    steps = max(1, ASSUMED["volumes"] // (batch * gpus))
    return {
        "global batch": batch * gpus,
        "steps an epoch": steps,
        "steps/s": 1 / step,
        "all-reduce of step": exchanging / step,
        "epoch h": steps * step / HOUR,
    }


def all_reduce_seconds(nbytes: float, gpus: int) -> float:
    """A ring over all GPUs: each sends and gets 2 (n - 1) / n of the gradient, at the speed of the slowest link."""
    inside = gpus <= ASSUMED["GPUs a machine"]
    speed = ASSUMED["bytes/s a GPU within a machine" if inside else "bytes/s a GPU between machines"]
    return 2 * (gpus - 1) / gpus * nbytes / speed
