"""ldm3d.latents: what the cache keeps, when it is made anew, and how latents are normalised."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from ldm3d.errors import LatentsError, OutputError, WeightsError
from ldm3d.latents import LatentCache, LatentStatistics, build_latent_cache

COUNT = 4
CONTENTS = [f"content {i}" for i in range(COUNT)]


class Counted:
    """The tiny autoencoder; counts the volumes that it encodes, and fails after so many."""

    def __init__(self, fail_after: int = 1000) -> None:
        self.network, self.encoded, self.fail_after = tiny.autoencoder(), 0, fail_after

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoded >= self.fail_after:
            raise KeyboardInterrupt
        self.encoded += 1
        return self.network.encode(images)


def build(root: Path, autoencoder: Any = None, **changes: Any) -> LatentCache:
    settings = {
        "autoencoder_sha256": "weights",
        "volumes": tiny.Volumes(tiny.images(COUNT)),
        "contents": CONTENTS,
        "flip": False,
        "device": tiny.CPU,
    }
    return build_latent_cache(root, autoencoder or tiny.autoencoder(), **{**settings, **changes})


def posterior(flip: bool = False) -> tuple[Tensor, Tensor]:
    images = tiny.images(COUNT)
    return tiny.autoencoder().encode(images.flip(2) if flip else images)


def filled(root: Path, posteriors: np.ndarray) -> LatentCache:
    """A cache of given posteriors (N, V, 2, C, X, Y, Z)."""
    root.mkdir(exist_ok=True)
    np.save(root / "posteriors.npy", posteriors.astype(np.float16))
    (root / "index.json").write_text(json.dumps({"cases": [f"case{i}" for i in range(len(posteriors))]}))
    return LatentCache(root)


def entries(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


# What is kept


def test_mean_and_deviation_are_kept(tmp_path: Path) -> None:
    cache = build(tmp_path)
    mean, sigma = posterior()
    assert len(cache) == COUNT
    assert cache.cases == [f"case{i}" for i in range(COUNT)]
    assert cache.latent_shape == mean.shape[1:] == (3, 8, 8, 8)
    stored = torch.from_numpy(np.array(cache.posteriors)).float()
    assert stored.shape == (COUNT, 1, 2, 3, 8, 8, 8)
    torch.testing.assert_close(stored[:, 0, 0], mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(stored[:, 0, 1], sigma, atol=1e-4, rtol=1e-3)
    for i in range(COUNT):
        torch.testing.assert_close(cache.mean(i, tiny.CPU), mean[i : i + 1], atol=1e-4, rtol=1e-3)


def test_mirrored_volumes_are_encoded_too(tmp_path: Path) -> None:
    cache = build(tmp_path, flip=True)
    stored = torch.from_numpy(np.array(cache.posteriors)).float()
    for side in (0, 1):
        mean, sigma = posterior(flip=bool(side))
        torch.testing.assert_close(stored[:, side, 0], mean, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(stored[:, side, 1], sigma, atol=1e-4, rtol=1e-3)
    assert not torch.equal(stored[:, 0], stored[:, 1])
    torch.testing.assert_close(cache.mean(1, tiny.CPU), posterior()[0][1:2], atol=1e-4, rtol=1e-3)


# When it is made anew


def test_the_second_build_encodes_nothing(tmp_path: Path) -> None:
    first = build(tmp_path)
    again = build(tmp_path, Counted(fail_after=0))
    assert np.array_equal(first.posteriors, again.posteriors)
    assert first.cases == again.cases


@pytest.mark.parametrize(
    "change",
    [
        {"autoencoder_sha256": "other weights"},
        {"contents": [*CONTENTS[:-1], "other content"]},
        {"contents": CONTENTS[::-1]},
        {"contents": CONTENTS[:-1]},
        {"flip": True},
        {"volumes": tiny.Volumes(tiny.images(COUNT, side=8))},
    ],
    ids=["weights", "content", "order", "fewer", "flip", "size"],
)
def test_another_input_makes_another_entry(tmp_path: Path, change: dict[str, Any]) -> None:
    build(tmp_path)
    counted = Counted()
    cache = build(tmp_path, counted, **change)
    assert counted.encoded >= len(cache) == len(change.get("contents", CONTENTS))
    assert len(entries(tmp_path)) == 2
    build(tmp_path, Counted(fail_after=0))  # the first one is still there


def test_an_interrupted_build_is_made_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Counted(fail_after=2))
    (entry,) = tmp_path.iterdir()
    assert entries(entry) == {"posteriors.npy"}
    cache = build(tmp_path)
    assert entries(tmp_path) == {entry.name}
    assert np.array_equal(cache.posteriors, build(tmp_path / "elsewhere").posteriors)
    assert np.array(cache.posteriors).any(axis=(1, 2, 3, 4, 5, 6)).all()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match=r"cache.*posteriors\.npy: cannot be written: "):
        build(tmp_path / "cache")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room on a disk")
def test_a_full_disk_is_noticed_before_the_map_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a map that finds no room kills the process without a word."""

    def full(file: int, start: int, length: int) -> None:
        assert length == os.fstat(file).st_size > 2 * COUNT * 2 * 3 * 8**3
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"posteriors\.npy: cannot be written: No space left on device"):
        build(tmp_path)
    assert not list(tmp_path.rglob("index.json"))


# How latents are drawn


def two_sides(tmp_path: Path) -> LatentCache:
    """Two volumes, whose posteriors are N(i + 1, 0.5) and, mirrored, N(-i - 1, 0.25)."""
    posteriors = np.zeros((2, 2, 2, 3, 4, 4, 4))
    for i in range(2):
        posteriors[i, 0, 0], posteriors[i, 0, 1] = i + 1, 0.5
        posteriors[i, 1, 0], posteriors[i, 1, 1] = -i - 1, 0.25
    return filled(tmp_path, posteriors)


def test_drawn_latents_have_the_posteriors_mean_and_deviation(tmp_path: Path) -> None:
    cache = two_sides(tmp_path)
    drawn = torch.stack([cache.sample([1, 0], tiny.random(step)) for step in range(200)])
    assert drawn.shape == (200, 2, 3, 4, 4, 4)
    assert drawn.dtype == torch.float32
    for position, mean in ((0, 2), (1, 1)):
        assert drawn[:, position].mean().item() == pytest.approx(mean, abs=0.01)
        assert drawn[:, position].std().item() == pytest.approx(0.5, abs=0.01)


def test_draws_are_those_of_the_step(tmp_path: Path) -> None:
    cache = two_sides(tmp_path)
    first, second = (cache.sample([0, 1], tiny.random(step), flip=True) for step in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(cache.sample([0, 1], tiny.random(0), flip=True), first)


def test_half_of_the_draws_are_mirrored_where_wanted(tmp_path: Path) -> None:
    cache = two_sides(tmp_path)
    draws = [cache.sample([0, 1], tiny.random(step), flip=True) for step in range(200)]
    assert 160 < (torch.cat(draws).mean(dim=(1, 2, 3, 4)) < 0).sum() < 240
    assert (cache.sample([0, 1] * 50, tiny.random(0, 100)).mean(dim=(1, 2, 3, 4)) > 0).all()


# Normalisation


def random_posteriors(tmp_path: Path) -> tuple[LatentCache, Tensor, Tensor]:
    """Each latent voxel with a mean of its own over the volumes, float64 as stored (N * V, C, X, Y, Z)."""
    rng = np.random.default_rng(0)
    place = rng.normal(2, 3, (1, 1, 2, 4, 4, 4))
    mean = place + rng.normal(0, 0.7, (6, 2, 2, 4, 4, 4))
    sigma = rng.uniform(0.3, 0.9, mean.shape)
    cache = filled(tmp_path, np.stack([mean, sigma], axis=2))
    stored = torch.from_numpy(np.array(cache.posteriors, dtype=np.float64)).flatten(0, 1)
    return cache, stored[:, 0], stored[:, 1]


def test_scale_factor_is_one_over_the_deviation_of_all_latents(tmp_path: Path) -> None:
    cache, mean, sigma = random_posteriors(tmp_path)
    statistics = cache.statistics(centre=False)
    variance = mean.var(correction=0) + sigma.square().mean()
    assert statistics.scale_factor == pytest.approx(variance.rsqrt().item(), rel=1e-9)
    assert statistics.mean.shape == (1, 1, 1, 1)
    assert not statistics.mean.any()
    torch.manual_seed(0)
    drawn = torch.cat(
        [statistics.normalise(cache.sample(range(6), tiny.random(step, 6), flip=True)) for step in range(50)]
    )
    assert drawn.std().item() == pytest.approx(1, abs=0.01)


def test_centred_statistics_take_away_each_voxels_mean(tmp_path: Path) -> None:
    cache, mean, sigma = random_posteriors(tmp_path)
    statistics = cache.statistics(centre=True)
    torch.testing.assert_close(statistics.mean, mean.mean(0).float())
    variance = (mean - mean.mean(0)).square().mean() + sigma.square().mean()
    assert statistics.scale_factor == pytest.approx(variance.rsqrt().item(), rel=1e-6)
    assert statistics.scale_factor > 2 * cache.statistics(centre=False).scale_factor
    torch.manual_seed(0)
    drawn = torch.cat(
        [statistics.normalise(cache.sample(range(6), tiny.random(step, 6), flip=True)) for step in range(100)]
    )
    assert drawn.std().item() == pytest.approx(1, abs=0.01)
    assert drawn.mean(0).abs().max() < 0.2


@pytest.mark.parametrize("mean", [torch.zeros(1, 1, 1, 1), torch.randn(3, 4, 4, 4)], ids=["one factor", "centred"])
def test_restoring_undoes_normalising(mean: Tensor) -> None:
    statistics = LatentStatistics(mean, 0.37)
    latent = torch.randn(2, 3, 4, 4, 4)
    normalised = statistics.normalise(latent)
    torch.testing.assert_close(normalised, (latent - mean) * 0.37)
    torch.testing.assert_close(statistics.restore(normalised), latent)


# Latents of which nothing can be learned


class Scaled:
    """The tiny autoencoder with means and deviations that are multiplied."""

    def __init__(self, mean: float = 1.0, sigma: float = 1.0) -> None:
        self.network, self.factors = tiny.autoencoder(), (mean, sigma)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, sigma = self.network.encode(images)
        return mean * self.factors[0], sigma * self.factors[1]


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"mean": 1e7}, r"-\S+e\+07 to "),
        ({"sigma": 1e7}, r"\S+ to \S+e\+05;"),
        ({"mean": math.nan}, r".* 1536 of 3072 not finite;"),
    ],
)
def test_latents_beyond_float16_are_refused(factors: dict[str, float], said: str, tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match=f"^case0: its latents are {said}"):
        build(tmp_path, Scaled(**factors))
    assert not list(tmp_path.rglob("index.json"))


def test_a_sigma_below_float16_becomes_none(tmp_path: Path) -> None:
    cache = build(tmp_path, Scaled(sigma=1e-9))
    assert not cache.posteriors[:, :, 1].any() and cache.posteriors[:, :, 0].any()
    assert torch.equal(cache.sample([0], tiny.random(0, 1)), cache.mean(0, tiny.CPU))


@pytest.mark.parametrize(("value", "variance"), [(np.inf, "nan"), (0.0, "0")])
def test_latents_without_a_spread_are_refused(value: float, variance: str, tmp_path: Path) -> None:
    """As an older cache may hold them."""
    cache = filled(tmp_path / "entry", np.full((2, 1, 2, 3, 4, 4, 4), value))
    for centre in (False, True):
        with pytest.raises(WeightsError, match=f"entry/posteriors.npy: the latents have variance {variance}, "):
            cache.statistics(centre)
