"""ldm3d.outside: what a box around the middle leaves out of a head, and what would hold it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from ldm3d.cache import ONE
from ldm3d.cases import Case
from ldm3d.outside import outside, warn_if_cut_off
from ldm3d.splits import Split

SHAPE = (60, 72, 50)
RADII = np.array([20, 26, 18])


def head(shift: int = 0, air: float = 0.0, scale: int = 1) -> np.ndarray:
    """An ellipsoid of noise as it is cached, so many voxels above the middle, in more or less black air."""
    random = np.random.default_rng(0)
    places = np.indices(SHAPE).reshape(3, -1).T - (np.array(SHAPE) - 1) / 2 - (0, 0, shift)
    inside = (np.square(places / RADII).sum(1) < 1).reshape(SHAPE)
    volume = np.where(inside, random.uniform(0.3, 1, SHAPE), random.uniform(0, air, SHAPE))
    return np.rint(np.kron(volume, np.ones((scale,) * 3)) * ONE).astype("<u2")


def cut_off(volume: np.ndarray, size: tuple[int, ...]) -> float:
    """The share, counted."""
    mask = volume > 0.25 * ONE
    box = tuple(slice((n - want) // 2, (n - want) // 2 + want) for n, want in zip(volume.shape, size, strict=True))
    return 1 - np.count_nonzero(mask[box]) / np.count_nonzero(mask)


@pytest.mark.parametrize("air", [0.0, 0.1], ids=["skull-stripped", "noise in the air"])
@pytest.mark.parametrize(("scale", "spacing"), [(1, 3.0), (2, 1.5)], ids=["coarse", "fine"])
@pytest.mark.parametrize("shift", [0, 4, -6])
def test_the_share_is_that_of_the_heads_voxels(air: float, scale: int, spacing: float, shift: int) -> None:
    size = (48 * scale, 56 * scale, 36 * scale)
    volume = head(shift, air, scale)
    measured = outside(volume, size, (spacing,) * 3)
    assert measured.share == pytest.approx(cut_off(volume, size), abs=0.02 if air else 0.005)
    assert (cut_off(volume, size) > 0.005) == bool(shift)
    # The box that is said to hold it does, and no smaller one by a tenth.
    assert cut_off(volume, measured.needed) < 0.005
    smaller = np.array(measured.needed) * 9 // 10
    assert all(cut_off(volume, tuple(np.where(np.arange(3) == a, smaller, measured.needed))) > 0.001 for a in range(3))


def test_a_volume_without_a_head_is_not_cut_off() -> None:
    assert outside(np.zeros(SHAPE, np.uint16), (16, 16, 16), (3, 3, 3)).share == 0


def said(capsys: pytest.CaptureFixture[str], shifts: dict[str, int], size: tuple[int, ...], spacing: float = 3) -> str:
    """What is said of heads by their names and shifts."""
    cases = tuple(Case(name, Path(name)) for name in shifts)
    cache = SimpleNamespace(get=lambda case: head(shifts[case.name]))
    data: Any = SimpleNamespace(split=Split(cases[1:], cases[:1]), cache=cache)
    cfg = tiny.config(diffusion_train={"patch_size": list(size)}, spacing=[spacing] * 3)
    capsys.readouterr()
    warn_if_cut_off(cfg, data)
    return capsys.readouterr().err


def test_one_line_says_how_much_of_whom_and_what_would_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, {"whole": 0, "low": -6, "high": 4}, (48, 56, 36))
    shares = [cut_off(head(shift), (48, 56, 36)) for shift in (4, -6)]
    found = re.fullmatch(
        r"warning: diffusion_train\.patch_size \[48, 56, 36\] cuts off 0\.5% or more of 2 of 3 heads: (\S+)% of a head "
        r"in the median, (\S+)% of low; that part is neither learned nor generated\. \[48, 56, 48\] would hold them "
        r"all, or spacing \[4\.0, 4\.0, 4\.0\]\n",
        line,
    )
    assert found, line
    assert [float(share) / 100 for share in found.groups()] == pytest.approx(shares, abs=0.006)
    # Who does as it says hears no more of it.
    assert said(capsys, {"whole": 0, "low": -6, "high": 4}, (48, 56, 48)) == ""


def test_of_whole_heads_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, {"a": 0, "b": 1}, (48, 56, 40)) == ""
