"""ldm3d.checks: every kind of damage is noticed, and all damaged cases are named."""

import gzip
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_files import SHAPE, make_cases, volume, write

from ldm3d import checks
from ldm3d.cases import Case
from ldm3d.checks import examine, share_out, usable
from ldm3d.errors import DataError, OutputError


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def without(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(np.float32)
    changed[3, 4, 5] = value
    return changed


def header_with(path: Path, **fields: object) -> None:
    """Change fields of an uncompressed file's header behind nibabel's back."""
    raw = bytearray(path.read_bytes())
    header = np.ndarray((), nib.Nifti1Header.template_dtype, raw)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(raw)


def four(last: int = 4) -> np.ndarray:
    return np.stack([volume(seed) for seed in range(last)], axis=-1)


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "has no image: .* is not there"),
    "no NIfTI": (lambda p: p.write_text("<html>"), "(damaged|cannot be read)"),
    "no bytes": (lambda p: p.write_bytes(b""), "(damaged|cannot be read)"),
    "cut short": (lambda p: (write(p, volume()), cut(p, 0.7)), "cut short"),
    "cut by its last byte": (lambda p: (write(p, volume()), cut(p, 0.9999)), "cut short"),
    "two-dimensional": (lambda p: write(p, volume()[:, :, 3]), r"has shape \(10, 12\)"),
    "four channels": (lambda p: write(p, four()), "has 4 channels"),
    "NaN": (lambda p: write(p, without(volume(), np.nan)), "1 of 960 voxels are NaN or infinite"),
    "infinite": (lambda p: write(p, without(volume(), np.inf)), "1 of 960 voxels are NaN or infinite"),
    "zero": (lambda p: write(p, volume() * 0), r"is empty: 100\.00% of its voxels are 0"),
    "constant": (lambda p: write(p, volume() * 0 + 7), "is empty: .* are 7"),
    "one voxel": (lambda p: write(p, without(volume() * 0, 5)), "is empty"),
    "tiny voxels": (lambda p: write(p, volume(), (0.01, 1, 1)), r"0\.01 x 1 x 1 mm is not possible"),
    "huge voxels": (lambda p: write(p, volume(), (1, 1, 200)), "1 x 1 x 200 mm is not possible"),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", IMAGES)
def test_bad_images(tmp_path: Path, kind: str, suffix: str) -> None:
    make, message = IMAGES[kind]
    path = tmp_path / f"bad{suffix}"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        examine(Case("bad", path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_bad_affine(tmp_path: Path, value: float) -> None:
    path = write(tmp_path / "bad.nii", volume())
    header_with(path, sform_code=1, srow_x=[value, 0, 0, 0])
    with pytest.raises(DataError, match=r"bad\.nii: "):
        examine(Case("bad", path))


def test_cut_in_a_channel_that_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", four())
    assert (examine(Case("a", path, channel=0))[0] == volume(0)).all()
    cut(path, 0.95)
    with pytest.raises(DataError, match="cut short"):
        examine(Case("a", path, channel=0))


def test_cut_before_it_was_compressed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", four())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    with pytest.raises(DataError, match=r"is cut short: \d+ bytes of \d+"):
        examine(Case("a", path, channel=0))


@pytest.mark.parametrize("array", [four(3), volume()])
def test_a_file_of_other_channels_than_brats(tmp_path: Path, array: np.ndarray) -> None:
    path = write(tmp_path / "a.nii.gz", array)
    with pytest.raises(DataError, match="a fourth axis of 4 channels is needed"):
        examine(Case("a", path, channel=0))


def test_damage_within_the_compressed_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", volume())
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the checksum at the end, which a reader that stops at the last voxel never meets
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged or cut short: CRC"):
        examine(Case("a", path))


LABELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "has no label"),
    "fraction": (lambda p: write(p, volume() * np.float32(0.5)), "whole numbers from 0 to 4"),
    "NaN": (lambda p: write(p, without(volume() * 0, np.nan)), "whole numbers from 0 to 4"),
    "negative": (lambda p: write(p, without(volume() * 0, -1)), "these are -1 to 0"),
    "five": (lambda p: write(p, without(volume() * 0, 5)), "these are 0 to 5"),
    "other shape": (lambda p: write(p, volume()[:-1] * 0), r"has shape \(9, 12, 8\), its image \(10, 12, 8\)"),
    "other place": (lambda p: write(p, volume() * 0, affine=np.eye(4) + np.eye(4, k=3)), "lies 1 mm beside its image"),
    "other spacing": (lambda p: write(p, volume() * 0, (1, 1, 1.1)), r"lies 0\.7 mm beside"),
    "cut short": (lambda p: (write(p, volume() % 5), cut(p, 0.8)), "cut short"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels(tmp_path: Path, kind: str) -> None:
    make, message = LABELS[kind]
    label = tmp_path / "label.nii.gz"
    make(label)
    with pytest.raises(DataError, match=message) as caught:
        examine(Case("bad", write(tmp_path / "a.nii.gz", volume()), label=label))
    assert str(label) in str(caught.value)


def test_good_cases_pass(tmp_path: Path) -> None:
    image = write(tmp_path / "a.nii.gz", volume() - np.int16(500))
    turned = write(
        tmp_path / "label.nii.gz", (volume() % 5)[::-1], affine=np.diag([-1.0, 1, 1, 1]) + 9 * np.eye(4, k=3)[:4]
    )
    array, affine = examine(Case("a", image, label=turned))
    assert array.min() < 0
    assert array.shape == SHAPE
    assert np.allclose(affine, np.eye(4))


def test_every_bad_case_is_named_on_one_line(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 6)
    cut(cases[1].image, 0.5)
    cases[4].image.unlink()
    with pytest.raises(DataError) as caught:
        usable(cases, share_out(examine, cases, ""), "fail")
    text = str(caught.value)
    assert text.startswith("2 of 6 cases cannot be used: ")
    assert "c01.nii.gz: is damaged or cut short" in text
    assert "; c04: has no image" in text
    assert "\n" not in text


def test_of_many_bad_cases_twenty_are_named_and_all_counted(tmp_path: Path) -> None:
    cases = [Case(f"c{index:02d}", tmp_path / "none.nii") for index in range(25)]
    with pytest.raises(DataError, match=r"25 of 25 cases .*c19: .*; and 5 more$") as caught:
        usable(cases, share_out(examine, cases, ""), "fail")
    assert "c20" not in str(caught.value)


def test_skip_leaves_bad_cases_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = make_cases(tmp_path, 4)
    cut(cases[2].image, 0.5)
    assert usable(cases, share_out(examine, cases, ""), "skip") == [cases[0], cases[1], cases[3]]
    assert "left out: " + str(cases[2].image) in capsys.readouterr().err
    for case in cases:
        case.image.unlink()
    with pytest.raises(DataError, match="4 of 4 cases cannot be used"):
        usable(cases, share_out(examine, cases, ""), "skip")


def test_results_come_in_order_of_the_cases(tmp_path: Path) -> None:
    cases = [Case(f"c{index}", tmp_path) for index in range(200)]
    assert share_out(lambda case: case.name, cases, "") == [case.name for case in cases]


def test_a_full_disk_stops_the_others(tmp_path: Path) -> None:
    done = []

    def fail(case: Case) -> None:
        done.append(case)
        time.sleep(0.005)
        raise OutputError("disk full")

    with pytest.raises(OutputError, match="disk full"):
        share_out(fail, [Case(f"c{index}", tmp_path) for index in range(1000)], "")
    assert len(done) < checks._ROUND
