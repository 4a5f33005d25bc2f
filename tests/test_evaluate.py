import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm3d.cards import AUTOENCODER, AutoencoderCard
from ldm3d.config import load_config
from ldm3d.networks import build_autoencoder
from ldm3d.nifti import write_volume
from ldm3d.phantom import make_phantom, write_dataset
from ldm3d.volumes import scale_intensity
from ldm3d.weights import save_weights

SCRIPT = Path(__file__).parents[1] / "evaluate.py"
SHAPE, SPACING = (24, 32, 24), 6.4
NETWORK = {"channels": [4, 4], "attention_levels": [False, False], "num_res_blocks": 1, "norm_num_groups": 2}
TRAINING = {"batch_size": 1, "patch_size": SHAPE, "lr": 1e-3, "max_epochs": 1}
CONFIG = {
    "spacing": [SPACING] * 3,
    "latent_channels": 2,
    "autoencoder_def": {**NETWORK, "latent_channels": 2},
    "autoencoder_train": TRAINING,
    "diffusion_def": {**NETWORK, "in_channels": 2, "out_channels": 2, "num_head_channels": 2},
    "diffusion_train": TRAINING,
    "data": {"val_fraction": 0.4},
}
COPY = 3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A data set of 10 brains, an untrained autoencoder, and 6 'generated' volumes: new brains and one copy."""
    folder = tmp_path_factory.mktemp("study")
    write_dataset(folder / "data", 10, shape=SHAPE, spacing=SPACING)
    paths = {"model_dir": "model", "tfevent_path": "tb", "output_dir": "out", "data_base_dir": "data"}
    (folder / "env.json").write_text(json.dumps({key: str(folder / name) for key, name in paths.items()}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for index in range(10):  # synimg_0_10 would be third if names were compared as text
        write_sample(folder / "samples" / f"synimg_0_{index + 1}.nii.gz", 9, index)
    save_autoencoder(folder / "model")
    return folder


def write_sample(path, seed, index, spacing=SPACING):
    image = make_phantom(seed, index, SHAPE, SPACING).image[0]
    write_volume(path, scale_intensity(image, path.name), (spacing,) * 3)


def save_autoencoder(folder, spacing=SPACING):
    cfg = load_config(folder.parent / "config.json")
    torch.manual_seed(0)
    card = AutoencoderCard(
        definition=cfg.autoencoder_def, trained_on="", num_train=1, step=0, channel=0, spacing=(spacing,) * 3
    )
    save_weights(folder / AUTOENCODER, build_autoencoder(cfg.autoencoder_def).state_dict(), card)


@pytest.fixture
def run(study, monkeypatch, capsys):
    """Run the script in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return lambda *more: call("-c", study / "config.json", "-e", study / "env.json", *more)


def test_as_a_user_does(study, tmp_path):
    command = [sys.executable, str(SCRIPT), "-c", "config.json", "-e", "env.json", "--synthetic", "samples"]
    output = tmp_path / "report" / "metrics.json"
    done = subprocess.run(
        [*command, "--output", str(output), "--limit", "3"], cwd=study, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    for name in ("psnr_db", "kid", "sharpness", "ms_ssim_pairs", "copies", str(output)):
        assert name in done.stdout
    found = json.loads(output.read_text())
    assert found["volumes"]["synthetic"] == ["synimg_0_1", "synimg_0_2", "synimg_0_3"]
    assert len(found["volumes"]["reference"]) == 3 and found["volumes"]["training"] == 6
    assert np.asarray(Image.open(output.with_suffix(".png"))).std() > 20


def test_every_metric_says_how_and_the_copy_is_found(study, run, tmp_path):
    split = run_once(run, study, tmp_path)["volumes"]
    training = sorted(p.name for p in (study / "data" / "Task01_BrainTumour" / "imagesTr").iterdir())
    copied = [name.split(".")[0] for name in training if name.split(".")[0] not in split["reference"]][COPY]
    samples = tmp_path / "samples"
    write_sample(samples / "new.nii.gz", 9, 0)
    write_sample(samples / "copy.nii.gz", 0, training.index(f"{copied}.nii.gz"))
    for hidden in (".tmp-1a2b3c4d-new.nii.gz", "._copy.nii.gz"):
        (samples / hidden).write_bytes(b"what a killed run and macOS leave")
    assert run("--synthetic", samples, "--output", tmp_path / "m.json")[0] == 0
    found = json.loads((tmp_path / "m.json").read_text())
    for name, metric in found["metrics"].items():
        assert {"value", "direction", "n", "how"} <= metric.keys(), name
    assert found["skipped"] == {}
    by_name = {row["sample"]: row for row in found["nearest_training_volumes"]}
    assert by_name["copy"]["nearest"] == copied and by_name["copy"]["closer_than_all_real"]
    assert not by_name["new"]["closer_than_all_real"]


def run_once(run, study, tmp_path):
    output = tmp_path / "first.json"
    assert run("--synthetic", study / "samples", "--output", output, "--limit", 2)[0] == 0
    return json.loads(output.read_text())


def test_what_cannot_be_computed_is_skipped_and_said(study, run, tmp_path):
    env = json.loads((study / "env.json").read_text()) | {"model_dir": str(tmp_path / "no_model")}
    (tmp_path / "env.json").write_text(json.dumps(env))
    output = tmp_path / "m.json"
    status, shown, _ = run(
        "--synthetic", study / "samples", "--output", output, "--limit", 1, "-e", tmp_path / "env.json"
    )
    assert status == 0
    found = json.loads(output.read_text())
    assert found["skipped"].keys() == {"reconstruction", "fidelity", "diversity"}
    assert "reconstruction skipped: there is no" in shown
    assert found["metrics"].keys() >= {"sharpness", "copies"} and "psnr_db" not in found["metrics"]
    assert output.with_suffix(".png").exists()


def test_other_spacing_is_resampled_to_the_configs(study, run, tmp_path):
    write_sample(tmp_path / "fine" / "a.nii.gz", 9, 0, spacing=SPACING / 2)
    output = tmp_path / "m.json"
    assert run("--synthetic", tmp_path / "fine", "--output", output)[0] == 0
    assert json.loads(output.read_text())["metrics"]["copies"]["n"]["synthetic"] == 1


def test_errors_are_one_line_and_status_2(study, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.nii.gz").write_text("hello")
    write_volume(tmp_path / "unscaled" / "a.nii.gz", np.full(SHAPE, 300.0), (SPACING,) * 3)
    for arguments, complaint in (
        (["--synthetic", tmp_path / "empty"], "empty: has no .nii.gz or .nii files"),
        (["--synthetic", tmp_path / "damaged"], "a.nii.gz: cannot be read as NIfTI"),
        (["--synthetic", tmp_path / "unscaled"], "a.nii.gz: values run from 300 to 300"),
        (["--synthetic", study / "samples", "--output", tmp_path / "m.png"], "must end with .json"),
        (["--synthetic", study / "samples", "--limit", "0"], "must be a whole number above 0"),
        (["--synthetic", study / "samples", "--real", tmp_path / "nowhere"], "nowhere: there is no such folder"),
        ([], "--synthetic"),
    ):
        output = [] if "--output" in arguments else ["--output", tmp_path / "m.json"]
        status, _, shown = run(*arguments, *output)
        assert status == 2, arguments
        assert complaint in shown.splitlines()[-1] and shown.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "m.json").exists()


def test_weights_of_other_volumes_are_refused(study, run, tmp_path):
    (tmp_path / "config.json").write_text((study / "config.json").read_text())
    save_autoencoder(tmp_path / "model", spacing=1.0)
    env = json.loads((study / "env.json").read_text()) | {"model_dir": str(tmp_path / "model")}
    (tmp_path / "env.json").write_text(json.dumps(env))
    arguments = ["--synthetic", study / "samples", "--output", tmp_path / "m.json", "-e", tmp_path / "env.json"]
    status, _, shown = run(*arguments)
    assert status == 2
    assert "was trained on channel 0 at [1.0, 1.0, 1.0] mm" in shown
