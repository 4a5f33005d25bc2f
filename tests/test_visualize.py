import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "visualize_image.py"
SHAPE = (16, 20, 12)


def run(folder, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def save(tmp_path):
    def write(name, array, affine=None):
        nib.save(
            nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4) if affine is None else affine),
            tmp_path / name,
        )
        return name

    return write


def test_pictures_of_every_kind_of_file(tmp_path, save):
    rng = np.random.default_rng(0)
    three = save("three.nii.gz", rng.random(SHAPE) * 1000)
    four = save("four.nii", rng.random((*SHAPE, 2)) - 0.5)
    done = run(tmp_path, three, four)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["three.png", "four.png"]
    for name in ("three.png", "four.png"):
        assert np.asarray(Image.open(tmp_path / name)).max() > 200
    assert run(tmp_path, three, four, "--output", "out/all.png").stdout.strip() == str(Path("out/all.png"))
    assert (tmp_path / "out" / "all.png").exists()


def test_label_and_channel(tmp_path, save):
    label = np.zeros(SHAPE)
    label[4:9, 5:12, 3:8] = 1
    four = save("four.nii.gz", np.random.default_rng(0).random((*SHAPE, 2)))
    save("seg.nii.gz", label)
    done = run(tmp_path, four, "--channel", 1, "--label", "seg.nii.gz")
    assert (done.returncode, done.stderr) == (0, "")
    pixels = np.asarray(Image.open(tmp_path / "four.png").convert("RGB")).astype(int)
    assert (pixels[..., 0] - pixels[..., 1] > 100).any()


def test_errors_are_one_line_and_status_2(tmp_path, save):
    (tmp_path / "text.nii.gz").write_text("hello")
    good = save("good.nii.gz", np.ones(SHAPE))
    other = save("other_grid.nii.gz", np.ones((4, 4, 4)))
    for arguments, complaint in (
        (["text.nii.gz"], "text.nii.gz: cannot be read as NIfTI"),
        ([good, "--channel", 3], "good.nii.gz: has no channel 3"),
        ([good, "--label", other], "other_grid.nii.gz: lies on another grid"),
        ([good, other, "--label", good], "--label belongs to one volume"),
        ([], "FILE"),
    ):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert complaint in done.stderr
    assert not list(tmp_path.glob("*.png"))
