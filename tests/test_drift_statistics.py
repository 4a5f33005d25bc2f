"""Tests of drift: false alarms stay below what was promised, differences are found, PSI is read beside chance."""

import numpy as np
import pytest
from scipy import stats

from mlops.monitoring.drift_statistics import (
    compare_latents,
    compare_numbers,
    compare_words,
    corrected,
    psi,
    too_few,
)


def test_false_alarms_of_many_features_stay_below_alpha() -> None:
    """100 draws of 20 from where the reference is from; 12 features, none alone, one constant."""
    random = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        base = random.normal(size=(count, 4))
        alike = base[:, :3] + 0.3 * random.normal(size=(count, 3))
        return np.column_stack([base, alike, base**3, np.ones(count)])

    alarms = 0
    for _ in range(100):
        reference, new = draw(100), draw(20)
        tests = corrected([compare_numbers(str(i), reference[:, i], new[:, i]) for i in range(reference.shape[1])])
        alarms += tests[0].p_value < 0.05
    # At most what comes by chance in 99 of a hundred times.
    assert alarms <= stats.binom.ppf(0.99, 100, 0.05)


def test_uncorrected_tests_would_alarm() -> None:
    """The test above can fail: the same draws without correction are over the limit."""
    random = np.random.default_rng(0)
    alarms = sum(
        min(compare_numbers("x", random.normal(size=100), random.normal(size=20)).p_alone for _ in range(12)) < 0.05
        for _ in range(50)
    )
    assert alarms > stats.binom.ppf(0.99, 50, 0.05)


def test_holm() -> None:
    p = [0.2, 0.001, 0.02, 0.03]
    tests = [compare_words("x", {"a": 5}, {"a": 5})] * 4
    found = corrected([type(t)(str(i), "", 0.0, p[i]) for i, t in enumerate(tests)])
    assert [c.name for c in found] == ["1", "2", "3", "0"]
    assert [c.p_value for c in found] == pytest.approx([0.004, 0.06, 0.06, 0.2])


def test_psi_of_the_same_is_nothing_and_of_others_much() -> None:
    values = np.random.default_rng(0).normal(size=500)
    assert psi(values, values)[0] == pytest.approx(0, abs=1e-12)
    index, chance = psi(values, values + 1)
    assert index > 0.5 > chance
    assert psi(values, values + 100)[0] > 4  # beyond the reference's largest value


def test_chance_alone_makes_psi_large_for_few_volumes() -> None:
    random = np.random.default_rng(1)
    reference = random.normal(size=300)
    few, many = (np.mean([psi(reference, random.normal(size=n))[0] for _ in range(50)]) for n in (20, 2000))
    assert few > 0.25 > 0.1 > many
    assert np.mean([v > c for v, c in (psi(reference, random.normal(size=20)) for _ in range(100))]) < 0.2


def test_a_constant_feature() -> None:
    same, other = compare_numbers("x", [3.2] * 50, [3.2] * 8), compare_numbers("x", [3.2] * 50, [4.0] * 8)
    assert same.p_alone == 1 and same.psi == pytest.approx(0, abs=1e-12)
    assert other.p_alone < 1e-6 and other.psi and other.psi > 1


def test_words() -> None:
    assert compare_words("x", {"a": 256}, {"a": 20}).p_alone == 1
    assert compare_words("x", {"a": 256}, {"b": 8}).p_alone == pytest.approx(1e-4)
    assert compare_words("x", {"a": 128, "b": 128}, {"a": 4, "b": 4}).p_alone > 0.5
    assert compare_words("x", {"a": 128, "b": 128}, {"a": 40}).p_alone < 0.001


def test_words_false_alarms() -> None:
    random = np.random.default_rng(2)
    p = []
    for seed in range(200):
        drawn = random.permutation([0] * 200 + [1] * 40 + [2] * 10)
        new, old = (np.bincount(part, minlength=3) for part in (drawn[:20], drawn[20:]))
        counts = [{str(i): int(count) for i, count in enumerate(part) if count} for part in (old, new)]
        p.append(compare_words("x", *counts, seed=seed).p_alone)
    assert np.mean(np.array(p) < 0.05) <= stats.binom.ppf(0.99, 200, 0.05) / 200


def test_latents() -> None:
    random = np.random.default_rng(3)
    reference = random.normal(size=(120, 24)) * np.geomspace(0.01, 10, 24)
    p = [compare_latents(reference[:100], reference[100:], seed).p_alone for seed in range(2)]
    assert p[0] == pytest.approx(p[1], abs=0.02)  # of the permutations, not of luck
    far = compare_latents(reference[:100], reference[100:] * 3)
    assert far.p_alone == pytest.approx(1e-4) and far.statistic > 0.1
    # One small dimension counts as much as a large one.
    moved = reference[100:].copy()
    moved[:, 0] += 0.05
    assert compare_latents(reference[:100], moved).p_alone < 0.001


def test_latents_false_alarms() -> None:
    random = np.random.default_rng(4)
    p = [compare_latents(random.normal(size=(30, 6)), random.normal(size=(8, 6)), seed).p_alone for seed in range(100)]
    assert np.mean(np.array(p) < 0.05) <= stats.binom.ppf(0.99, 100, 0.05) / 100
    assert 0.35 < np.mean(p) < 0.65


def test_mmd_is_that_of_its_definition() -> None:
    random = np.random.default_rng(5)
    x, y = random.normal(size=(7, 3)), random.normal(size=(5, 3)) + 1
    scaled = np.vstack([x, y]) / x.std(0)
    squares = ((scaled[:, None] - scaled[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / (2 * np.median(squares[:7, :7])))
    within = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (kernel[:7, :7], kernel[7:, 7:])]
    assert compare_latents(x, y).statistic == pytest.approx(sum(within) - 2 * kernel[:7, 7:].mean(), rel=1e-4)


def test_too_few() -> None:
    assert too_few(256, 8, 33, 0.01) == ""
    assert "7 volumes are too few" in too_few(256, 7, 33, 0.01)
    assert "profile was made of 6" in too_few(6, 8, 33, 0.01)
    assert too_few(8, 8, 33, 0.01) == ""
