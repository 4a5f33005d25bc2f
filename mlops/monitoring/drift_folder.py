"""Measure a folder of new volumes as training measured its own."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from ldm3d import distributed
from ldm3d.brain import COARSE, match
from ldm3d.cards import AUTOENCODER, AutoencoderCard, read_card
from ldm3d.cases import CHANNELS, Case, find_cases
from ldm3d.checks import examine, share_out
from ldm3d.errors import DataError, WeightsError
from ldm3d.files import sha256
from ldm3d.nifti import orientation_of, spacing_of
from ldm3d.reference_profile import FACTS, FEATURES, ReferenceProfile
from ldm3d.sections import DataConfig
from ldm3d.training_profile import LARGEST, drawn
from ldm3d.volume_facts import latent_facts, volume_facts
from ldm3d.volumes import crop_or_pad, resample, scale_intensity
from ldm3d.weights import load_autoencoder

Encode = Callable[[np.ndarray], list[float]]


class NewVolume(NamedTuple):
    """What is known of one."""

    features: dict[str, float]
    orientation: str
    scanner: str
    latent: list[float]
    """Empty where it was not encoded."""


@dataclass(frozen=True)
class Folder:
    """What is known of the new volumes.

    Attributes:
        found: cases in the folder.
        judged: names of those that were measured: all, or as many as a profile holds, drawn by a hash of their names.
        unreadable: name -> why it could not be measured.
        features: name -> a number for each judged volume, in their order.
        facts: "orientation", "scanner" -> {value: how many}.
        latents: a row for each judged volume, or None.
        no_latents: why there are none; empty where there are.
    """

    found: int
    judged: list[str]
    unreadable: dict[str, str]
    features: dict[str, list[float]]
    facts: dict[str, dict[str, int]]
    latents: np.ndarray | None
    no_latents: str


def measure_folder(folder: Path, profile: ReferenceProfile, model_dir: Path) -> Folder:
    """Read and measure the volumes in a folder, on all cores.

    Raises:
        DataError: there is no volume, or none that can be read.
        WeightsError: the weights in `model_dir` are damaged, or were trained on other data than the profile is of;
            there is no contrast of its number.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    if not 0 <= profile.channel < len(CHANNELS):
        raise WeightsError(f"the profile is of channel {profile.channel}; there are 0 to {len(CHANNELS) - 1}")
    encode, no_latents = encoder(profile, model_dir)
    cases = {case.name: replace(case, label=None) for case in find_cases(folder, DataConfig(), profile.channel)}
    chosen = [cases[name] for name in drawn(list(cases), LARGEST)]

    def read_and_measure(case: Case) -> NewVolume:
        raw, affine = examine(case)
        return measure(case.image, orientation_of(case.image), raw, affine, profile, encode)

    outcomes = share_out(read_and_measure, chosen, "measuring new volumes")
    by_name = dict(zip((case.name for case in chosen), outcomes, strict=True))
    unreadable = {name: str(outcome) for name, outcome in by_name.items() if isinstance(outcome, DataError)}
    volumes = {name: outcome for name, outcome in by_name.items() if not isinstance(outcome, DataError)}
    if not volumes:
        reason = next(iter(unreadable.values()))
        raise DataError(f"{folder}: none of {len(unreadable)} volumes can be read; the first: {reason}")
    return gather(volumes, unreadable, len(cases), no_latents)


def measure(
    path: Path,
    orientation: str,
    raw: np.ndarray,
    affine: np.ndarray,
    profile: ReferenceProfile,
    encode: Encode | None,
) -> NewVolume:
    """One volume as training measured its own; arguments as of `ldm3d.volume_facts`. Raises `DataError`."""
    prepared = scale_intensity(resample(raw, spacing_of(affine), profile.spacing), str(path))
    facts = volume_facts(path, orientation, raw, affine, prepared, profile.spacing, profile.size)
    mean = np.reshape(profile.mean_image, (COARSE,) * 3)
    features = {**facts.features, "mean_match": match(facts.coarse, mean)}
    latent = encode(crop_or_pad(prepared, profile.size)) if encode else []
    return NewVolume(features, facts.orientation, facts.scanner, latent)


def gather(volumes: Mapping[str, NewVolume], unreadable: dict[str, str], found: int, no_latents: str) -> Folder:
    """Single volumes, by name, as a set."""
    each = list(volumes.values())
    return Folder(
        found=found,
        judged=list(volumes),
        unreadable=unreadable,
        features={name: [volume.features[name] for volume in each] for name in FEATURES},
        facts={name: dict(Counter(getattr(volume, name) for volume in each)) for name in FACTS},
        latents=None if no_latents else np.array([volume.latent for volume in each]),
        no_latents=no_latents,
    )


def encoder(profile: ReferenceProfile, model_dir: Path) -> tuple[Encode | None, str]:
    """How the profile's latents were made, if that can be repeated; else None and why not."""
    path = model_dir / AUTOENCODER
    if not path.is_file():
        return None, f"there is no {path}"
    trained_on = read_card(path, AutoencoderCard).trained_on
    if trained_on != profile.trained_on:
        raise WeightsError(
            f"{path}: was trained on other data ({trained_on}) than the profile beside it is of ({profile.trained_on})"
        )
    if profile.latents is None:
        return None, "the profile holds no latents: stage 2 of the training, or make_profile, adds them"
    if sha256(path) != profile.latents.autoencoder_sha256:
        return None, f"the profile's latents are of another {AUTOENCODER}; stage 2 of the training renews them"
    device = distributed.choose_device()
    autoencoder = load_autoencoder(model_dir)[0].to(device)
    # Volumes are read on all cores; one encoding at a time is what memory is there for.
    alone = Lock()

    def encode(image: np.ndarray) -> list[float]:
        with alone, torch.inference_mode():
            mean, _ = autoencoder.encode(torch.from_numpy(image)[None, None].to(device))
        return latent_facts(mean[0].cpu().numpy())

    return encode, ""
