"""How often drift is reported where there is none, and how often where there is: on phantoms of another seed.

    python -m benchmarks.drift --measured results/drift.pickle
    python -m benchmarks.drift --measured results/drift.pickle --volumes 800 --changed 100 --processes 2

Measuring takes longest, so it is kept in a file, and an interrupted run goes on there. Folders are disjoint as far as
the phantoms suffice; the others are drawn from the same phantoms, each without repetition, and share some.
"""

import argparse
import multiprocessing
import pickle
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.drift_cases import CHANGES
from benchmarks.measure import arguments, table, write_result
from ldm3d.console import progress
from ldm3d.phantom import make_phantom
from ldm3d.reference_profile import ReferenceProfile, read_profile
from mlops.monitoring.data_drift import ALPHA, compare
from mlops.monitoring.drift_folder import Encode, Folder, NewVolume, encoder, gather, measure
from mlops.monitoring.drift_words import causes

MODEL, SEED = Path("checkpoints/demo"), 1000
SIZES, DRAWS, DRAWS_OF_CHANGED = (8, 20, 50), 200, 25
UNCHANGED = "as it is"
Measured = dict[str, NewVolume]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--measured", type=Path, required=True, help="where measured phantoms are kept")
    parser.add_argument("--volumes", type=int, default=800, help="fresh phantoms")
    parser.add_argument("--changed", type=int, default=100, help="how many of them are changed too")
    parser.add_argument("--processes", type=int, default=2, help="that share the work")
    args = parser.parse_args()
    if args.tiny:
        args.volumes, args.changed, args.processes = 8, 8, 1
    volumes = measured(args)
    profile = read_profile(MODEL)
    draws = 1 if args.tiny else DRAWS
    sizes = SIZES[:1] if args.tiny else SIZES
    judged = [
        (profile, [row[change] for row in volumes if change in row], change, size, count)
        for change in CHANGES
        for size in sizes
        for count in [draws if change == UNCHANGED else min(draws, DRAWS_OF_CHANGED)]
    ]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        rows = list(progress(pool.map(alarms, *zip(*judged, strict=True)), "judging folders", total=len(judged)))
    false_alarms = [row for row in rows if row["change"] == UNCHANGED]
    changed = [row for row in rows if row["change"] != UNCHANGED]
    print(table(false_alarms))
    print(table(changed))
    write_result(
        args.output,
        {
            "alpha": ALPHA,
            "phantoms": len(volumes),
            "changed_phantoms": sum(len(volume) > 1 for volume in volumes),
            "seed": SEED,
            "reference_volumes": len(next(iter(profile.features.values()))),
            "false_alarms": false_alarms,
            "changed": changed,
        },
    )


def measured(args: argparse.Namespace) -> list[Measured]:
    """Each phantom as it is and, the first ones, changed; what an interrupted run has measured is not done again."""
    rows: list[Measured] = pickle.loads(args.measured.read_bytes()) if args.measured.is_file() else []  # noqa: S301
    missing = range(len(rows), args.volumes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        found = pool.map(phantom, missing, [number < args.changed for number in missing])
        for row in progress(found, "measuring phantoms", total=len(missing), unit="phantom"):
            rows.append(row)
            if len(rows) % 50 == 0:
                args.measured.write_bytes(pickle.dumps(rows))
    args.measured.write_bytes(pickle.dumps(rows))
    return rows[: args.volumes]


def phantom(number: int, changed: bool) -> Measured:
    torch.set_num_threads(1)
    profile, encode = tools()
    made = make_phantom(SEED, number)
    row = {}
    for name, change in CHANGES.items():
        if changed or name == UNCHANGED:
            raw, affine = change(made, np.random.default_rng([SEED, number]))
            row[name] = measure(Path("phantom.nii"), "RAS", raw, affine, profile, encode)
    return row


@cache
def tools() -> tuple[ReferenceProfile, Encode]:
    profile = read_profile(MODEL)
    encode, why_not = encoder(profile, MODEL)
    assert encode, why_not
    return profile, encode


def alarms(profile: ReferenceProfile, volumes: list[NewVolume], change: str, size: int, draws: int) -> dict[str, Any]:
    """How many of so many folders raise an alarm, by which figures, and what is said to be the cause."""
    random = np.random.default_rng(0)
    count, blamed, said = 0, Counter[str](), Counter[str]()
    for draw in range(draws):
        disjoint = range(draw * size, (draw + 1) * size)
        numbers = disjoint if disjoint.stop <= len(volumes) else random.choice(len(volumes), size, replace=False)
        folder = as_folder([volumes[i] for i in numbers])
        drifted = [c.name for c in compare(profile, folder) if c.p_value < ALPHA]
        count += bool(drifted)
        blamed.update(drifted)
        said.update(cause.split(":")[0] for cause in causes(drifted, profile, folder)[:1])
    return {
        "change": change,
        "volumes": size,
        "folders": draws,
        "alarms": count,
        "by": dict(blamed.most_common(4)),
        "first cause": dict(said.most_common(3)),
    }


def as_folder(volumes: list[NewVolume]) -> Folder:
    return gather({f"{i:04d}": volume for i, volume in enumerate(volumes)}, {}, len(volumes), "")


if __name__ == "__main__":
    main()
