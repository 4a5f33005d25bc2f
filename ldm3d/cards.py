"""What stands in published weights beside their tensors: read without torch, as the service's web process does."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from ldm3d import __version__
from ldm3d.definitions import AutoencoderDef, DiffusionDef, DiscriminatorDef, Strict
from ldm3d.errors import WeightsError
from ldm3d.sections import DdpmSchedule, RFlowSchedule

FORMAT_VERSION = 1
AUTOENCODER, DISCRIMINATOR, UNET = "autoencoder.safetensors", "discriminator.safetensors", "diffusion_unet.safetensors"
Card = TypeVar("Card", bound="WeightsCard")


class WeightsCard(Strict):
    """What stands beside every published weights file's tensors."""

    format_version: int = FORMAT_VERSION
    code_version: str = __version__
    trained_on: str
    """Digest of the training volumes' contents."""
    num_train: int
    """Number of training volumes."""
    step: int
    """Optimizer steps taken."""
    channel: int
    """Contrast, as in the config."""
    spacing: tuple[float, float, float]
    """Voxel size of the volumes in mm."""
    intensity_range: tuple[float, float] = (0.0, 1.0)
    """Range of the volumes' values."""


class AutoencoderCard(WeightsCard):
    """Of `autoencoder.safetensors`."""

    definition: AutoencoderDef
    validation: dict[str, float] = Field(default_factory=dict)
    """Validation measures at the time of saving."""


class DiscriminatorCard(WeightsCard):
    """Of `discriminator.safetensors`, which only a training that goes on needs."""

    definition: DiscriminatorDef


class DiffusionCard(WeightsCard):
    """Of `diffusion_unet.safetensors`: with the autoencoder, all that sampling needs."""

    definition: DiffusionDef
    schedule: DdpmSchedule | RFlowSchedule = Field(discriminator="type")
    scale_factor: float
    """Latents are multiplied by this before diffusion and divided by it before decoding."""
    latent_shape: tuple[int, int, int, int]
    """(C, X, Y, Z) of one latent."""
    autoencoder_sha256: str
    """Digest of the autoencoder's weights whose latents were learned."""
    ema_decay: float
    """Decay of the running average that these weights are; 0 where they are the last step's."""
    conditioning: dict[str, list[str]] = Field(default_factory=dict)
    """Conditions that the network knows, and their values. Empty: it generates without conditions."""
    validation: dict[str, float] = Field(default_factory=dict)
    """Validation measures at the time of saving."""


def read_card(path: Path, card_type: type[Card]) -> Card:
    """The description in a weights file; its tensors are not read.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights; train them first, or name their folder as model_dir")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise not_whole(path, error) from error
    if "ldm3d" not in metadata:
        raise WeightsError(f"{path}: has no description of its network; it was not written by this project")
    version = _format_version(metadata["ldm3d"])
    if version != FORMAT_VERSION:
        raise WeightsError(f"{path}: format version {version}; this code reads version {FORMAT_VERSION}")
    try:
        return card_type.model_validate_json(metadata["ldm3d"])
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(f"{path}: is not {card_type.__name__}: {first['loc']}: {first['msg']}") from error


def not_whole(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path}: not a whole safetensors file ({error}); copy or train it again")


def _format_version(description: str) -> object:
    try:
        content = json.loads(description)
    except ValueError:
        content = None
    return content.get("format_version") if isinstance(content, dict) else None
