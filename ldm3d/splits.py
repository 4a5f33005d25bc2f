"""Which cases are trained on and which are held out, so that this never changes from one run to the next."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Sides:
    """What a store remembers: `train` or `validation`, by name."""

    cases: dict[str, str] = field(default_factory=dict)
    subjects: dict[str, str] = field(default_factory=dict)


def split_cases(
    cases: Sequence[Case], val_fraction: float, seed: int, store: Path | None = None, remember: bool = True
) -> Split:
    """Hold out about `val_fraction` of the cases, at least one and never all.

    A case's side is what its `split` attribute says, else what `store` remembers of it; as many of the others are
    held out as the fraction still lacks, those first whose names hash lowest with the seed. So the split depends on
    names and seed alone, and with a store no case ever changes sides when others come or go. Cases with the same
    `subject` attribute are one in this: they take the subject's side, and its name is hashed.

    Args:
        store: JSON file that keeps the split. Only one process may call with it.
        remember: whether to write to the store what it does not have.

    Raises:
        DataError: fewer than two cases or subjects, one side empty, a subject on both, or a store that is damaged.
        OutputError: the store cannot be written.
    """
    if len(cases) < 2:
        raise DataError(f"{len(cases)} usable case; at least 2 are needed, one to train on and one to validate with")
    if len({_unit(case) for case in cases}) < 2:
        raise DataError(
            f"all {len(cases)} usable cases are of subject {_unit(cases[0])}; 2 subjects are needed at least"
        )
    old = _read(store, seed, val_fraction) if store else Sides()
    sides = _known_sides(cases, old)
    wanted = min(max(1, round(val_fraction * len(cases))), len(cases) - 1)
    _hold_out(cases, sides, wanted, seed)
    split = Split(*(_side(cases, sides, side, store) for side in ("train", "validation")))
    subjects = {subject: sides[case.name] for case in cases if (subject := case.attribute("subject"))}
    new = Sides(old.cases | sides, old.subjects | subjects)
    if store and remember and new != old:
        _remember(store, old, new, seed, val_fraction)
    return split


def _unit(case: Case) -> str:
    """What is held out or not: the subject where it is known, else the case."""
    return case.attribute("subject") or case.name


def _known_sides(cases: Sequence[Case], old: Sides) -> dict[str, str]:
    """Sides that are not free to choose, by name of the case. Raises `DataError` for a subject on both."""
    sides = {case.name: old.cases[case.name] for case in cases if case.name in old.cases}
    for case in cases:
        given = case.attribute("split")
        if given and sides.get(case.name, given) != given:
            log(f"warning: {case.name} moves from {sides[case.name]} to {given}, as the data's column split says")
        if given:
            sides[case.name] = given
    known: dict[str, dict[str, list[str]]] = {}
    for case in cases:
        if case.name in sides:
            known.setdefault(_unit(case), {}).setdefault(sides[case.name], []).append(case.name)
    both = [
        f"{unit} ({', '.join(names['train'])} in train, {', '.join(names['validation'])} in validation)"
        for unit, names in known.items()
        if len(names) > 1
    ]
    if both:
        raise DataError(
            f"cases of one subject are on both sides: {'; '.join(both)}; give all cases of a subject the same "
            "side in the data's column split, or delete split.json, with all that was trained by it, to split anew"
        )
    of_units = {**old.subjects, **{unit: side for unit, names in known.items() for side in names}}
    return {case.name: of_units[_unit(case)] for case in cases if _unit(case) in of_units}


def _hold_out(cases: Sequence[Case], sides: dict[str, str], wanted: int, seed: int) -> None:
    """Give a side to the cases that have none: `wanted` are held out then, or more where a subject has several."""
    free: dict[str, list[str]] = {}
    for case in cases:
        if case.name not in sides:
            free.setdefault(_unit(case), []).append(case.name)
    held_out = sum(side == "validation" for side in sides.values())
    for left, unit in zip(range(len(free), 0, -1), sorted(free, key=lambda unit: _hash(seed, unit)), strict=True):
        none_to_train_on = left == 1 and "train" not in sides.values()
        side = "validation" if held_out < wanted and not none_to_train_on else "train"
        sides |= dict.fromkeys(free[unit], side)
        held_out += len(free[unit]) * (side == "validation")


def _side(cases: Sequence[Case], sides: dict[str, str], side: str, store: Path | None) -> tuple[Case, ...]:
    chosen = tuple(sorted((case for case in cases if sides[case.name] == side), key=lambda case: case.name))
    if not chosen:
        source = f"the data's column split and {store}" if store else "the data's column split"
        raise DataError(f"no case is left for {side}, as {source} put all {len(cases)} on the other side")
    return chosen


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _read(store: Path, seed: int, val_fraction: float) -> Sides:
    if not store.is_file():
        return Sides()
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        made_with = (content["seed"], content["val_fraction"])
        sides = Sides(*(_by_name(part) for part in (content, content.get("subjects", {"train": [], "validation": []}))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store}: is no stored split; mend it, or delete it to split anew: {error!r}") from error
    if made_with != (seed, val_fraction):
        log(f"{store}: cases keep their side although seed or val_fraction changed; delete the file to split anew")
    return sides


def _by_name(names: dict[str, list[str]]) -> dict[str, str]:
    return {name: side for side in ("train", "validation") for name in names[side]}


def _by_side(sides: dict[str, str]) -> dict[str, list[str]]:
    return {side: sorted(name for name in sides if sides[name] == side) for side in ("train", "validation")}


def _remember(store: Path, old: Sides, new: Sides, seed: int, val_fraction: float) -> None:
    """Write the sides. Who is not in the data now stays in the file, in case he comes back."""
    subjects = {"subjects": _by_side(new.subjects)} if new.subjects else {}
    content = {"seed": seed, "val_fraction": val_fraction, **_by_side(new.cases), **subjects}
    write_text(store, json.dumps(content, indent=1) + "\n")
    added = len(new.cases) - len(old.cases)
    kept = f", {len(old.cases)} keep their side" if old.cases else ""
    log(f"{store}: split of {added} new cases stored{kept}")
