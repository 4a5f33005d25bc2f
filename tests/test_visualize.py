import runpy
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "visualize_image.py"
SHAPE = (16, 20, 12)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script in this process, in `tmp_path`: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["visualize_image.py", *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def save(tmp_path):
    def write(name, array, affine=None):
        nib.save(
            nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4) if affine is None else affine),
            tmp_path / name,
        )
        return name

    return write


def test_as_a_user_does(tmp_path, save):
    three = save("three.nii.gz", np.random.default_rng(0).random(SHAPE) * 1000)
    command = [sys.executable, str(SCRIPT), three]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "three.png\n", "")
    assert np.asarray(Image.open(tmp_path / "three.png")).max() > 200


def test_pictures_of_every_kind_of_file(tmp_path, save, run):
    rng = np.random.default_rng(0)
    three = save("three.nii.gz", rng.integers(0, 9, SHAPE))
    four = save("four.nii", rng.random((*SHAPE, 2)) - 0.5)
    assert run(three, four) == (0, "three.png\nfour.png\n", "")
    assert run(three, four, "--output", "out/all.png")[:2] == (0, f"{Path('out/all.png')}\n")
    one, both = (np.asarray(Image.open(tmp_path / name)) for name in ("three.png", "out/all.png"))
    assert both.shape[0] > 1.5 * one.shape[0]


def test_files_of_one_name_are_all_shown(tmp_path, save, run):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    files = [save(f"{folder}/t1.nii", np.random.default_rng(0).random(SHAPE)) for folder in ("a", "b")]
    heights = [
        run(*shown, "--output", "all.png")[0] or Image.open(tmp_path / "all.png").height for shown in (files[:1], files)
    ]
    assert heights[1] > 1.5 * heights[0]
    status, _, shown = run(*files)
    assert status == 2 and "would get one picture" in shown and not (tmp_path / "t1.png").exists()


def test_label_and_channel(tmp_path, save, run):
    label = np.zeros(SHAPE)
    label[4:9, 5:12, 3:8] = 1
    four = save("four.nii.gz", np.random.default_rng(0).random((*SHAPE, 2)))
    assert run(four, "--channel", "1", "--label", save("seg.nii.gz", label))[0] == 0
    pixels = np.asarray(Image.open(tmp_path / "four.png").convert("RGB")).astype(int)
    assert (pixels[..., 0] - pixels[..., 1] > 100).any()


def test_volume_with_nan_is_shown_and_said(tmp_path, save, run):
    volume = np.random.default_rng(0).random(SHAPE)
    volume[3] = np.nan
    assert run(save("nan.nii.gz", volume))[0] == 0
    assert run(save("all_nan.nii.gz", np.full(SHAPE, np.nan)))[0] == 0


def test_too_many_channels_ask_for_a_choice(save, run):
    many = save("many.nii.gz", np.zeros((2, 2, 2, 20)))
    status, _, shown = run(many)
    assert status == 2 and "has 20 channels; choose one with --channel" in shown
    assert run(many, "--channel", "19")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["text.nii.gz"], "text.nii.gz: cannot be read as NIfTI"),
        (["good.nii.gz", "--channel", "3"], "good.nii.gz: has no channel 3"),
        (["good.nii.gz", "--label", "other.nii.gz"], "other.nii.gz: lies on another grid"),
        (["good.nii.gz", "--label", "turned.nii.gz"], "turned.nii.gz: lies 1.52 mm beside the volume"),
        (["good.nii.gz", "other.nii.gz", "--label", "good.nii.gz"], "--label belongs to one volume"),
        ([], "FILE"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, save, run, arguments, complaint):
    (tmp_path / "text.nii.gz").write_text("hello")
    save("good.nii.gz", np.ones(SHAPE))
    save("other.nii.gz", np.ones((4, 4, 4)))
    turned = np.eye(4)
    turned[0, 1] = 0.08
    save("turned.nii.gz", np.ones(SHAPE), turned)
    status, _, shown = run(*arguments)
    assert status == 2
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert complaint in shown
    assert not list(tmp_path.glob("*.png"))
