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


@pytest.mark.parametrize(
    "text", ["", "[]", '{"train": []}', '{"seed": 0, "val_fraction": 0.1, "train": 3, "validation": []}']
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
