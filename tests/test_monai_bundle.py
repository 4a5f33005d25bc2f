"""Exported folders make the volumes of inference.py, carry what they need and nothing private, or are not there."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
import yaml
from monai.bundle import ConfigWorkflow, run, verify_net_in_out
from monai.bundle.properties import InferProperties
from monai.bundle.utils import DEFAULT_METADATA

import utils
from ldm3d import __version__, bundle, hub_folder
from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.config import load_config
from ldm3d.files import sha256
from ldm3d.nifti import centred_affine
from ldm3d.weights import LATENT_MEAN, save_weights

FLOW: dict[str, Any] = {"NoiseScheduler": {"type": "rflow"}, "autoencoder_def": {"patchify": 2}}
FLOW |= {"sampling": {"steps": 3, "batch_size": 2}}
METRIC = {"value": 0.125, "direction": "lower is | better", "n": {"real": 4, "synthetic": 2}, "how": "somehow"}
NAMES = ("BRATS_PRIVATE_17", "/home/hospital")


def publish(folder: Path, seed: int = 0) -> Path:
    """Weights as a training leaves them, with all that lies beside them, and the files that its commands take."""
    cfg = tiny.config(**FLOW)
    weights = folder / "model"
    autoencoder = tiny.shaken(tiny.autoencoder(cfg), seed)
    save_weights(weights / AUTOENCODER, autoencoder.state_dict(), tiny.autoencoder_card(cfg))
    mean = torch.randn(cfg.latent_shape, generator=torch.Generator().manual_seed(1)) / 10
    card = tiny.diffusion_card(cfg, sha256(weights / AUTOENCODER))
    save_weights(weights / UNET, tiny.unet(cfg).state_dict() | {LATENT_MEAN: mean}, card)
    for name in ("split.json", "autoencoder_last.pt", "reference_profile.json", "discriminator.safetensors"):
        (weights / name).write_text(" ".join(NAMES))
    content = json.loads(cfg.model_dump_json(by_alias=True))
    content["data"]["datalist"] = f"{NAMES[1]}/list.csv"
    content["autoencoder_train"]["perceptual_weights"] = f"{NAMES[1]}/hub"
    content["tracking"]["mlflow_uri"] = f"file:{NAMES[1]}/mlruns"
    (folder / "config.json").write_text(json.dumps(content))
    made = {"channel": 0, "spacing_mm": [3.0, 3.0, 3.0], "config": f"{NAMES[1]}/config.json"}
    figures = {
        "made": made,
        "metrics": {"kid": METRIC, "mmd": METRIC | {"value": None}},
        "nearest_training_volumes": [{"nearest": NAMES[0]}],
    }
    (folder / "metrics.json").write_text(json.dumps(figures))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["bundle.py", *map(str, words)])
    return bundle.main()


def inputs(folder: Path) -> list[object]:
    return ["-c", folder / "config.json", "--model-dir", folder / "model"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, both exports of them, and volumes that inference.py made."""
    folder = publish(tmp_path_factory.mktemp("made"))
    said = [
        "--metrics",
        folder / "metrics.json",
        "--license",
        "cc-by-4.0",
        "--authors",
        "A lab",
        "--dataset",
        "lab/set",
    ]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *inputs(folder), "--output", folder / "brains", *said) == 0
        assert call(patch, *inputs(folder), "--output", folder / "hub", *said, "--format", "huggingface") == 0
        environment = {"model_dir": str(folder / "model"), "tfevent_path": "x", "output_dir": "x", "data_base_dir": "x"}
        (folder / "environment.json").write_text(json.dumps(environment))
        files = ["-c", folder / "config.json", "-e", folder / "environment.json"]
        sample(patch, *files, "--num", 3, "--seed", 5, "--output", folder / "ours")
    return folder


def sample(patch: pytest.MonkeyPatch, *words: object) -> None:
    patch.setattr("sys.argv", ["inference.py", *map(str, words)])
    utils.run_script(importlib.import_module("inference").main)


def same_volumes(ours: Path, theirs: Path, count: int = 3) -> bool:
    names = [f"synimg_5_{index}.nii.gz" for index in range(count)]
    assert sorted(path.name for path in theirs.glob("*.nii.gz")) == names
    assert float(nib.load(ours / names[0]).get_fdata().std()) > 0.05, "nothing to compare"
    return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


# MONAI bundle


def test_monai_makes_the_volumes_of_inference(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made / "brains")
    run(config_file="configs/inference.json", seed=5, num=3)
    assert same_volumes(made / "ours", made / "brains/volumes")
    affine = nib.load(made / "brains/volumes/synimg_5_0.nii.gz").affine
    assert np.array_equal(affine, centred_affine((16, 16, 16), (3, 3, 3)))


def test_so_it_does_with_the_code_of_the_bundle_alone(made: Path, tmp_path: Path) -> None:
    """From another folder, where this project is not found."""
    code = f"""import sys
assert not any({str(Path(utils.__file__).parent)!r} == path for path in sys.path)
from monai.bundle import run
run(config_file={str(made / "brains/configs/inference.json")!r}, bundle_root={str(made / "brains")!r},
    output_dir="out", seed=5, num=2)
import ldm3d
print(ldm3d.__file__)
absent = ("pillow", "PIL", "scipy", "nilearn", "tensorboard", "matplotlib")
print([name for name in absent if name in sys.modules and hasattr(sys.modules[name], "__version__")])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == str(made / "brains/ldm3d/__init__.py")
    assert same_volumes(made / "ours", tmp_path / "out", 2)


def test_a_workflow_in_python_and_what_can_be_replaced(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made / "brains")
    given = {"num": 1, "seed": 9, "steps": 2, "batch_size": 1, "dtype": "int16", "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow("configs/inference.json", workflow_type=None, **given)
    workflow.initialize()
    assert workflow.run() == [[tmp_path / "synimg_9_0.nii.gz"]]
    sidecar = json.loads((tmp_path / "synimg_9_0.json").read_text())
    assert (sidecar["seed"], sidecar["steps"], sidecar["scheduler"]) == (9, 2, "rflow")
    assert nib.load(tmp_path / "synimg_9_0.nii.gz").get_data_dtype() == np.int16


def test_monai_finds_the_network_as_the_metadata_say(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made / "brains")
    files = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}
    verify_net_in_out("network_def", device="cpu", **files)
    wrong = {"_meta_::network_data_format::outputs::pred::num_channels": 2}
    with pytest.raises(ValueError, match="doesn't match"):
        verify_net_in_out("network_def", device="cpu", **files, **wrong)


def test_the_metadata_are_whole(made: Path) -> None:
    metadata = json.loads((made / "brains/configs/metadata.json").read_text())
    assert DEFAULT_METADATA.keys() | {"schema"} <= metadata.keys()
    assert metadata["version"] == __version__
    assert metadata["version"] in metadata["changelog"]
    formats = metadata["network_data_format"]
    tensors = formats["inputs"]["image"], formats["outputs"]["pred"]
    zoo = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"}
    assert all(zoo <= tensor.keys() for tensor in tensors)
    assert [tensor["spatial_shape"] for tensor in tensors] == [[4, 4, 4], [16, 16, 16]]
    assert (metadata["authors"], metadata["data_source"]) == ("A lab", "lab/set")
    assert metadata["eval_metrics"] == {"kid": 0.125}
    packages = metadata["required_packages_version"]
    pinned = Path(utils.__file__).with_name("requirements.txt").read_text()
    assert all(f"{name}=={version}\n" in pinned for name, version in packages.items() if name != "fire")
    assert {"network_def", "bundle_root"} <= InferProperties.keys() & inference_of(made).keys()


def inference_of(made: Path) -> dict[str, Any]:
    return json.loads((made / "brains/configs/inference.json").read_text())


def test_expressions_in_the_config_are_few(made: Path) -> None:
    text = (made / "brains/configs/inference.json").read_text()
    allowed = {"$@bundle_root + '/models'", "$@bundle_root + '/volumes'"}
    allowed.add("$@network_def.write(@output_dir, @num, @seed, @batch_size, @dtype)")
    assert set(re.findall(r'"(\$[^"]*)"', text)) == allowed


# Hugging Face folder


def test_inference_takes_the_folder_as_it_is(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made / "hub")
    sample(monkeypatch, "-c", "config.json", "-e", "environment.json", "--num", 3, "--seed", 5)
    assert same_volumes(made / "ours", made / "hub/volumes")


def test_the_card_s_snippet_runs(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made / "hub")
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(compile(snippet.replace("num=2, seed=0", "num=1, seed=6"), "card", "exec"), {})  # noqa: S102
    assert Path("volumes/synimg_6_0.nii.gz").is_file()


def test_the_card_s_metadata_are_those_of_the_hub(made: Path) -> None:
    _, front, text = (made / "hub/README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "cc-by-4.0"
    assert data["library_name"] == "ldm3d"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["datasets"] == ["lab/set"]
    (model,) = data["model-index"]
    assert model["results"][0]["metrics"] == [{"type": "kid", "name": "kid", "value": 0.125}]
    assert "| `kid` | 0.125 | lower is \\| better | 4 real, 2 synthetic |" in text
    assert "16 x 16 x 16 voxels of 3 x 3 x 3 mm" in text
    assert "*.safetensors filter=lfs" in (made / "hub/.gitattributes").read_text()


def test_names_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"license": "no: [x", "name": 'Gehirn \U0001f9e0 # "zwölf"\n---\n'}
    monkeypatch.setattr(hub_folder, "front_matter", lambda facts: said)
    assert yaml.safe_load(hub_folder.model_card(mock.MagicMock()).split("\n---\n")[0]) == said


def test_huggingface_hub_reads_the_card(made: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(made / "hub/README.md").data
    assert data.license == "cc-by-4.0"
    assert [result.metric_type for result in data.eval_results] == ["kid"]


def test_what_nobody_has_said_is_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(tmp_path)
    assert call(monkeypatch, *inputs(folder), "--output", folder / "hub", "--format", "huggingface") == 0
    card = (folder / "hub/README.md").read_text()
    assert 'license: "unknown"' in card
    assert "datasets:" not in card
    assert "model-index:" not in card
    assert "No figures came with these weights." in card


# Both


def test_nothing_private_goes_out(made: Path) -> None:
    for form, weights in (("brains", "models/"), ("hub", "")):
        files = [path for path in (made / form).rglob("*") if path.is_file() and "volumes" not in path.parts]
        tensors = {str(path.relative_to(made / form)) for path in files if path.suffix in (".safetensors", ".pt")}
        assert tensors == {f"{weights}{AUTOENCODER}", f"{weights}{UNET}"}
        assert [path for path in files if any(name.encode() in path.read_bytes() for name in NAMES)] == []
    left = load_config(made / "hub/config.json")
    assert left.data.datalist is None
    assert left.diffusion_def == load_config(made / "config.json").diffusion_def


def spoil_config(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    content[key] = value
    (folder / "config.json").write_text(json.dumps(content))


def spoil_metrics(folder: Path, text: str) -> None:
    (folder / "metrics.json").write_text(text)


def another_autoencoder(folder: Path) -> None:
    cfg = tiny.config(**FLOW)
    save_weights(folder / "model" / AUTOENCODER, tiny.autoencoder(cfg, seed=8).state_dict(), tiny.autoencoder_card(cfg))


NOT_A_NUMBER = json.dumps(
    {"made": {"channel": 0, "spacing_mm": [3, 3, 3]}, "metrics": {"kid": METRIC | {"value": math.nan}}}
)
OTHER = json.dumps({"made": {"channel": 1, "spacing_mm": [3, 3, 3]}, "metrics": {}})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda f: (f / "model" / UNET).unlink(),
            "model/diffusion_unet.safetensors: no such weights; train them first",
        ),
        (another_autoencoder, "was trained on the latents of another autoencoder.safetensors"),
        (lambda f: (f / "model" / UNET).write_bytes(b"damaged"), "model/diffusion_unet.safetensors: not a whole"),
        (lambda f: spoil_config(f, "NoiseScheduler", {"type": "ddpm"}), "NoiseScheduler of the config contradicts"),
        (lambda f: spoil_config(f, "spacing", [2, 2, 2]), "the config says channel 0 at [2.0, 2.0, 2.0] mm"),
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "metrics.json").unlink(), "metrics.json: cannot be read"),
        (lambda f: spoil_metrics(f, "[]"), "metrics.json: is not a metrics.json of evaluate.py"),
        (lambda f: spoil_metrics(f, '{"metrics": []}'), "metrics.json: is not a metrics.json of evaluate.py"),
        (lambda f: spoil_metrics(f, NOT_A_NUMBER), "metrics.json: is not a metrics.json of evaluate.py"),
        (lambda f: spoil_metrics(f, OTHER), "is about channel 1 at [3, 3, 3] mm; the weights make channel 0"),
        (lambda f: (f / "out").mkdir(), "out: exists already; name another folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    harm: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish(tmp_path)
    harm(folder)
    before = sorted(path.name for path in folder.iterdir())
    code = call(monkeypatch, *inputs(folder), "--output", folder / "out", "--metrics", folder / "metrics.json")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert said in line
    assert ".tmp-" not in line
    assert sorted(path.name for path in folder.iterdir()) == before
