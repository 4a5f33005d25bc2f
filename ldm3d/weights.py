"""Published weights: safetensors that carry all that is needed to rebuild and use them without the config."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard, Card, DiffusionCard, WeightsCard, not_whole, read_card
from ldm3d.definitions import Strict
from ldm3d.errors import WeightsError
from ldm3d.files import atomic_path
from ldm3d.networks import build_autoencoder, build_unet

LATENT_MEAN = "latent_mean"
Network = TypeVar("Network", bound=nn.Module)


def save_weights(path: Path, tensors: dict[str, Tensor], card: WeightsCard) -> None:
    """Write weights and card atomically. Raises `OutputError` where the file cannot be written."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"ldm3d": card.model_dump_json()})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_weights(path: Path, card_type: type[Card]) -> tuple[dict[str, Tensor], Card]:
    """Read weights and card.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, of a newer format, or holds NaN or infinity.
    """
    card = read_card(path, card_type)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise not_whole(path, error) from error
    require_finite(tensors, path)
    return tensors, card


def require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that hold NaN or infinity. Raises `WeightsError`, naming the first of them."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        count = int((~torch.isfinite(tensors[bad[0]])).sum())
        raise WeightsError(
            f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity (first: {bad[0]}, {count} of "
            f"{tensors[bad[0]].numel()} values); nothing can be made of such weights: take others, or train again"
        )


def load_into(network: Network, tensors: dict[str, Tensor], path: Path) -> Network:
    """Put tensors into a network; every name and shape must agree. Raises `WeightsError` otherwise."""
    expected = network.state_dict()
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    other_shape = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    if missing or unknown or other_shape:
        example = sorted([*other_shape, *missing, *unknown])[0]
        raise WeightsError(
            f"{path}: weights of another architecture: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(other_shape)} of another shape (first: {example}); use the config that they were trained with"
        )
    network.load_state_dict(tensors)
    return network


def check_definition(path: Path, stored: Strict, configured: Strict, section: str) -> None:
    """Refuse a config that contradicts the weights' own description.

    Raises:
        WeightsError: naming the keys that differ.
    """
    was, now = stored.model_dump(), configured.model_dump()
    # Another kind of schedule has other keys; its `type`, which both have, says so.
    shared = [key for key in was if key in now]
    different = [f"{key} is {now[key]} but the weights have {was[key]}" for key in shared if was[key] != now[key]]
    if different:
        raise WeightsError(f"{path}: {section} of the config contradicts the weights: {'; '.join(different)}")


def load_autoencoder(model_dir: Path) -> tuple[AutoencoderKL, AutoencoderCard]:
    """The published autoencoder, in evaluation mode, rebuilt from its own description."""
    path = model_dir / AUTOENCODER
    tensors, card = read_weights(path, AutoencoderCard)
    network = load_into(build_autoencoder(card.definition), tensors, path)
    return network.eval().requires_grad_(False), card


def load_unet(model_dir: Path) -> tuple[DiffusionModelUNet, Tensor, DiffusionCard]:
    """The published diffusion network in evaluation mode, the latents' mean (C, X, Y, Z or 1s), and its card."""
    path = model_dir / UNET
    tensors, card = read_weights(path, DiffusionCard)
    latent_mean = tensors.pop(LATENT_MEAN, torch.zeros(1, 1, 1, 1))
    network = load_into(build_unet(card.definition), tensors, path)
    return network.eval().requires_grad_(False), latent_mean, card


def read_pickled(path: Path) -> Any:
    """`torch.load` that executes nothing and says what is wrong. Raises `WeightsError`."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            reason = "it holds something other than tensors, which could run code when loaded"
        raise WeightsError(f"{path}: cannot be loaded: {reason}") from error
