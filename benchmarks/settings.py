"""Networks that the benchmarks measure, by name, and where they are measured."""

from pathlib import Path

import torch

from ldm3d.config import load_config
from ldm3d.schema import Config

CPU = torch.device("cpu")
_CONFIGS = Path("config")

# Batches and patches are those of the tutorial's config_train_32g.json where memory and time allow.
_MEDIUM = [
    "latent_channels=8",
    "autoencoder_def.patchify=1",
    "autoencoder_def.channels=[32,64,64]",
    "autoencoder_def.attention_levels=[false,false,false]",
    "autoencoder_train.patch_size=[48,48,32]",
    "autoencoder_train.adv_weight=0.01",
    "autoencoder_train.batch_size=2",
    "diffusion_def.channels=[64,128,128]",
    "diffusion_def.num_res_blocks=1",
    "diffusion_def.norm_num_groups=32",
    "diffusion_def.attention_levels=[false,true,true]",
    "diffusion_def.num_head_channels=[0,64,64]",
    "diffusion_train.patch_size=[64,64,48]",
    "diffusion_train.batch_size=3",
    'NoiseScheduler={"type": "ddpm"}',
    "sampling.steps=50",
]
_TINY = [
    "latent_channels=4",
    "autoencoder_def.patchify=1",
    "autoencoder_def.channels=[8,8]",
    "autoencoder_def.norm_num_groups=8",
    "autoencoder_train.patch_size=[16,16,16]",
    "autoencoder_train.adv_weight=0.01",
    'discriminator_def={"channels": 8, "num_layers_d": 1}',
    "diffusion_def.channels=[8,8,16]",
    "diffusion_def.norm_num_groups=8",
    "diffusion_def.num_head_channels=[0,0,8]",
    "diffusion_train.patch_size=[16,16,16]",
    "diffusion_train.batch_size=3",
]
_GPU = ["autoencoder_train.batch_size=2", "diffusion_train.batch_size=3", "autoencoder_train.perceptual_weight=0"]
_KNOWN: dict[str, tuple[str, list[str]]] = {
    "demo": ("config_demo.json", []),
    "medium": ("config_demo.json", _MEDIUM),
    "tiny": ("config_demo.json", _TINY),
    "32g": ("config_train_32g.json", _GPU),
    "16g as shipped": ("config_train_16g.json", ["autoencoder_train.perceptual_weight=0"]),
    "32g as shipped": ("config_train_32g.json", ["autoencoder_train.perceptual_weight=0"]),
}


def settings(name: str, *overrides: str) -> Config:
    """A configuration by name: `demo`, `medium` (for a CPU), `tiny` (to show that it runs), `32g` (with the tutorial's
    batches), `16g as shipped`, `32g as shipped`.

    The perceptual term is left out of both recipes: its weights need a network, and it is 2 % of a step.
    """
    file, own = _KNOWN[name]
    return load_config(_CONFIGS / file, [*own, *overrides])
