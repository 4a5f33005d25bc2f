"""Tests of whether two sets of volumes come from one source, with one bound on false alarms for all of them.

A volume counts once: what is compared are figures of whole volumes, not voxels, of which there are so many, all
depending on each other, that a test of them would always find a difference. So the tests hold for small folders too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from scipy import stats

LEAST_TO_COMPARE = 2
LEAST_TO_CLEAR = 8
"""New volumes from which on "no drift" is said. Fewer can show a drift; that they show none means nothing."""
PERMUTATIONS = 9999
_PSI_DRAWS = 500
_PSI_BINS = 10


@dataclass(frozen=True)
class Comparison:
    """One test.

    Attributes:
        name: of the feature or fact; "latents".
        test: what was computed.
        statistic: its value: KS distance, chi-square, MMD^2.
        p_alone: probability of as large a one by chance.
        p_value: the same corrected for the number of tests.
        psi: population stability index, of features.
        psi_by_chance: what 95 % of folders of that size stay below that come from the training data themselves.
    """

    name: str
    test: str
    statistic: float
    p_alone: float
    p_value: float = 1.0
    psi: float | None = None
    psi_by_chance: float | None = None


def compare_numbers(name: str, reference: Sequence[float], new: Sequence[float]) -> Comparison:
    """Kolmogorov-Smirnov test, which asks nothing of the distributions; exact, and with ties on the safe side."""
    result = stats.ks_2samp(reference, new)
    index, chance = psi(reference, new)
    p = float(result.pvalue)
    return Comparison(name, "Kolmogorov-Smirnov", float(result.statistic), p, psi=index, psi_by_chance=chance)


def psi(reference: Sequence[float], new: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Population stability index over the reference's deciles, below its smallest and above its largest value.

    To every share half a percent is added, as the logarithm of nothing is none. The usual limits 0.1 and 0.25 are for
    thousands of samples: with 20 volumes chance alone gives more, so what chance gives is said beside it.

    Returns:
        The index, and the 95th percentile of that of as many volumes drawn from the reference itself.
    """
    inner = np.quantile(reference, np.linspace(0, 1, _PSI_BINS + 1)[:-1])
    edges = np.unique([*inner, np.nextafter(max(reference), np.inf)])
    bins = len(edges) + 1
    old = np.bincount(np.searchsorted(edges, reference, "right"), minlength=bins)
    share = _shares(old)
    drawn = np.random.default_rng(seed).multinomial(len(new), old / old.sum(), _PSI_DRAWS)
    counts = np.vstack([np.bincount(np.searchsorted(edges, new, "right"), minlength=bins), drawn])
    values = ((_shares(counts) - share) * np.log(_shares(counts) / share)).sum(1)
    return float(values[0]), float(np.quantile(values[1:], 0.95))


def _shares(counts: np.ndarray) -> np.ndarray:
    shares: np.ndarray = counts / counts.sum(-1, keepdims=True) + 0.005
    shares /= shares.sum(-1, keepdims=True)
    return shares


def compare_words(name: str, reference: Mapping[str, int], new: Mapping[str, int], seed: int = 0) -> Comparison:
    """Chi-square of the table of values, its probability by exchanging volumes, as small counts need."""
    values = sorted({*reference, *new})
    old, now = (np.array([counts.get(value, 0) for value in values]) for counts in (reference, new))
    both = old + now
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(both, int(now.sum()), PERMUTATIONS)
    expected = both * now.sum() / both.sum()
    expected_old = both - expected
    # What the new have more the old have less.
    chi = ((np.vstack([now, drawn]) - expected) ** 2 * (1 / expected + 1 / expected_old)).sum(1)
    return Comparison(name, "chi-square by permutation", float(chi[0]), _share_at_least(chi))


def compare_latents(reference: np.ndarray, new: np.ndarray, seed: int = 0) -> Comparison:
    """Maximum mean discrepancy (Gretton et al. 2012, eq. 3), its probability by exchanging volumes.

    Each of the numbers is scaled by its spread in the reference; a Gaussian kernel as wide as the median distance.

    Args:
        reference: (N, D), one row a volume.
        new: (M, D), 2 rows or more.
        seed: of the permutations.
    """
    rows = np.vstack([reference, new]) / np.maximum(np.std(reference, axis=0), 1e-9)
    squares = np.square(rows).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0)
    width = max(float(np.median(distances[: len(reference), : len(reference)])), 1e-9)
    kernel = np.exp(-distances / (2 * width)).astype(np.float32)  # twice as fast, and exact to 1e-6 of what is asked
    n, m = len(reference), len(new)
    members = np.zeros((PERMUTATIONS + 1, n + m), dtype=np.float32)
    members[:, n:] = 1
    members[1:] = np.random.default_rng(seed).permuted(members[1:], axis=1)
    within_new = np.einsum("pi,pi->p", members @ kernel, members).astype(float)
    to_all = members @ kernel.sum(1, dtype=float)
    between = to_all - within_new
    within_old = kernel.sum(dtype=float) - 2 * between - within_new
    mmd = (within_new - m) / (m * (m - 1)) + (within_old - n) / (n * (n - 1)) - 2 * between / (n * m)
    return Comparison("latents", "maximum mean discrepancy by permutation", float(mmd[0]), _share_at_least(mmd))


def _share_at_least(values: np.ndarray) -> float:
    """How often chance gives at least the first value, which counts itself: never 0, so the test keeps its level."""
    return float(np.mean(values >= values[0] - 1e-6))


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction (1979): whatever the tests have to do with each other, the probability that any of them falls
    below alpha by chance is at most alpha. Smallest first.
    """
    ordered = sorted(comparisons, key=lambda c: c.p_alone)
    factors = np.arange(len(ordered), 0, -1)
    values = np.maximum.accumulate(factors * [c.p_alone for c in ordered])
    return [replace(c, p_value=min(1.0, float(p))) for c, p in zip(ordered, values, strict=True)]


def too_few(reference: int, new: int, tests: int, alpha: float) -> str:
    """Why so many volumes cannot show that nothing has drifted; empty where they can.

    The least that is asked for is that a feature in which no new volume is like any training volume would be found.
    """
    if new < LEAST_TO_CLEAR:
        return f"{new} volumes are too few to say that nothing has drifted; {LEAST_TO_CLEAR} are needed"
    if tests * 2 / comb(reference + new, new) >= alpha:
        return f"the profile was made of {reference} volumes, too few to say that nothing has drifted"
    return ""
