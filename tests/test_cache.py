"""ldm3d.cache: entries are made once, are whole or absent, and are what they say."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_files import make_cases, volume, write

from ldm3d import cache as cache_room
from ldm3d import checks, files
from ldm3d.cache import HEADER_BYTES, VolumeCache
from ldm3d.cases import Case
from ldm3d.errors import DataError, OutputError
from ldm3d.nifti import orientation_of
from ldm3d.volumes import load_prepared

ROOT = Path(__file__).parents[1]
SPACING = (1.5, 1.5, 1.5)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return make_cases(tmp_path / "data", 3)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that were read from NIfTI."""
    names: list[str] = []

    def load(case: Case, spacing: tuple[float, ...]) -> np.ndarray:
        names.append(case.name)
        return load_prepared(case, spacing)

    monkeypatch.setattr(cache_room, "load_prepared", load)
    return names


def built(folder: Path, cases: list[Case], spacing: tuple[float, ...] = SPACING) -> VolumeCache:
    cache = VolumeCache(folder / "cache", spacing)
    assert cache.build(cases) == cases
    return cache


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "volumes").glob("[!.]*.volume"))


def test_what_is_stored_is_what_was_prepared(tmp_path: Path, cases: list[Case]) -> None:
    cache = built(tmp_path, cases)
    for case in cases:
        expected = load_prepared(case, SPACING)
        assert np.abs(cache.load(case) - expected).max() <= 0.5 / 65535 + 1e-7
        assert cache.load(case).dtype == np.float32
        assert isinstance(cache.get(case), np.memmap)
        assert not cache.get(case).flags.writeable
        assert (cache.load(case).min(), cache.load(case).max()) == (0, 1)


def test_nothing_is_decoded_or_read_whole_twice(
    tmp_path: Path, cases: list[Case], decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(tmp_path, cases)
    assert sorted(decoded) == ["c00", "c01", "c02"]
    monkeypatch.setattr(cache_room, "sha256", None)
    second = built(tmp_path, cases)
    assert len(decoded) == 3
    for case in cases:
        assert (second.get(case) == first.get(case)).all()
    assert len(decoded) == 3


def test_a_touched_or_moved_file_is_still_known_by_its_content(
    tmp_path: Path, cases: list[Case], decoded: list[str]
) -> None:
    built(tmp_path, cases)
    os.utime(cases[0].image, (1, 1))
    moved = cases[1].image.rename(tmp_path / "data" / "moved.nii.gz")
    built(tmp_path, [cases[0], Case("moved", moved), cases[2]])
    assert len(decoded) == 3


def test_a_changed_file_is_noticed(tmp_path: Path, cases: list[Case], decoded: list[str]) -> None:
    before = built(tmp_path, cases).load(cases[1])
    write(cases[1].image, volume(77))
    cache = built(tmp_path, cases)
    assert decoded[3:] == ["c01"]
    assert not np.array_equal(cache.load(cases[1]), before)


def test_a_changed_label_is_checked_again(tmp_path: Path, cases: list[Case]) -> None:
    label = write(tmp_path / "label.nii.gz", volume() * 0)
    labelled = [Case("c00", cases[0].image, label=label), *cases[1:]]
    built(tmp_path, labelled)
    write(label, volume() * 0 + 9)
    with pytest.raises(DataError, match="whole numbers from 0 to 4"):
        VolumeCache(tmp_path / "cache", SPACING).build(labelled)


def test_every_setting_has_its_own_entry(
    tmp_path: Path, cases: list[Case], decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, cases)
    other = built(tmp_path, cases, (2, 2, 2))
    assert len(decoded) == 6
    assert other.load(cases[0]).shape == (5, 6, 4)
    four = write(tmp_path / "four.nii.gz", np.stack([volume(c) for c in range(4)], axis=-1))
    keys = {other.key(Case(f"f{channel}", four, channel=channel)) for channel in range(4)}
    assert len(keys) == 4
    monkeypatch.setattr(cache_room, "PREPARATION", 2)
    built(tmp_path, cases)
    monkeypatch.setattr(cache_room, "PERCENTILES", (1.0, 99.0))
    built(tmp_path, cases)
    assert len(decoded) == 16
    assert len(entries(tmp_path)) == 16


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def break_header(path: Path) -> None:
    path.write_bytes(b"\xff" * HEADER_BYTES + path.read_bytes()[HEADER_BYTES:])


def other_key(path: Path) -> None:
    content = path.read_bytes()
    header = json.loads(content[:HEADER_BYTES]) | {"key": "another"}
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES) + content[HEADER_BYTES:])


def break_voxel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 101] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [shorten, break_header, other_key, Path.unlink])
def test_a_damaged_entry_is_made_anew_at_the_start(tmp_path, cases, decoded, damage, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = {case.name: built(tmp_path, cases).load(case) for case in cases}
    damage(entries(tmp_path)[0])
    cache = built(tmp_path, cases)
    assert len(decoded) == 4
    assert ("made anew" in capsys.readouterr().err) == (damage is not Path.unlink)
    assert all((cache.load(case) == wanted[case.name]).all() for case in cases)


@pytest.mark.parametrize("damage", [shorten, break_header, other_key, break_voxel, Path.unlink])
def test_a_damaged_entry_is_made_anew_when_read(tmp_path, cases, decoded, damage, capsys) -> None:  # type: ignore[no-untyped-def]
    wanted = built(tmp_path, cases).load(cases[2])
    cache = built(tmp_path, cases)
    damage(tmp_path / "cache" / "volumes" / f"{cache.key(cases[2])}.volume")
    assert (cache.load(cases[2]) == wanted).all()
    assert decoded[3:] == ["c02"]
    assert "made anew from c02" in capsys.readouterr().err


def test_one_line_says_whose_orientation_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = make_cases(tmp_path / "data", 4)
    for case in cases[1:3]:
        nib.save(nib.Nifti1Image(volume(int(case.name[1:])), None), case.image)
        assert orientation_of(case.image) == "LAS"  # as the line says
    for _ in range(2):  # also where all of them are in the cache
        built(tmp_path, cases)
        said = capsys.readouterr().err
        assert said.count("warning: ") == 1
        assert "warning: 2 of 4 cases do not say how they lie (qform_code and sform_code are 0): c01, " in said
    built(tmp_path, cases[:1])
    assert "warning" not in capsys.readouterr().err


def test_a_damaged_index_only_costs_time(tmp_path: Path, cases: list[Case], decoded: list[str]) -> None:
    built(tmp_path, cases)
    for text in ("{", "[]", '{"a": 3}'):
        (tmp_path / "cache" / "files.json").write_text(text)
        built(tmp_path, cases)
    assert len(decoded) == 3


def test_bad_cases_are_named_and_the_good_ones_kept(tmp_path: Path, cases: list[Case], decoded: list[str]) -> None:
    cases[1].image.write_bytes(cases[1].image.read_bytes()[:-20])
    missing = Case("d", tmp_path / "none.nii", attributes=(("modality", "t2"),))
    cache = VolumeCache(tmp_path / "cache", SPACING)
    with pytest.raises(DataError, match=r"2 of 4 cases .*c01\.nii\.gz: is damaged.*; d: has no t2: "):
        cache.build([*cases, missing])
    decoded.clear()
    assert cache.build([*cases, missing], "skip") == [cases[0], cases[2]]
    assert decoded == ["c01"]  # what was found good is remembered


def test_a_folder_that_cannot_be_written(tmp_path: Path, cases: list[Case]) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    with pytest.raises(OutputError, match=r"cache.* cannot be written.*data\.cache_dir"):
        VolumeCache(tmp_path / "cache", SPACING).build(cases)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(OutputError, match="No space left on device"):
        VolumeCache(tmp_path / "cache", SPACING).build(cases)
    assert list((tmp_path / "cache" / "volumes").iterdir()) == []


def test_digests_are_stored_while_volumes_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was prepared before a kill is then found without its sources being read again."""
    cases = make_cases(tmp_path / "data", 5)
    monkeypatch.setattr(checks, "_ROUND", 2)
    monkeypatch.setattr(cache_room, "SECONDS_BETWEEN_SAVES", 0)

    def full(case: Case, spacing: tuple[float, ...]) -> np.ndarray:
        if case.name == "c04":
            raise OutputError("disk full")
        return load_prepared(case, spacing)

    with monkeypatch.context() as patch:
        patch.setattr(cache_room, "load_prepared", full)
        with pytest.raises(OutputError):
            VolumeCache(tmp_path / "cache", SPACING).build(cases)
    read: list[str] = []
    monkeypatch.setattr(cache_room, "sha256", lambda path: read.append(path.name) or files.sha256(path))
    built(tmp_path, cases)
    assert read == [cases[4].image.name]


def test_digests_are_not_written_where_none_is_new(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path, cases)
    monkeypatch.setattr(cache_room, "write_text", None)
    built(tmp_path, cases)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from ldm3d import files
from ldm3d.cache import VolumeCache
from ldm3d.cases import Case
files._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
VolumeCache(Path(sys.argv[1]), (1.5, 1.5, 1.5)).build([Case("c00", Path(sys.argv[2]))])
"""


def test_a_kill_while_writing_leaves_no_entry(tmp_path: Path, cases: list[Case], decoded: list[str]) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path / "cache", cases[0].image]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache" / "volumes").iterdir())) == 1  # the temporary file
    assert entries(tmp_path) == []
    built(tmp_path, cases)
    assert len(decoded) == 3
