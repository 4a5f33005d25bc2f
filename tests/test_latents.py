"""ldm3d.latents: what the cache keeps, when it is made anew, and how latents are normalised."""

import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from torch import Tensor

from ldm3d import encoding, latents, lock
from ldm3d.encoding import EncodedVolumes
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


# A build that was interrupted


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry of which volumes 0 and 1 are there; the first one was encoded before, to know the shape."""
    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_MARKS", 0)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", Counted(fail_after=3))
    (entry,) = (tmp_path / "cache").iterdir()
    assert entries(entry) == {".lock", "posteriors.npy", "encoded.jsonl"}
    return entry


def require_whole(entry: Path, encoded: int) -> None:
    """The next build makes of the entry what an undisturbed one makes, and has to encode so many volumes for that."""
    counted = Counted()
    cache = build(entry.parent, counted)
    whole = build(entry.parent.parent / "elsewhere")
    assert np.array_equal(cache.posteriors, whole.posteriors)
    assert cache.cases == whole.cases
    assert np.array(cache.posteriors).any(axis=(1, 2, 3, 4, 5, 6)).all()
    assert counted.encoded == encoded
    assert entries(entry.parent) == {entry.name}
    assert entries(entry) == {".lock", "posteriors.npy", "index.json"}


def test_an_interrupted_build_goes_on(interrupted: Path) -> None:
    require_whole(interrupted, encoded=1 + 2)


def test_a_build_that_is_interrupted_again_and_again_ends(interrupted: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(interrupted.parent, Counted(fail_after=2))
    require_whole(interrupted, encoded=1 + 1)


def test_a_note_that_was_cut_short_counts_for_nothing(interrupted: Path) -> None:
    with open(interrupted / "encoded.jsonl", "a") as file:
        file.write('{"2": "ca')
    with pytest.raises(KeyboardInterrupt):
        build(interrupted.parent, Counted(fail_after=2))  # volume 2, noted behind what was cut
    require_whole(interrupted, encoded=1 + 1)


@pytest.mark.parametrize("what", ["key", "shape", "length", "note"])
def test_what_does_not_belong_together_is_made_anew(interrupted: Path, what: str) -> None:
    posteriors, journal = interrupted / "posteriors.npy", interrupted / "encoded.jsonl"
    if what == "key":
        journal.write_text("another\n" + journal.read_text().partition("\n")[2])
    elif what == "shape":
        np.save(posteriors, np.ones((COUNT, 1, 2, 3, 8, 8, 4), np.float16))
    elif what == "length":
        os.truncate(posteriors, posteriors.stat().st_size - 1)
    else:
        journal.unlink()
    require_whole(interrupted, encoded=1 + COUNT)


def test_volumes_are_noted_only_when_their_data_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_MARKS", 0)
    small = tiny.Volumes(tiny.images(COUNT, side=8))  # their posteriors would fit a file's buffer
    whole = build(tmp_path / "whole", volumes=small).posteriors
    flushed: list[int] = []
    fsync, add = os.fsync, EncodedVolumes.add

    def noting(file: int) -> None:
        fsync(file)
        flushed.append(os.fstat(file).st_ino)

    def checking(journal: EncodedVolumes, cases: dict[int, str]) -> None:
        posteriors = journal.path.parent / "posteriors.npy"
        assert flushed[-1] == posteriors.stat().st_ino
        stored = np.load(posteriors)
        assert all(np.array_equal(stored[i], whole[i]) for i in cases)
        add(journal, cases)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(EncodedVolumes, "add", checking)
    assert len(build(tmp_path / "cache", volumes=small)) == COUNT


# Two at once


def test_two_trainings_do_not_fill_one_entry(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    before = (interrupted / "posteriors.npy").read_bytes()
    with FileLock(interrupted / ".lock"), pytest.raises(OutputError) as refused:
        build(interrupted.parent)
    assert str(refused.value) == (
        f"{interrupted}: another training is encoding these latents; start again when it has: they serve both"
    )
    assert (interrupted / "posteriors.npy").read_bytes() == before
    require_whole(interrupted, encoded=1 + 2)


def test_what_another_training_has_just_finished_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_writer = latents.only_writer

    @contextmanager
    def late(*given: str) -> Iterator[None]:
        monkeypatch.undo()
        build(tmp_path)
        with only_writer(*given):  # type: ignore[arg-type]
            yield

    monkeypatch.setattr(latents, "only_writer", late)
    assert len(build(tmp_path, Counted(fail_after=0))) == COUNT


def test_a_whole_entry_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    monkeypatch.setattr(latents, "only_writer", None)
    assert len(build(tmp_path)) == COUNT


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match=r"cache/latents-.*: cannot be locked: "):
        build(tmp_path / "cache")


def test_a_full_disk_is_noticed_before_volumes_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = 2 * COUNT * 2 * 3 * 8**3
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=nbytes - 1))
    counted = Counted(fail_after=1)  # to know the shape
    with pytest.raises(OutputError, match=r"posteriors\.npy: cannot be written: needs 0\.0 GB, 0\.0 GB are free"):
        build(tmp_path, counted)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=nbytes))
    assert len(build(tmp_path)) == COUNT


def test_a_disk_that_fills_up_loses_nothing(interrupted: Path) -> None:
    """No file can grow beyond what a limit says: the system answers as it does where a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python has been told to ignore the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2 * 3 * 8**3 * 2 + 500, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"posteriors\.npy: cannot be written: File too large"):
            build(interrupted.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    require_whole(interrupted, encoded=1 + 2)


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


def test_moments_are_computed_once(tmp_path: Path) -> None:
    cache, _, _ = random_posteriors(tmp_path)
    first = {centre: cache.statistics(centre) for centre in (True, False)}
    again = LatentCache(tmp_path)
    again.posteriors = np.full_like(again.posteriors, np.nan)  # type: ignore[assignment]
    for centre, statistics in first.items():
        assert again.statistics(centre).scale_factor == statistics.scale_factor
        assert torch.equal(again.statistics(centre).mean, statistics.mean)


@pytest.mark.parametrize("kept", [b"", b"damaged", None], ids=["empty", "damaged", "of another shape"])
def test_moments_that_are_not_these_are_computed_anew(tmp_path: Path, kept: bytes | None) -> None:
    cache, _, _ = random_posteriors(tmp_path)
    scale_factor = cache.statistics(False).scale_factor
    if kept is None:
        np.save(tmp_path / "moments.npy", np.ones((2, 1, 1, 1, 1)))
    else:
        (tmp_path / "moments.npy").write_bytes(kept)
    for _ in range(2):
        assert cache.statistics(False).scale_factor == scale_factor
    assert np.load(tmp_path / "moments.npy").shape == (2, 2, 4, 4, 4)


def test_moments_of_an_entry_that_is_encoded_anew_are_forgotten(tmp_path: Path) -> None:
    cache = build(tmp_path)
    scale_factor = cache.statistics(False).scale_factor
    np.save(cache.folder / "moments.npy", np.ones((2, *cache.latent_shape)))
    (cache.folder / "index.json").unlink()
    assert build(tmp_path).statistics(False).scale_factor == scale_factor


def test_a_folder_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, _, _ = random_posteriors(tmp_path)

    @contextmanager
    def refusing(path: Path) -> Iterator[Path]:
        raise OutputError(f"{path}: read-only")
        yield

    monkeypatch.setattr(latents, "atomic_path", refusing)
    assert cache.statistics(False).scale_factor > 0
    assert "warning: " in capsys.readouterr().err


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
