"""Do new volumes look like those that the model was trained on?

    python -m mlops.monitoring.data_drift --reference checkpoints/demo --data FOLDER --output results/drift

Compares a folder of volumes with the reference profile that training left beside the weights. Exit status: 0 no drift,
1 drift, 2 an error, also where there are too few volumes to say that nothing has drifted. In the output folder:
`drift.json`, `drift.html`, and `drift.prom` for node-exporter's textfile collector; `--push URL` sends the same metrics
to a pushgateway (job `ldm3d_drift`).

Metrics, each a gauge, written by every run that came to a judgement:

    ldm3d_drift_detected                     1 where anything drifted, else 0
    ldm3d_drift_feature_detected{feature=}   the same for each feature, fact ("orientation", "scanner") and "latents"
    ldm3d_drift_feature_p_value{feature=}    corrected for the number of tests (Holm)
    ldm3d_drift_feature_psi{feature=}        population stability index, of features only
    ldm3d_drift_latent_mmd                   squared maximum mean discrepancy of latents, where they could be compared
    ldm3d_drift_alpha                        probability of a false alarm that a run accepts
    ldm3d_drift_volumes{state=}              "judged", "unreadable"
    ldm3d_drift_last_run_timestamp_seconds   when
"""

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ldm3d import __version__
from ldm3d.cases import CHANNELS
from ldm3d.errors import DataError, UserError, shortage
from ldm3d.files import require_writable, write_text
from ldm3d.reference_profile import FACTS, FEATURES, ReferenceProfile, read_profile
from mlops import run_metrics
from mlops.commands import EXIT_USER_ERROR, Parser, run_command
from mlops.monitoring.drift_folder import Folder, measure_folder
from mlops.monitoring.drift_metrics import JOB, metrics_of
from mlops.monitoring.drift_report import report
from mlops.monitoring.drift_statistics import (
    LEAST_TO_CLEAR,
    LEAST_TO_COMPARE,
    PERMUTATIONS,
    Comparison,
    compare_latents,
    compare_numbers,
    compare_words,
    corrected,
    too_few,
)
from mlops.monitoring.drift_words import causes

ALPHA = 0.01
LEAST_ALPHA = (len(FEATURES) + len(FACTS) + 1) / (PERMUTATIONS + 1)
"""Below it the tests by exchanging volumes could not find anything: their least probability, corrected, is this."""
NO_DRIFT, DRIFT = 0, 1
TOO_FEW = "too few"


def main() -> int:
    """1 means drift, so nothing else may end with it: a fault of ours ends with 2, as a user's does."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except UserError:
        raise
    except BrokenPipeError:  # `... | head`: what is left in the buffer must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if shortage(error):
            raise
        traceback.print_exc()
    return EXIT_USER_ERROR


def run() -> int:
    args = parse()
    require_writable(args.output)
    profile = read_profile(args.reference)
    model_dir = args.reference if args.reference.is_dir() else args.reference.parent
    folder = measure_folder(args.data, profile, model_dir)
    if len(folder.judged) < LEAST_TO_COMPARE:
        raise DataError(f"{args.data}: one volume cannot be compared with a set; {LEAST_TO_CLEAR} are needed")
    comparisons = compare(profile, folder)
    result = judge(args, profile, folder, comparisons)
    write_text(args.output / "drift.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_text(args.output / "drift.html", report(result, profile, folder))
    tell(result, args.output)
    if result["status"] == TOO_FEW:
        raise DataError(f"{args.data}: {result['too_few']}")
    metrics = metrics_of(result)
    run_metrics.write(args.output / "drift.prom", metrics)
    if args.push:
        run_metrics.push(args.push, JOB, metrics)
    return DRIFT if result["status"] == "drift" else NO_DRIFT


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m mlops.monitoring.data_drift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", type=Path, required=True, help="the profile, or the model_dir that holds it")
    parser.add_argument("--data", type=Path, required=True, help="folder of new volumes, in any layout of training")
    parser.add_argument("--output", type=Path, required=True, help="folder for drift.json, drift.html, drift.prom")
    parser.add_argument("--push", metavar="URL", help="pushgateway to send the metrics to")
    parser.add_argument("--alpha", type=probability, default=ALPHA, help=f"accepted false alarms of a run ({ALPHA})")
    return parser.parse_args()


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not LEAST_ALPHA < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between {LEAST_ALPHA} and 1")
    return value


def compare(profile: ReferenceProfile, folder: Folder) -> list[Comparison]:
    """All tests, the smallest probability first."""
    tests = [compare_numbers(name, old, folder.features[name]) for name, old in profile.features.items()]
    tests += [compare_words(name, old, folder.facts[name]) for name, old in profile.facts.items()]
    if folder.latents is not None and profile.latents:
        tests.append(compare_latents(np.array(profile.latents.rows), folder.latents))
    return corrected(tests)


def judge(
    args: argparse.Namespace, profile: ReferenceProfile, folder: Folder, comparisons: list[Comparison]
) -> dict[str, Any]:
    """The content of drift.json."""
    drifted = [comparison.name for comparison in comparisons if comparison.p_value < args.alpha]
    reference = len(next(iter(profile.features.values())))
    few = too_few(reference, len(folder.judged), len(comparisons), args.alpha)
    return {
        "status": "drift" if drifted else TOO_FEW if few else "no drift",
        "too_few": few,
        "probable_causes": causes(drifted, profile, folder),
        "drifted": drifted,
        "alpha": args.alpha,
        "comparisons": [
            {**asdict(comparison), **medians(comparison.name, profile, folder)} for comparison in comparisons
        ],
        "volumes": {"found": folder.found, "judged": len(folder.judged), "unreadable": folder.unreadable},
        "facts": {name: {"training": profile.facts[name], "new": new} for name, new in folder.facts.items()},
        "not_compared": {"latents": folder.no_latents} if folder.no_latents else {},
        "made": {
            "code_version": __version__,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "reference": str(args.reference),
            "trained_on": profile.trained_on,
            "reference_volumes": reference,
            "data": str(args.data),
            "contrast": CHANNELS[profile.channel],
        },
    }


def medians(name: str, profile: ReferenceProfile, folder: Folder) -> dict[str, float]:
    if name not in profile.features:
        return {}
    return {
        "median_training": float(np.median(profile.features[name])),
        "median_new": float(np.median(folder.features[name])),
    }


def tell(result: dict[str, Any], output: Path) -> None:
    """What stdout says."""
    volumes, against = result["volumes"], result["made"]["reference_volumes"]
    print(f"{result['status']}: {volumes['judged']} volumes against {against} of the training")
    for name, reason in volumes["unreadable"].items():
        print(f"unreadable: {name}: {reason}")
    for cause in result["probable_causes"]:
        print(f"probably: {cause}")
    if result["drifted"]:
        print(f"drifted: {', '.join(result['drifted'])}")
    for what, why in result["not_compared"].items():
        print(f"not compared: {what}: {why}")
    print(output / "drift.html")


if __name__ == "__main__":
    run_command(main)
