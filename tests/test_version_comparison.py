"""Comparing versions: seldom wrong however often one looks, right in the end, and plain about what is not known."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated_jobs import DIGESTS, brain, give_reference, job, profile

from ldm3d.brain import IMAGE_FEATURES
from ldm3d.errors import DataError
from ldm3d.reference_profile import write_profile
from mlops.commands import run_command
from mlops.monitoring import comparison, model_monitor
from mlops.monitoring.comparison import LEAST_UNITS, compare, difference_of_means, difference_of_shares, energies
from mlops.monitoring.quality import Measured, Reference

ALPHA = 0.05
LOOKS = (20, 25, 32, 42, 56, 75, 100, 140, 200, 300)
ONE, OTHER = ("demo", "1"), ("demo", "2")


def decided(answers: list[comparison.Answer]) -> bool:
    return any(answer.low > 0 or answer.high < 0 for answer in answers)


def test_equal_versions_are_seldom_told_apart_however_often_one_looks() -> None:
    rng = np.random.default_rng(0)
    draws, wrong, wrong_shares = 300, 0, 0
    for _ in range(draws):
        means, shares = rng.exponential(1, (2, LOOKS[-1])), (rng.random((2, LOOKS[-1])) < 0.9).astype(float)
        wrong += decided([difference_of_means(means[0, :n], means[1, :n], ALPHA) for n in LOOKS])
        wrong_shares += decided([difference_of_shares(shares[0, :n], shares[1, :n], ALPHA) for n in LOOKS])
    assert wrong / draws < ALPHA and wrong_shares / draws < ALPHA


def test_an_interval_for_one_look_would_be_wrong_more_often() -> None:
    """That the test above can fail: with Welch's own interval it does."""
    rng = np.random.default_rng(0)
    keep, comparison.widening = comparison.widening, lambda units, alpha: 1.96
    try:
        wrong = 0
        for _ in range(300):
            means = rng.exponential(1, (2, LOOKS[-1]))
            wrong += decided([difference_of_means(means[0, :n], means[1, :n], ALPHA) for n in LOOKS])
    finally:
        comparison.widening = keep
    assert wrong / 300 > 2 * ALPHA


def test_a_real_difference_is_found_after_about_as_many_as_were_said() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(0, 1, 3000), rng.normal(0.4, 1, 3000)
    early = difference_of_means(one[:60], other[:60], ALPHA)
    assert early.missing > 0
    needed = next(n for n in range(60, 3000, 10) if difference_of_means(one[:n], other[:n], ALPHA).missing == 0)
    assert 60 < needed < 400
    late = difference_of_means(one[:1000], other[:1000], ALPHA)
    assert late.low < -0.4 < late.high < 0
    shares = difference_of_shares(np.repeat([0.0, 1.0], [30, 270]), np.ones(300), ALPHA)
    assert shares.high < 0


def test_too_few_and_no_difference_are_said() -> None:
    few = difference_of_means([1.0] * 5, [2.0] * 30, ALPHA)
    assert few.missing == LEAST_UNITS - 5 and few.high == np.inf
    assert difference_of_means([1.0] * 30, [1.0] * 30, ALPHA).missing == np.inf
    assert difference_of_shares([1.0] * 30, [1.0] * 30, ALPHA).missing == np.inf


def volumes(rng: np.random.Generator, n: int, shift: float = 0) -> list[list[Measured]]:
    """One volume for each of n jobs, by its features alone."""
    return [[Measured(rng.normal(shift, 1, len(IMAGE_FEATURES)), np.zeros((8, 8, 8)))] for _ in range(n)]


def test_quality_is_seldom_decided_wrongly_and_a_worse_version_is_found() -> None:
    rng = np.random.default_rng(2)
    made = profile([brain(i) for i in range(3)])
    features = {name: sorted(rng.normal(0, 1, 200)) for name in IMAGE_FEATURES}
    reference = Reference(made.model_copy(update={"features": features}))
    wrong = 0
    for _ in range(60):
        one, other = (energies(volumes(rng, 160), reference) for _ in range(2))
        wrong += decided([difference_of_means(one[:n], other[:n], ALPHA) for n in (20, 40, 80)])
    assert wrong / 60 < ALPHA
    assert difference_of_means(one, energies(volumes(rng, 160, 0.5), reference), ALPHA).high < 0
    assert np.mean(one) == pytest.approx(0, abs=0.1)  # 0 for equal distributions


def fill(data: Path, n: int, **second: Any) -> None:
    """n jobs of each version; the second one's are other than the first one's."""
    for seed in range(n):
        job(data, [brain(seed)], "1", seed, seconds=2 + 0.1 * (seed % 3))
        facts = {"size": 1.0, "seconds": 2.0, "fails": 0, "caller": "a"} | second
        failed = seed < facts["fails"]
        made = [] if failed else [brain(1000 + seed, facts["size"])]
        job(
            data, made, "2", seed, "failed" if failed else "done", facts["seconds"] + 0.1 * (seed % 3),
        )  # fmt: skip


def test_a_worse_version_is_named(tmp_path: Path) -> None:
    give_reference(tmp_path, [brain(5000 + i) for i in range(40)])
    fill(tmp_path, 70, size=0.85, seconds=4.0, fails=24)
    said = compare(tmp_path, ONE, OTHER, ALPHA).splitlines()
    assert said[:2] == [f"demo/{i}: 70 jobs, 70 jobs by chance" for i in (1, 2)]
    assert [line.partition(" (")[0] for line in said[2:]] == [
        f"{what}: demo/1 is better" for what in ("success", "speed", "quality")
    ]
    turned = compare(tmp_path, OTHER, ONE, ALPHA).splitlines()[2:]
    assert all("demo/1 is better" in line for line in turned)


def test_a_version_that_makes_empty_volumes_is_worse(tmp_path: Path) -> None:
    for seed in range(30):
        job(tmp_path, [brain(seed)], "1", seed)
        job(tmp_path, [0 * brain(seed)], "2", seed)
    assert "success: demo/1 is better" in compare(tmp_path, ONE, OTHER, ALPHA)


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    fill(tmp_path, 25, seconds=2.03)
    said = compare(tmp_path, ONE, OTHER, ALPHA)
    assert "success: cannot tell; no difference is seen so far (jobs that made brains: -" in said
    assert "speed: cannot tell yet; about " in said and " more volumes are needed" in said
    assert "quality: not compared, as weights came without reference_profile.json" in said
    give_reference(tmp_path, [brain(5000 + i) for i in range(10)])
    other = profile([brain(6000 + i) for i in range(10)], trained_on="u" * 64)
    write_profile(tmp_path / "models" / DIGESTS["2"], other)
    assert "quality: not compared, as the versions were trained on different data" in compare(
        tmp_path, ONE, OTHER, ALPHA
    )


def test_where_callers_are_assigned_callers_are_compared(tmp_path: Path) -> None:
    """A hundred jobs of one caller say no more than that caller."""
    for seed in range(60):
        job(tmp_path, [], "1", seed, seconds=2, assigned_by="caller", caller="a")
        job(tmp_path, [], "2", seed, seconds=9, assigned_by="caller", caller="b")
    said = compare(tmp_path, ONE, OTHER, ALPHA)
    assert "demo/1: 60 jobs, 1 callers by chance" in said
    assert "is better" not in said and "speed: cannot tell yet; about 2,280 more volumes are needed" in said


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    job(tmp_path, [], "1")
    with pytest.raises(DataError, match="has no finished job of demo/2; it has some of demo/1"):
        compare(tmp_path, ONE, OTHER, ALPHA)
    job(tmp_path, [], "2")
    job(tmp_path, [], "2", digest="c" * 64)
    with pytest.raises(DataError, match="demo/2: its name has stood for several weights"):
        compare(tmp_path, ONE, OTHER, ALPHA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "demo", "demo/2"], "demo: name a version as MODEL/VERSION"),
        (["compare", "demo/1", "demo/2", "--alpha", "2"], "must be between 0 and 1"),
        (["compare", "demo/1", "demo/2"], "is not the service's data folder"),
        (["caller", "key:x"], "usage_salt"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["model_monitor", *arguments])
    monkeypatch.setenv("LDM3D_DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        run_command(model_monitor.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
