"""ldm3d.splits: a case keeps its side."""

import json
from pathlib import Path

import pytest

from ldm3d.cases import Case
from ldm3d.errors import DataError, OutputError
from ldm3d.splits import split_cases


def cases(*names: str, split: str | None = None) -> list[Case]:
    attributes = (("split", split),) if split else ()
    return [Case(name, Path(f"{name}.nii.gz"), attributes=attributes) for name in names]


def many(num: int, first: int = 0) -> list[Case]:
    return cases(*(f"case_{index:03d}" for index in range(first, first + num)))


def held_out(split) -> set[str]:  # type: ignore[no-untyped-def]
    return {case.name for case in split.validation}


def test_sizes_and_order() -> None:
    split = split_cases(many(50), 0.1, 0)
    assert (len(split.train), len(split.validation)) == (45, 5)
    assert sorted([*split.train, *split.validation], key=lambda case: case.name) == many(50)
    assert list(split.train) == sorted(split.train, key=lambda case: case.name)


def test_it_depends_on_names_and_seed_alone() -> None:
    split = split_cases(many(50), 0.2, 0)
    assert split_cases(many(50)[::-1], 0.2, 0) == split
    assert split_cases(many(50), 0.2, 1) != split


def test_who_only_looks_leaves_the_store_alone(tmp_path: Path) -> None:
    store = tmp_path / "split.json"
    looked = split_cases(many(10), 0.2, 0, store, remember=False)
    assert not store.exists()
    assert split_cases(many(10), 0.2, 0, store) == looked
    before = store.read_bytes()
    split_cases(many(20), 0.2, 0, store, remember=False)
    assert store.read_bytes() == before


def test_adding_a_case_does_not_reshuffle() -> None:
    before = held_out(split_cases(many(50), 0.2, 0))
    for added in range(50, 80):
        after = held_out(split_cases(many(50) + many(1, added), 0.2, 0))
        assert len(before - after) <= 1


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("num", [2, 3, 10])
def test_both_sides_have_a_case(fraction: float, num: int) -> None:
    split = split_cases(many(num), fraction, 0)
    assert split.train
    assert split.validation


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_cases(num: int) -> None:
    with pytest.raises(DataError, match="at least 2 are needed"):
        split_cases(many(num), 0.5, 0)


def test_the_column_split_is_honoured() -> None:
    given = cases("a", "b", split="validation") + cases("c", split="train")
    split = split_cases(given + many(7), 0.3, 0)
    assert {"a", "b"} < held_out(split)
    assert "c" not in held_out(split)
    assert len(split.validation) == 3
    with pytest.raises(DataError, match="no case is left for validation"):
        split_cases(cases("a", "b", split="train"), 0.5, 0)


def test_with_a_store_no_case_ever_changes_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "new" / "split.json"
    first = held_out(split_cases(many(20), 0.2, 0, store))
    grown = held_out(split_cases(many(60), 0.2, 0, store))
    assert first < grown
    assert len(grown) == 12
    assert "split of 40 new cases stored, 20 keep their side" in capsys.readouterr().err
    # A part of the data, another seed and fraction: still the same sides.
    assert held_out(split_cases(many(15), 0.5, 3, store)) == {name for name in grown if name < "case_015"}
    assert "cases keep their side although" in capsys.readouterr().err
    # Those that were away come back, also if others came meanwhile.
    split_cases(many(15) + many(1, 100), 0.2, 0, store)
    assert held_out(split_cases(many(60), 0.2, 0, store)) == grown


def test_a_store_is_written_only_where_it_adds_something(tmp_path: Path) -> None:
    store = tmp_path / "split.json"
    split = split_cases(many(5), 0.2, 0, store)
    content = json.loads(store.read_text())
    assert content["validation"] == [case.name for case in split.validation]
    assert content["train"] == [case.name for case in split.train]
    time = store.stat().st_mtime_ns
    split_cases(many(4), 0.2, 0, store)
    assert store.stat().st_mtime_ns == time


def test_the_column_wins_over_the_store_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "split.json"
    name = split_cases(many(5), 0.2, 0, store).train[0].name
    moved = cases(name, split="validation") + [case for case in many(5) if case.name != name]
    assert name in held_out(split_cases(moved, 0.2, 0, store))
    assert f"warning: {name} moves from train to validation" in capsys.readouterr().err


def test_a_store_that_leaves_one_side_empty(tmp_path: Path) -> None:
    store = tmp_path / "split.json"
    train = split_cases(many(6), 0.2, 0, store).train
    with pytest.raises(DataError, match=r"no case is left for validation.*split\.json"):
        split_cases(train, 0.2, 0, store)


def scans(subject: str, *names: str, split: str | None = None) -> list[Case]:
    attributes = (("split", split),) if split else ()
    return [Case(name, Path(f"{name}.nii.gz"), attributes=(*attributes, ("subject", subject))) for name in names]


def people(num: int) -> list[Case]:
    """Two scans each, whose names do not say whose they are."""
    return [scan for person in range(num) for scan in scans(f"p{person}", f"a{person}", f"z{num - person}")]


def subjects(split) -> tuple[set[str | None], ...]:  # type: ignore[no-untyped-def]
    return tuple({case.attribute("subject") for case in side} for side in (split.train, split.validation))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("fraction", "num"), [(0.01, 2), (0.3, 6), (0.99, 18)])
def test_a_subject_is_on_one_side(fraction: float, num: int, seed: int) -> None:
    split = split_cases(people(10), fraction, seed)
    train, validation = subjects(split)
    assert not train & validation
    assert len(split.validation) == num
    # Files of other names are no other people.
    renamed = [case for person in range(10) for case in scans(f"p{person}", f"x{person}", f"b{person}")]
    assert subjects(split_cases(renamed, fraction, seed)) == (train, validation)


def test_one_large_subject_leaves_something_to_train_on() -> None:
    for seed in range(5):
        split = split_cases(scans("many", *"abcdef") + scans("few", "g"), 0.9, seed)
        assert split.train and split.validation
    with pytest.raises(DataError, match="all 6 usable cases are of subject many; 2 subjects are needed at least"):
        split_cases(scans("many", *"abcdef"), 0.5, 0)


def test_later_scans_go_where_the_subject_is(tmp_path: Path) -> None:
    store = tmp_path / "split.json"
    train, validation = subjects(split_cases(people(10), 0.3, 0, store))
    before = store.read_bytes()
    split_cases(people(10), 0.3, 0, store)
    assert store.read_bytes() == before
    # Also where none of the subject's earlier scans is there.
    later = [case for person in range(10) for case in scans(f"p{person}", f"later{person}")]
    assert subjects(split_cases(later, 0.9, 1, store)) == (train, validation)
    assert subjects(split_cases(people(10) + later, 0.9, 2, store)) == (train, validation)


@pytest.mark.parametrize("side", ["train", "validation"])
def test_the_column_split_takes_a_subjects_other_scans_along(side: str) -> None:
    given = scans("p0", "a", split=side) + scans("p0", "b", "c") + scans("p1", "d") + scans("p2", "e")
    split = split_cases(given, 0.4, 0)
    assert {"a", "b", "c"} <= {case.name for case in getattr(split, side)}


def test_a_subject_that_was_put_on_both_sides_is_refused(tmp_path: Path) -> None:
    refused = (
        r"^cases of one subject are on both sides: p0 \(a, c in train, b in validation\); give all cases of a subject "
        "the same side in the data's column split, or delete split.json"
    )
    of_others = scans("p1", "d", "e")
    by_column = scans("p0", "a", "c", split="train") + scans("p0", "b", split="validation")
    with pytest.raises(DataError, match=refused):
        split_cases(by_column + of_others, 0.4, 0)
    store = tmp_path / "split.json"
    store.write_text('{"seed": 0, "val_fraction": 0.4, "train": ["a", "c", "d"], "validation": ["b"]}')
    with pytest.raises(DataError, match=refused):
        split_cases(scans("p0", "a", "b", "c") + of_others, 0.4, 0, store)
    mended = scans("p0", "a", "b", "c", split="train") + scans("p1", "d", "e", split="validation")
    assert held_out(split_cases(mended, 0.4, 0, store)) == {"d", "e"}


def test_who_names_no_subjects_has_the_split_and_the_file_of_before(tmp_path: Path) -> None:
    """As they were when there was no column `subject`."""
    store = tmp_path / "split.json"
    split_cases(many(10), 0.3, 0, store)
    content = json.loads(store.read_text())
    assert list(content) == ["seed", "val_fraction", "train", "validation"]
    assert content["validation"] == ["case_000", "case_006", "case_008"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"train": []}',
        '{"seed": 0, "val_fraction": 0.1, "train": 3, "validation": []}',
        '{"seed": 0, "val_fraction": 0.1, "train": [], "validation": [], "subjects": []}',
    ],
)
def test_a_damaged_store(tmp_path: Path, text: str) -> None:
    store = tmp_path / "split.json"
    store.write_text(text)
    with pytest.raises(DataError, match="is no stored split"):
        split_cases(many(5), 0.2, 0, store)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        split_cases(many(5), 0.2, 0, tmp_path / "file" / "split.json")
