"""Measure a folder of new volumes as training measured its own."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from ldm3d import distributed
from ldm3d.brain import COARSE, match
from ldm3d.cards import AUTOENCODER, AutoencoderCard, read_card
from ldm3d.cases import Case, find_cases
from ldm3d.checks import examine, share_out
from ldm3d.errors import DataError, WeightsError
from ldm3d.files import sha256
from ldm3d.nifti import orientation_of, spacing_of
from ldm3d.reference_profile import ReferenceProfile
from ldm3d.sections import DataConfig
from ldm3d.training_profile import LARGEST, drawn
from ldm3d.volume_facts import FEATURES, VolumeFacts, latent_facts, volume_facts
from ldm3d.volumes import crop_or_pad, resample, scale_intensity
from ldm3d.weights import load_autoencoder

Encode = Callable[[np.ndarray], list[float]]


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
        WeightsError: the weights in `model_dir` are damaged, or were trained on other data than the profile is of.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    encode, no_latents = encoder(profile, model_dir)
    cases = {case.name: replace(case, label=None) for case in find_cases(folder, DataConfig(), profile.channel)}
    chosen = [cases[name] for name in drawn(list(cases), LARGEST)]

    def measure(case: Case) -> tuple[VolumeFacts, list[float]]:
        raw, affine = examine(case)
        prepared = scale_intensity(resample(raw, spacing_of(affine), profile.spacing), case.name)
        orientation = orientation_of(case.image)
        facts = volume_facts(case.image, orientation, raw, affine, prepared, profile.spacing, profile.size)
        return facts, encode(crop_or_pad(prepared, profile.size)) if encode else []

    outcomes = dict(
        zip((case.name for case in chosen), share_out(measure, chosen, "measuring new volumes"), strict=True)
    )
    unreadable = {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, DataError)}
    good = {name: outcome for name, outcome in sorted(outcomes.items()) if not isinstance(outcome, DataError)}
    if not good:
        reason = next(iter(unreadable.values()))
        raise DataError(f"{folder}: none of {len(unreadable)} volumes can be read; the first: {reason}")
    facts = [found for found, _ in good.values()]
    features = {name: [one.features[name] for one in facts] for name in FEATURES}
    mean = np.reshape(profile.mean_image, (COARSE,) * 3)
    features["mean_match"] = [match(one.coarse, mean) for one in facts]
    return Folder(
        found=len(cases),
        judged=list(good),
        unreadable=unreadable,
        features=features,
        facts={key: dict(Counter(getattr(one, key) for one in facts)) for key in ("orientation", "scanner")},
        latents=np.array([row for _, row in good.values()]) if encode else None,
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
