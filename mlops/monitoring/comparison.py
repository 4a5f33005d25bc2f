"""Which of two versions is better: success, speed, and nearness to the training data, each with its interval.

One may look again after every job. Intervals that are valid only once (Welch's, Newcombe's) would be left by chance
sooner or later; these are widened so that with probability 1 - alpha none of the three questions is ever answered
wrongly, however often one looks: asymptotic confidence sequences (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2024,
theorem 2.2), and alpha is shared among the questions (Bonferroni).

What is compared is what was assigned by chance: jobs, or callers where a caller's jobs all go to one version.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from ldm3d.errors import DataError
from mlops.monitoring.finished import FinishedJob, finished_jobs
from mlops.monitoring.quality import Measured, Reference, measure, read_reference

LEAST_UNITS = 20
"""Of each version: the theory is one of many."""
TIGHTEST = 200
"""Units of both versions together at which the intervals are as tight as they can be."""
QUESTIONS = 3
FAR = 10_000_000

Version = tuple[str, str]
Volumes = list[list[Measured]]
"""Of each job, or caller."""


class Answer(NamedTuple):
    """To one question."""

    low: float
    """Of the interval for: first version less second one."""
    high: float
    missing: float
    """Units that are still needed before the difference that is seen now would be known; 0 where it is known."""


def widening(units: int, alpha: float) -> float:
    """Half of an interval, in standard errors, that holds at every number of units at once."""
    evidence = 2 * math.log(1 / alpha)
    rho2 = (evidence + math.log(evidence) + 1) / TIGHTEST  # the best choice for so many
    seen = units * rho2
    return math.sqrt((seen + 1) / seen * math.log((seen + 1) / alpha**2))


def difference_of_means(one: Sequence[float], other: Sequence[float], alpha: float) -> Answer:
    """Of means, with Welch's standard error and degrees of freedom."""
    if min(len(one), len(other)) < LEAST_UNITS:
        return _too_few(one, other)
    squares = [float(np.var(values, ddof=1)) / len(values) for values in (one, other)]
    error = math.sqrt(sum(squares))
    freedom = error**4 / max(1e-300, sum(s**2 / (len(v) - 1) for s, v in zip(squares, (one, other), strict=True)))
    wide = widening(len(one) + len(other), alpha)
    half = error * float(stats.t.isf(stats.norm.sf(wide), max(1.0, freedom)))
    middle = float(np.mean(one) - np.mean(other))
    return _answer(middle - half, middle + half, middle, len(one) + len(other), alpha)


def difference_of_shares(one: Sequence[float], other: Sequence[float], alpha: float) -> Answer:
    """Of shares of 0 to 1, by Newcombe's method 10 (1998), which knows that nothing is ever quite sure."""
    if min(len(one), len(other)) < LEAST_UNITS:
        return _too_few(one, other)
    wide = widening(len(one) + len(other), alpha)
    (p, low_p, high_p), (q, low_q, high_q) = (_wilson(float(np.mean(v)), len(v), wide) for v in (one, other))
    low = p - q - math.hypot(p - low_p, high_q - q)
    high = p - q + math.hypot(high_p - p, q - low_q)
    return _answer(low, high, p - q, len(one) + len(other), alpha)


def _wilson(share: float, n: int, wide: float) -> tuple[float, float, float]:
    z2 = wide**2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return share, middle - half, middle + half


def _too_few(one: Sequence[float], other: Sequence[float]) -> Answer:
    return Answer(-math.inf, math.inf, sum(max(0, LEAST_UNITS - len(values)) for values in (one, other)))


def _answer(low: float, high: float, seen: float, units: int, alpha: float) -> Answer:
    if low > 0 or high < 0:
        return Answer(low, high, 0)
    # Half of the interval shrinks as one standard error does, and the widening with it.
    one_unit = max(high - seen, seen - low) * math.sqrt(units) / widening(units, alpha)
    needed = units + 1
    while needed < FAR and one_unit * widening(needed, alpha) >= abs(seen) * math.sqrt(needed):
        needed = math.ceil(1.02 * needed)
    return Answer(low, high, needed - units if needed < FAR else math.inf)


class Samples:
    """What is known of one version.

    Args:
        jobs: its jobs, newest first.
    """

    def __init__(self, jobs: list[FinishedJob]):
        self.jobs = jobs
        self.digests = {job.record.digest for job in jobs}
        self.by_caller = any(job.record.assigned_by == "caller" for job in jobs)
        self.units: dict[str, list[FinishedJob]] = defaultdict(list)
        self.bad: set[str] = set()
        """Jobs that were done, and made something that is no brain."""

    def join(self, by_caller: bool) -> "Samples":
        """Gather jobs into what was assigned by chance."""
        for job in self.jobs:
            self.units[job.record.caller if by_caller else job.record.id].append(job)
        return self

    @property
    def volumes_of_a_unit(self) -> float:
        return sum(job.record.request.num for job in self.jobs) / max(1, len(self.units))

    def successes(self) -> list[float]:
        """Share of its jobs that made what was asked for, for each unit; after `volumes`."""
        return [float(np.mean([self._is_good(job) for job in jobs])) for jobs in self.units.values()]

    def _is_good(self, job: FinishedJob) -> bool:
        return job.outcome.state == "done" and job.folder.name not in self.bad

    def log_seconds(self) -> list[float]:
        """Logarithm of the seconds that a volume took, mean of each unit; without the time in the queue."""
        found = []
        for jobs in self.units.values():
            done = [job for job in jobs if job.outcome.state == "done" and job.outcome.started]
            if done:
                found.append(float(np.mean([math.log(_seconds(job)) for job in done])))
        return found

    def volumes(self) -> list[list[Measured]]:
        """Different volumes of each unit that has any which nobody else has."""
        seen, found = set[str](), []
        for jobs in self.units.values():
            new = []
            for job in jobs:
                for path in job.volumes():
                    if job.recipe(path) not in seen:
                        seen.add(job.recipe(path))
                        new += self._measured(job, path)
            if new:
                found.append(new)
        return found

    def _measured(self, job: FinishedJob, path: Path) -> list[Measured]:
        try:
            return [measure(path)]
        except DataError:
            if path.exists():  # else it was removed meanwhile
                self.bad.add(job.folder.name)
            return []


def _seconds(job: FinishedJob) -> float:
    assert job.outcome.started
    return max(1e-3, (job.outcome.finished - job.outcome.started).total_seconds()) / job.record.request.num


def energies(units: list[list[Measured]], reference: Reference) -> list[float]:
    """Independent estimates of a version's energy distance to the training data, one from each pair of units."""
    found = []
    for one, other in zip(units[::2], units[1::2], strict=False):
        to_training = (reference.to_training(one).mean() + reference.to_training(other).mean()) / 2
        apart = np.mean([reference.apart(a, b) for a in one for b in other])
        found.append(reference.energy(float(to_training), float(apart)))
    return found


def compare(data_dir: Path, one: Version, other: Version, alpha: float) -> str:
    """What can be said of two versions from the finished jobs in a data folder.

    Raises:
        DataError: there is no data folder, or no job of a version.
    """
    names = ["/".join(version) for version in (one, other)]
    jobs = [job for job in finished_jobs(data_dir) if job.outcome.state in ("done", "failed")]
    both = [Samples([job for job in jobs if job.version == version]) for version in (one, other)]
    for name, samples in zip(names, both, strict=True):
        if not samples.jobs:
            known = sorted({"/".join(job.version) for job in jobs})
            raise DataError(
                f"{data_dir}: has no finished job of {name}; it has some of {', '.join(known) or 'no version'}"
            )
        if len(samples.digests) > 1:
            raise DataError(f"{name}: its name has stood for several weights; give new weights a new version")
    by_caller = any(samples.by_caller for samples in both)
    a, b = (samples.join(by_caller) for samples in both)
    share = alpha / QUESTIONS
    made = a.volumes(), b.volumes()
    volumes_of_a_unit = (a.volumes_of_a_unit + b.volumes_of_a_unit) / 2
    say = _Speaker(names, volumes_of_a_unit)
    units = "callers" if by_caller else "jobs"
    lines = [f"{n}: {len(s.jobs)} jobs, {len(s.units)} {units} by chance" for n, s in zip(names, (a, b), strict=True)]
    lines += [
        say("success", difference_of_shares(a.successes(), b.successes(), share), 1, "jobs that made brains: {:+.1%}"),
        say(
            "speed",
            difference_of_means(a.log_seconds(), b.log_seconds(), share),
            -1,
            "seconds for a volume: {:+.1%}",
            math.expm1,
        ),
        _quality(data_dir, (a, b), made, share, say),
    ]
    return "\n".join(lines)


def _quality(
    data_dir: Path, both: tuple[Samples, Samples], made: tuple[Volumes, Volumes], alpha: float, say: "_Speaker"
) -> str:
    one, other = (read_reference(data_dir, next(iter(samples.digests))) for samples in both)
    if one is None or other is None:
        return "quality: not compared, as weights came without reference_profile.json"
    if one.trained_on != other.trained_on:
        return "quality: not compared, as the versions were trained on different data"
    found = difference_of_means(energies(made[0], one), energies(made[1], one), alpha)
    pairs = found._replace(missing=2 * found.missing)
    return say("quality", pairs, -1, "distance to the training data: {:+.3f}")


class _Speaker:
    """Says answers in words.

    Args:
        names: of the versions.
        volumes_of_a_unit: how many volumes a job (or a caller) comes to.
    """

    def __init__(self, names: list[str], volumes_of_a_unit: float):
        self.names, self.volumes_of_a_unit = names, volumes_of_a_unit

    def __call__(
        self,
        what: str,
        answer: Answer,
        better: int,
        figure: str,
        shown: Callable[[float], float] = lambda value: value,
    ) -> str:
        """One line.

        Args:
            what: the question.
            answer: to it.
            better: 1 if more is better, -1 if less.
            figure: how the difference is written.
            shown: makes it from the answer's numbers.
        """
        words, _, form = figure.partition("{")
        low, high = (("{" + form).format(shown(bound)) if math.isfinite(bound) else "?" for bound in answer[:2])
        interval = f"{words}{low} to {high} with {self.names[0]}"
        if not answer.missing:
            winner = self.names[0] if (answer.low > 0) == (better > 0) else self.names[1]
            return f"{what}: {winner} is better ({interval})"
        if math.isinf(answer.missing):
            return f"{what}: cannot tell; no difference is seen so far ({interval})"
        more = math.ceil(answer.missing * self.volumes_of_a_unit)
        return f"{what}: cannot tell yet; about {more:,} more volumes are needed ({interval})"
