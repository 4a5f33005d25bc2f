"""Measure the training data for `ldm3d.reference_profile`: at training time, all processes together."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm3d import distributed
from ldm3d.brain import distance, match, rounded
from ldm3d.cases import Case
from ldm3d.checks import share_out
from ldm3d.data import Prepared, on_main
from ldm3d.errors import DataError, WeightsError
from ldm3d.latents import LatentCache
from ldm3d.nifti import orientation_of, read_volume
from ldm3d.reference_profile import ProfileLatents, ReferenceProfile, read_profile
from ldm3d.schema import Config
from ldm3d.volume_facts import FEATURES, VolumeFacts, latent_facts, volume_facts

LARGEST = 256
"""Volumes that are measured: more make a comparison hardly sharper, which is limited by the number of new volumes."""


def training_profile(cfg: Config, data: Prepared, model_dir: Path) -> ReferenceProfile:
    """The profile of the training split; all ranks call this together.

    The one in `model_dir` is taken where it is of these data and this grid, so that only a first start measures.

    Raises:
        DataError: a file that could be read before cannot be now; on every rank.
    """
    size = cfg.diffusion_train.patch_size
    digest = data.digest()
    kept = on_main(lambda: _kept(model_dir))
    if kept and (kept.trained_on, kept.spacing, kept.size) == (digest, cfg.spacing, size):
        # Its latents are those of the autoencoder that was there.
        return kept.model_copy(update={"latents": None})
    by_name = {case.name: case for case in data.split.train}
    names = drawn(list(by_name), LARGEST)

    def measure(case: Case) -> VolumeFacts:
        raw, affine = read_volume(case.image, case.channel)
        prepared = data.cache.load(case)
        return volume_facts(case.image, orientation_of(case.image), raw, affine, prepared, cfg.spacing, size)

    found: list[VolumeFacts] = []
    for outcome in share_out(measure, [by_name[name] for name in names], "measuring the training data"):
        if isinstance(outcome, DataError):
            raise outcome
        found.append(outcome)
    images = np.array([facts.coarse for facts in found])
    total = images.sum(0)
    # Each with the mean of the others: no new volume will have a part in the mean either.
    others = (total - images) / max(1, len(images) - 1)
    features = {name: [facts.features[name] for facts in found] for name in FEATURES}
    features["mean_match"] = [match(image, mean) for image, mean in zip(images, others, strict=True)]
    return ReferenceProfile(
        trained_on=digest,
        num_train=len(by_name),
        channel=cfg.channel,
        spacing=cfg.spacing,
        size=size,
        features={name: sorted(values) for name, values in features.items()},
        facts={
            "orientation": dict(sorted(Counter(facts.orientation for facts in found).items())),
            "scanner": dict(sorted(Counter(facts.scanner for facts in found).items())),
        },
        mean_image=[rounded(value) for value in (total / len(images)).ravel()],
        # The order is that of a hash, so neighbours are random pairs.
        pair_distances=sorted(
            distance(one, other) for one, other in zip(images, np.roll(images, 1, axis=0), strict=True)
        ),
    )


def with_latents(profile: ReferenceProfile, cache: LatentCache, autoencoder_sha256: str) -> ReferenceProfile:
    """Add the facts of the training volumes' latents, from their cache; on other ranks than 0 nothing is read."""
    if not distributed.is_main():
        return profile
    places = {name: i for i, name in enumerate(cache.cases)}
    rows = [latent_facts(cache.posteriors[places[name], 0, 0]) for name in drawn(cache.cases, LARGEST)]
    latents = ProfileLatents(autoencoder_sha256=autoencoder_sha256, rows=rows)
    return profile.model_copy(update={"latents": latents})


def drawn(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names, or all, in the order of their hash: always the same ones, and of no meaning."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count]


def _kept(model_dir: Path) -> ReferenceProfile | None:
    try:
        return read_profile(model_dir)
    except WeightsError:
        return None
