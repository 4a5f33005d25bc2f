"""Tiny networks, configurations and data that the tests of the library share."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm3d.cards import AutoencoderCard, DiffusionCard
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.randomness import StepRandom
from ldm3d.schema import Config

CPU = torch.device("cpu")
FACTS: dict[str, Any] = {"trained_on": "a" * 64, "num_train": 6, "step": 3, "channel": 0, "spacing": (3.0, 3.0, 3.0)}


def config(**overrides: Any) -> Config:
    """A configuration of networks of some thousand parameters: volumes 16^3, latents 3x8^3, attention in the U-Net.

    Args:
        overrides: top-level keys; a section's dictionary replaces single keys of that section.
    """
    train = {"batch_size": 2, "patch_size": [16, 16, 16], "lr": 1e-3, "max_epochs": 2}
    content: dict[str, Any] = {
        "spacing": [3, 3, 3],
        "latent_channels": 3,
        "autoencoder_def": {
            "latent_channels": 3,
            "channels": [8, 16],
            "attention_levels": [False, False],
            "num_res_blocks": 1,
            "norm_num_groups": 4,
        },
        "discriminator_def": {"channels": 8, "num_layers_d": 1},
        "autoencoder_train": train,
        "diffusion_def": {
            "in_channels": 3,
            "out_channels": 3,
            "channels": [16, 32],
            "attention_levels": [False, True],
            "num_head_channels": 16,
            "num_res_blocks": 1,
            "norm_num_groups": 8,
        },
        "diffusion_train": train,
    }
    for key, value in overrides.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    return Config.model_validate_json(json.dumps(content))


def latents(channels: int) -> dict[str, Any]:
    """Overrides of `config` for a diffusion network on latents of so many channels."""
    return {"diffusion_def": {"in_channels": channels, "out_channels": channels}}


def shaken(network: nn.Module, seed: int = 0) -> Any:
    """Random numbers in every parameter: layers that start at zero, as the U-Net's last, would hide what is before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network


def autoencoder(cfg: Config | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_autoencoder((cfg or config()).autoencoder_def).eval().requires_grad_(False)


def unet(cfg: Config | None = None, seed: int = 0) -> Any:
    return shaken(build_unet((cfg or config()).diffusion_def), seed).eval().requires_grad_(False)


def autoencoder_card(cfg: Config) -> AutoencoderCard:
    return AutoencoderCard(definition=cfg.autoencoder_def, **FACTS)


def diffusion_card(cfg: Config, autoencoder_sha256: str = "b" * 64, scale_factor: float = 1.25) -> DiffusionCard:
    return DiffusionCard(
        definition=cfg.diffusion_def,
        schedule=cfg.noise_schedule,
        scale_factor=scale_factor,
        latent_shape=cfg.latent_shape,
        autoencoder_sha256=autoencoder_sha256,
        ema_decay=0.999,
        **FACTS,
    )


def images(count: int, side: int = 16, seed: int = 0) -> Tensor:
    """Smooth volumes (N, 1, side, side, side) in [0, 1], each another one."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear").clamp(0, 1)


def random(step: int = 0, count: int = 2, seed: int = 0) -> StepRandom:
    """What a training step of so many volumes draws."""
    return StepRandom(seed, step, count, CPU)


class Volumes(Dataset):
    """`images` as the loaders give them."""

    def __init__(self, volumes: Tensor):
        self.volumes = volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.volumes[index], "case": f"case{index}"}


def batch(count: int = 2, seed: int = 0) -> dict[str, Any]:
    return {"image": images(count, seed=seed), "case": [f"case{i}" for i in range(count)]}


def equal_states(a: Any, b: Any) -> bool:
    """Whether two nested states of dictionaries, lists, tensors and numbers are the same, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal_states(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
