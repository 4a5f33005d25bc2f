"""Which cases are trained on and which are held out, so that this never changes from one run to the next."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm3d.cases import Case
from ldm3d.console import log
from ldm3d.errors import DataError
from ldm3d.files import write_text


@dataclass(frozen=True)
class Split:
    """Cases to train on and cases held out, each sorted by name."""

    train: tuple[Case, ...]
    validation: tuple[Case, ...]


def split_cases(
    cases: Sequence[Case], val_fraction: float, seed: int, store: Path | None = None, remember: bool = True
) -> Split:
    """Hold out about `val_fraction` of the cases, at least one and never all.

    A case's side is what its `split` attribute says, else what `store` remembers of it; as many of the others are
    held out as the fraction still lacks, those first whose names hash lowest with the seed. So the split depends on
    names and seed alone, and with a store no case ever changes sides when others come or go.

    Args:
        store: JSON file that keeps the split. Only one process may call with it.
        remember: whether to write to the store what it does not have.

    Raises:
        DataError: fewer than two cases, one side empty, or a store that is damaged.
        OutputError: the store cannot be written.
    """
    if len(cases) < 2:
        raise DataError(f"{len(cases)} usable case; at least 2 are needed, one to train on and one to validate with")
    remembered = _read(store, seed, val_fraction) if store else {}
    sides = _known_sides(cases, remembered)
    free = sorted((case.name for case in cases if case.name not in sides), key=lambda name: _hash(seed, name))
    wanted = min(max(1, round(val_fraction * len(cases))), len(cases) - 1)
    held_out = max(0, wanted - sum(side == "validation" for side in sides.values()))
    sides |= {name: "validation" if number < held_out else "train" for number, name in enumerate(free)}
    split = Split(*(_side(cases, sides, side, store) for side in ("train", "validation")))
    if store and remember and not sides.items() <= remembered.items():
        _remember(store, remembered, sides, seed, val_fraction)
    return split


def _known_sides(cases: Sequence[Case], remembered: dict[str, str]) -> dict[str, str]:
    """Sides that are not free to choose, by name of the case."""
    sides = {case.name: remembered[case.name] for case in cases if case.name in remembered}
    for case in cases:
        given = case.attribute("split")
        if given and sides.get(case.name, given) != given:
            log(f"warning: {case.name} moves from {sides[case.name]} to {given}, as the data's column split says")
        if given:
            sides[case.name] = given
    return sides


def _side(cases: Sequence[Case], sides: dict[str, str], side: str, store: Path | None) -> tuple[Case, ...]:
    chosen = tuple(sorted((case for case in cases if sides[case.name] == side), key=lambda case: case.name))
    if not chosen:
        source = f"the data's column split and {store}" if store else "the data's column split"
        raise DataError(f"no case is left for {side}, as {source} put all {len(cases)} on the other side")
    return chosen


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _read(store: Path, seed: int, val_fraction: float) -> dict[str, str]:
    """Remembered side by name of the case."""
    if not store.is_file():
        return {}
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        made_with = (content["seed"], content["val_fraction"])
        sides = {name: side for side in ("train", "validation") for name in content[side]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store}: is no stored split; mend it, or delete it to split anew: {error!r}") from error
    if made_with != (seed, val_fraction):
        log(f"{store}: cases keep their side although seed or val_fraction changed; delete the file to split anew")
    return sides


def _remember(store: Path, old: dict[str, str], new: dict[str, str], seed: int, val_fraction: float) -> None:
    """Write the sides. Cases that are not in the data now stay in the file, in case they come back."""
    sides = {**old, **new}
    names = {side: sorted(name for name in sides if sides[name] == side) for side in ("train", "validation")}
    content = {"seed": seed, "val_fraction": val_fraction, **names}
    write_text(store, json.dumps(content, indent=1) + "\n")
    added = len(sides) - len(old)
    kept = f", {len(old)} keep their side" if old else ""
    log(f"{store}: split of {added} new cases stored{kept}")
