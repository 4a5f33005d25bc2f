"""Weights of the MONAI tutorial, made with `monai` or the older `monai-generative`; they do not describe themselves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor

from ldm3d.errors import WeightsError
from ldm3d.files import sha256
from ldm3d.latents import LatentStatistics
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.sampling import Sampler
from ldm3d.schema import Config
from ldm3d.weights import DiffusionCard, Network, load_into, read_pickled

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
    return Sampler(autoencoder, unet, statistics, card, device, cfg.amp, digests)


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
        WeightsError: the file is damaged, holds code, or belongs to another architecture.
    """
    state = read_pickled(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path}: does not hold a state dict of tensors")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if network.state_dict().keys() == state.keys():
        return load_into(network, state, path)
    renamed = _renamed(network, dict(state), path)
    return load_into(network, renamed, path)


def _renamed(network: Any, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names of `monai-generative` in today's; every tensor must find its place."""
    untouched = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        network.load_old_state_dict(state)  # takes what it uses out of `state`
    except (KeyError, RuntimeError) as error:
        network.load_state_dict(untouched)
        raise WeightsError(f"{path}: weights of another architecture ({error})") from error
    if state:
        raise WeightsError(f"{path}: weights of another architecture: no place for {sorted(state)[0]}")
    return network.state_dict()
