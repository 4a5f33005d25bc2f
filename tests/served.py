"""What tests of the service share: tiny published weights, a models.yaml that names them, and what is made of them."""

from pathlib import Path
from typing import Any

import tiny

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.files import sha256
from ldm3d.sections import DdpmSchedule
from ldm3d.weights import save_weights
from mlops.api.catalogue import ActiveModel, ActiveVersion


def publish(folder: Path, seed: int = 0, conditioning: dict[str, list[str]] | None = None, **overrides: Any) -> Path:
    """A folder with weights as a training publishes them: volumes of 16^3 voxels, another model for each seed."""
    cfg = tiny.config(**overrides)
    save_weights(folder / AUTOENCODER, tiny.autoencoder(cfg, seed).state_dict(), tiny.autoencoder_card(cfg))
    card = tiny.diffusion_card(cfg, sha256(folder / AUTOENCODER))
    card = card.model_copy(update={"conditioning": conditioning or {}})
    save_weights(folder / UNET, tiny.unet(cfg, seed).state_dict(), card)
    return folder


def version(name: str = "1", share: int = 100, **changes: Any) -> ActiveVersion:
    """A version of the model `brains`; of no weights."""
    content: dict[str, Any] = {
        "model": "brains",
        "version": name,
        "digest": name.rjust(64, "0"),
        "share": share,
        "shadow": False,
        "weights_sha256": {AUTOENCODER: "a" * 64, UNET: "b" * 64},
        "shape": (16, 16, 16),
        "spacing_mm": (3.0, 3.0, 3.0),
        "schedule": DdpmSchedule(),
        "conditions": {},
        "trained_on": "c" * 64,
        "num_train": 6,
    }
    return ActiveVersion(**content | changes)


def model(*shares: int, name: str = "brains", assign_by: str = "caller") -> ActiveModel:
    """A model with versions "1", "2"... of these shares."""
    versions = [version(str(number), share, model=name) for number, share in enumerate(shares, 1)]
    return ActiveModel.model_validate({"name": name, "assign_by": assign_by, "versions": versions})
