"""Is a candidate no worse than the champion? Decided by what evaluate.py measured of both.

python -m mlops.pipelines.gate --candidate metrics.json --champion champion.json

Exit status 0: promote the candidate. 1: keep the champion. 2: the two cannot be compared.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from ldm3d.errors import DataError
from ldm3d.files import write_text
from mlops.commands import Parser, run_command
from mlops.pipelines.metrics_file import Figure, Metrics, read_metrics, require_comparable

PROMOTE, KEEP = 0, 1
FALSE_ALARM = 0.05
"""How often equal models may be told apart, over all figures together."""
LIKE_REAL = (0.5, 2.0)
"""Of a mean over samples that is 1 for real volumes: beyond this they are fog, or noise."""
NOISIER = 2.0
"""A candidate may vary so many times as much as the champion: rubbish among its samples must not be its own excuse."""
COPY = 0.5
"""A sample nearer to a training volume than this share of the nearest held-out volume's distance is a copy of it."""
COPIES_BY_CHANCE = 0.01
"""So many samples among the nearest must be this unlikely, if samples were like held-out volumes, to be refused."""

Distance = Callable[[Figure], float]


def _from_one(figure: Figure) -> float:
    return abs(figure.value - 1)


def _from_real_variety(figure: Figure) -> float:
    return abs(figure.value - figure.reference("real"))


JUDGED: dict[str, Distance] = {
    "kid": lambda figure: figure.value,
    "mmd": lambda figure: figure.value,
    "sharpness": _from_one,
    "interior_contrast": _from_one,
    "interior_spread": _from_one,
    "ms_ssim_pairs": _from_real_variety,
}
"""The figures that decide, each as a distance from what real volumes have."""


@dataclass(frozen=True)
class Comparison:
    """One figure of both models, as distances from real volumes.

    Attributes:
        allowed: what chance gives the difference of two equal models, at most.
    """

    figure: str
    candidate: float
    champion: float
    allowed: float

    @property
    def worse(self) -> bool:
        return self.candidate - self.champion > self.allowed


@dataclass(frozen=True)
class Decision:
    """Whether to promote, and why not."""

    comparisons: tuple[Comparison, ...]
    reasons: tuple[str, ...]

    @property
    def promote(self) -> bool:
        return not self.reasons

    def content(self) -> dict[str, Any]:
        """As JSON."""
        rows = [asdict(row) | {"worse": row.worse} for row in self.comparisons]
        return {"decision": "promote" if self.promote else "keep", "reasons": self.reasons, "comparisons": rows}

    def table(self) -> str:
        lines = [f"{'distance from real':20}{'candidate':>12}{'champion':>12}{'worse by':>12}{'allowed':>12}"]
        for row in self.comparisons:
            numbers = (row.candidate, row.champion, row.candidate - row.champion, row.allowed)
            lines.append(f"{row.figure:20}{''.join(f'{n:12.4g}' for n in numbers)}{'   WORSE' * row.worse}")
        verdict = "promote: no worse than the champion" if self.comparisons else "promote: there is no champion yet"
        return "\n".join([*(lines if self.comparisons else []), *(self.reasons or [verdict])])


def decide(candidate: Metrics, champion: Metrics | None) -> Decision:
    """Judge a candidate by itself and, where there is a champion, against it.

    Raises:
        DataError: they were not measured alike.
    """
    reasons = [*_senseless(candidate), *_copies(candidate)]
    comparisons: tuple[Comparison, ...] = ()
    if champion is not None:
        require_comparable(candidate, champion)
        comparisons = tuple(_compare(name, candidate, champion) for name in JUDGED)
        reasons += [f"keep: {row.figure} is worse than the champion's" for row in comparisons if row.worse]
    return Decision(comparisons, tuple(reasons))


def _compare(name: str, candidate: Metrics, champion: Metrics) -> Comparison:
    """Both were measured against the same real volumes, so only the choice of samples is chance."""
    one, other, distance = candidate.figure(name), champion.figure(name), JUDGED[name]
    error = math.hypot(min(one.standard_error, NOISIER * other.standard_error), other.standard_error)
    return Comparison(name, distance(one), distance(other), _quantile(one) * error)


def _quantile(figure: Figure) -> float:
    """One-sided, with Bonferroni's correction for the number of figures."""
    return float(student.ppf(1 - FALSE_ALARM / len(JUDGED), figure.n["synthetic"] - 1))


def _senseless(metrics: Metrics) -> list[str]:
    """What no model may be, whatever the champion is."""
    reasons = []
    for name in ("kid", "mmd"):
        figure = metrics.figure(name)
        limit = figure.reference("mean_image") / 2
        if figure.value + _quantile(figure) * figure.standard_error >= limit:
            reasons.append(
                f"keep: {name} {figure.value:.3g} is not clearly below {limit:.3g}, half of the mean image's"
            )
    low, high = LIKE_REAL
    for name in ("sharpness", "interior_contrast", "interior_spread"):
        value = metrics.figure(name).value
        if not low <= value <= high:
            reasons.append(f"keep: {name} {value:.3g} is outside {low:g} to {high:g}, where 1 is like real volumes")
    variety = metrics.figure("ms_ssim_pairs")
    if variety.value >= variety.reference("real_max"):
        reasons.append(
            f"keep: samples are alike: MS-SSIM {variety.value:.3g} of two of them, real ones have at most "
            f"{variety.reference('real_max'):.3g}"
        )
    return reasons


def _copies(metrics: Metrics) -> list[str]:
    figure, looked_at = metrics.figure("copies", needs_error=False), len(metrics.nearest_training_volumes)
    if looked_at != figure.n["synthetic"]:
        raise DataError(
            f"{metrics.path}: tells the nearest training volume of {looked_at} of {figure.n['synthetic']} samples"
        )
    nearest_real, closer = figure.reference("real_min"), int(figure.reference("closer_than_real_min"))
    reasons = [
        f"keep: {sample.sample} is a copy of {sample.nearest}: relative distance {sample.relative_distance:.2f}, no "
        f"held-out volume is nearer to a training volume than {nearest_real:.2f}"
        for sample in metrics.nearest_training_volumes
        if sample.relative_distance < COPY * nearest_real
    ]
    chance = chance_of_closest(closer, figure.n["synthetic"], figure.n["held_out"])
    if chance < COPIES_BY_CHANCE:
        reasons.append(
            f"keep: {closer} of {figure.n['synthetic']} samples are nearer to training volumes than every one of "
            f"{figure.n['held_out']} held-out volumes is (by chance with probability {chance:.2g})"
        )
    return reasons


def chance_of_closest(closer: int, samples: int, held_out: int) -> float:
    """Probability that at least `closer` samples are nearer than all held-out volumes, if all were drawn alike.

    Then every order of the distances is as likely as any other, and the first `closer` of them must be samples'.
    """
    return math.prod((samples - k) / (samples + held_out - k) for k in range(closer))


def main() -> int:
    args = parse()
    candidate = read_metrics(args.candidate)
    decision = decide(candidate, read_metrics(args.champion) if args.champion else None)
    print(decision.table())
    if args.output:
        content = {"candidate": str(args.candidate), "champion": args.champion and str(args.champion)}
        write_text(args.output, json.dumps(content | decision.content(), indent=2) + "\n")
    return PROMOTE if decision.promote else KEEP


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.pipelines.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--candidate", type=Path, required=True, help="metrics.json of the candidate")
    parser.add_argument("--champion", type=Path, help="metrics.json of the champion; leave out if there is none yet")
    parser.add_argument("--output", type=Path, help="write the decision, with its reasons, as JSON")
    args = parser.parse_args()
    if args.champion and not args.champion.is_file():
        raise DataError(f"{args.champion}: there is no such file; leave --champion out if there is no champion yet")
    return args


if __name__ == "__main__":
    run_command(main)
