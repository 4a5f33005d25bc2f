"""ldm3d.cases: the three layouts, and what is refused in each."""

import json
from pathlib import Path

import pytest
from nifti_files import make_task01, volume, write

from ldm3d.cases import Case, find_cases
from ldm3d.checks import examine
from ldm3d.errors import ConfigError, DataError
from ldm3d.sections import DataConfig


def found(root: Path, channel: int = 0, **data: object) -> list[Case]:
    return find_cases(root, DataConfig(**data), channel)


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("folder", ["", "Task01_BrainTumour"])
def test_task01_is_found_there_or_in_its_folder(tmp_path: Path, folder: str) -> None:
    make_task01(tmp_path / folder, 3)
    cases = found(tmp_path)
    assert names(cases) == ["BRATS_000", "BRATS_001", "BRATS_002"]
    assert cases[1].label == tmp_path / folder / "labelsTr" / "BRATS_001.nii.gz"


@pytest.mark.parametrize("channel", range(4))
def test_task01_gives_the_channel_asked_for(tmp_path: Path, channel: int) -> None:
    make_task01(tmp_path, 2)
    case = found(tmp_path, channel)[1]
    assert (examine(case)[0] == volume(10 + channel)).all()
    assert case.attribute("modality") == ("flair", "t1", "t1gd", "t2")[channel]


def test_task01_passes_over_what_macos_leaves(tmp_path: Path) -> None:
    make_task01(tmp_path, 2)
    change_json(
        tmp_path / "dataset.json", lambda content: content["training"].append({"image": "imagesTr/._BRATS_000.nii.gz"})
    )
    assert names(found(tmp_path)) == ["BRATS_000", "BRATS_001"]


@pytest.mark.parametrize("entry", ["../elsewhere.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz"])
@pytest.mark.parametrize("key", ["image", "label"])
def test_task01_refuses_files_outside_its_folder(tmp_path: Path, entry: str, key: str) -> None:
    make_task01(tmp_path, 2)
    change_json(tmp_path / "dataset.json", lambda content: content["training"][1].update({key: entry}))
    with pytest.raises(DataError, match=r"entry 1 of training: .* lies outside"):
        found(tmp_path)


def test_task01_without_a_label_file_has_no_label(tmp_path: Path) -> None:
    make_task01(tmp_path, 2)
    (tmp_path / "labelsTr" / "BRATS_000.nii.gz").unlink()
    assert [case.label is None for case in found(tmp_path)] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("3", "must hold a list"),
        ('{"training": {}}', "'training' must be a list"),
        ('{"training": [{"label": "x"}]}', "entry 0 of training: must name an image"),
        ('{"modality": {"0": "T2", "1": "ADC"}, "training": []}', "channel 0 is 'T2', not flair"),
    ],
)
def test_task01_says_what_is_wrong_with_its_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=message):
        found(tmp_path)


@pytest.mark.parametrize("above", ["", "HGG", "MICCAI/LGG"])
@pytest.mark.parametrize(
    ("ending", "channel"),
    [
        ("_flair.nii.gz", 0),
        ("-t2f.nii.gz", 0),
        ("_t1ce.nii", 2),
        ("-t1c.nii.gz", 2),
        ("-t1n.nii", 1),
        ("-t2w.nii.gz", 3),
    ],
)
def test_brats_knows_old_and_new_names(tmp_path: Path, above: str, ending: str, channel: int) -> None:
    folder = tmp_path / above / "Brats-7_1"
    for other in ("_t1.nii.gz" if channel != 1 else "_t2.nii.gz", "_seg.nii.gz", ending):
        write(folder / f"Brats-7_1{other}", volume())
    (case,) = found(tmp_path, channel)
    assert case == Case(
        "Brats-7_1",
        folder / f"Brats-7_1{ending}",
        label=folder / "Brats-7_1_seg.nii.gz",
        attributes=case.attributes,
    )


def test_brats_case_without_the_contrast_is_kept_for_the_check(tmp_path: Path) -> None:
    write(tmp_path / "A" / "A_t1.nii.gz", volume())
    write(tmp_path / "B" / "B_t2.nii.gz", volume())
    cases = found(tmp_path, 3)
    assert names(cases) == ["A", "B"]
    assert cases[0].label is None
    with pytest.raises(DataError, match=r"^A: has no t2: "):
        examine(cases[0])


def test_plain_folder(tmp_path: Path) -> None:
    for name in (
        "b.nii",
        "a.nii.gz",
        "sub/c_flair.nii.gz",
        "sub/c_t2.nii.gz",
        "a_seg.nii.gz",
        "._a.nii.gz",
        ".x/d.nii",
    ):
        write(tmp_path / name, volume())
    (tmp_path / "notes.txt").write_text("no image")
    cases = found(tmp_path)
    assert names(cases) == ["a", "b", "sub_c_flair"]
    assert [case.label for case in cases] == [tmp_path / "a_seg.nii.gz", None, None]


@pytest.mark.parametrize("cache", [None, "kept/here"])
def test_files_in_the_cache_are_no_data(tmp_path: Path, cache: str | None) -> None:
    write(tmp_path / "a.nii.gz", volume())
    write(tmp_path / (cache or "cache") / "volumes" / "b.nii.gz", volume())
    write(tmp_path / "kept" / "c.nii.gz", volume())
    data = {"cache_dir": tmp_path / cache} if cache else {}
    assert names(found(tmp_path, **data)) == ["a", "kept_c"]


def test_csv_list(tmp_path: Path) -> None:
    root, lists = tmp_path / "data", tmp_path / "lists"
    write(root / "one.nii.gz", volume())
    write(root / "one_seg.nii.gz", volume())
    write(lists / "two.nii.gz", volume())
    rows = [
        "image,modality,age,sex,label,split",
        "one.nii.gz,FLAIR,63.5,F,one_seg.nii.gz,validation",
        "two.nii.gz,t2f,,,,",
        "three.nii.gz,T1w,,,,",
    ]
    (lists / "list.csv").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    one, two = found(root, datalist=lists / "list.csv")
    assert (one.image, one.label) == (root / "one.nii.gz", root / "one_seg.nii.gz")
    assert dict(one.attributes) == {"modality": "flair", "age": "63.5", "sex": "F", "split": "validation"}
    assert (two.name, two.image, two.label) == ("two", lists / "two.nii.gz", None)
    assert dict(two.attributes) == {"modality": "flair"}


def test_json_lists(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.nii.gz", volume())
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"image": "a.nii.gz", "age": 40}, {"image": "b.nii.gz", "name": "bee"}]))
    cases = found(tmp_path, datalist=path)
    assert [(case.name, case.attribute("age"), case.attribute("split")) for case in cases] == [
        ("a", "40", None),
        ("bee", None, None),
    ]

    path.write_text(
        json.dumps({"training": [{"image": "b.nii.gz"}], "validation": [{"image": "a.nii.gz"}], "test": ["c.nii.gz"]})
    )
    assert [(case.name, case.attribute("split")) for case in found(tmp_path, datalist=path)] == [
        ("a", "validation"),
        ("b", "train"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.nii.gz", "needs a column 'image'"),
        ("image,split\na.nii.gz,test", "line 2: split 'test' must be one of train, validation"),
        ("image\n\na.nii.gz\na.nii.gz", "two cases are called 'a'"),
        ("image,age\n,3", "line 2: must name an image"),
        ("image,modality\na.nii.gz,pet", "lists no flair image"),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        found(tmp_path, datalist=tmp_path / "list.csv")


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: there is no such file"):
        found(tmp_path, datalist=Path("none.json"))


def test_a_list_with_a_layout_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.layout is 'brats'"):
        found(tmp_path, datalist=Path("none.json"), layout="brats")


@pytest.mark.parametrize("layout", ["auto", "task01", "brats", "list"])
def test_nothing_found_says_what_was_looked_for_and_how_to_get_data(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DataError, match=r"no cases found; looked for .*download_brats_data\.py -e ENV.*--phantom N"):
        found(tmp_path, layout=layout)
    with pytest.raises(DataError, match="there is no such folder"):
        found(tmp_path / "missing", layout=layout)


def test_the_layout_asked_for_wins_over_what_is_seen(tmp_path: Path) -> None:
    make_task01(tmp_path, 2)
    write(tmp_path / "A" / "A_flair.nii.gz", volume())
    assert names(found(tmp_path)) == ["BRATS_000", "BRATS_001"]
    assert names(found(tmp_path, layout="brats")) == ["A"]


def test_two_cases_of_one_name(tmp_path: Path) -> None:
    for grade in ("HGG", "LGG"):
        write(tmp_path / grade / "A" / "A_flair.nii.gz", volume())
    with pytest.raises(DataError, match="two cases are called 'A'"):
        found(tmp_path)


def change_json(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
