"""Weights of the MONAI tutorial, made with `monai` or the older `monai-generative`; they do not describe themselves."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor

from ldm3d.cards import DiffusionCard
from ldm3d.errors import WeightsError
from ldm3d.files import sha256
from ldm3d.latents import LatentStatistics
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.sampling import Sampler
from ldm3d.schema import Config
from ldm3d.weights import Network, load_into, read_pickled, require_finite

AUTOENCODER, UNET = "autoencoder.pt", "diffusion_unet.pt"


def has_tutorial_weights(model_dir: Path) -> bool:
    return (model_dir / AUTOENCODER).is_file() and (model_dir / UNET).is_file()


def load_tutorial_autoencoder(model_dir: Path, cfg: Config) -> AutoencoderKL:
    """The tutorial's autoencoder, built from the config. Raises `WeightsError` where they do not fit."""
    network = read_tutorial_weights(model_dir / AUTOENCODER, build_autoencoder(cfg.autoencoder_def))
    return network.eval().requires_grad_(False)


def tutorial_sampler(
    model_dir: Path, cfg: Config, autoencoder: AutoencoderKL, scale_factor: float, device: torch.device
) -> Sampler:
    """A sampler for the tutorial's files; what they do not say of themselves is the config's to say.

    Raises:
        WeightsError: they are damaged or of another architecture.
    """
    unet = read_tutorial_weights(model_dir / UNET, build_unet(cfg.diffusion_def)).requires_grad_(False)
    digests = {name: sha256(model_dir / name) for name in (AUTOENCODER, UNET)}
    card = DiffusionCard(
        definition=cfg.diffusion_def,
        schedule=cfg.noise_schedule,
        scale_factor=scale_factor,
        latent_shape=cfg.latent_shape,
        autoencoder_sha256=digests[AUTOENCODER],
        ema_decay=0.0,
        trained_on="unknown",
        num_train=0,
        step=0,
        channel=cfg.channel,
        spacing=cfg.spacing,
    )
    statistics = LatentStatistics(torch.zeros(1, 1, 1, 1), scale_factor)
    return Sampler(autoencoder, unet, statistics, card, device, cfg.amp, digests, cfg.sampling.decode_gib)


@torch.inference_mode()
def measured_scale_factor(autoencoder: AutoencoderKL, images: Iterable[Tensor], device: torch.device) -> float:
    """1 / standard deviation of the latents of some training volumes (1, X, Y, Z), which the tutorial never saved."""
    autoencoder = autoencoder.to(device)
    total = torch.zeros(3, dtype=torch.float64)
    for image in images:
        mean, sigma = (part.double().cpu() for part in autoencoder.encode(image[None].to(device)))
        total += torch.stack([mean.sum(), (mean.square() + sigma.square()).sum(), torch.tensor(float(mean.numel()))])
    average, square = total[0] / total[2], total[1] / total[2]
    return float((square - average.square()).rsqrt())


def read_tutorial_weights(path: Path, network: Network) -> Network:
    """Load a `.pt` file of the MONAI tutorial, made with `monai` or the older `monai-generative`.

    Only tensors are read: a pickle that would run code is refused by torch's `weights_only` loader.

    Raises:
        WeightsError: the file is damaged, holds code, NaN or infinity, or belongs to another architecture.
    """
    state = read_pickled(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path}: does not hold a state dict of tensors")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    require_finite(state, path)
    return load_into(network, _renamed(network, state) or state, path)


def _renamed(network: Any, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Names of `monai-generative` in today's; None where not every tensor finds its place, or all have it already.

    The older package never calls the projection `proj_attn` of its attention, which MONAI's loader would put to use as
    `out_proj`. The identity takes its place, or nothing where the network has no projection: outputs stay the same.
    """
    expected = network.state_dict()
    projects = any(".out_proj." in name for name in expected)
    old = {name: _no_projection(tensor) if ".proj_attn." in name else tensor for name, tensor in state.items()}
    old = {name: tensor for name, tensor in old.items() if projects or ".proj_attn." not in name}
    # Of what a file lacks MONAI's loader would keep the random start.
    if expected.keys() == old.keys() or len(expected) != len(old):
        return None
    renamed = copy.deepcopy(network)
    try:
        renamed.load_old_state_dict(old)  # takes what it uses out of `old`
    except (KeyError, RuntimeError):
        return None
    return None if old else dict(renamed.state_dict())


def _no_projection(tensor: Tensor) -> Tensor:
    """Weight or bias of a linear layer that changes nothing."""
    return torch.eye(len(tensor), dtype=tensor.dtype) if tensor.ndim == 2 else torch.zeros_like(tensor)
