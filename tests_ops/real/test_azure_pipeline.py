"""The commands of the pipeline's components, run for real in their order: phantoms in, a registered model out."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from azure_steps import PROGRAMS, LocalPipeline, snapshot
from programs import ROOT

from mlops.pipelines.settings import PipelineSettings, read_settings
from mlops.pipelines.training_pipeline import STEPS, build

DATA = "phantoms:1"
Done = tuple[LocalPipeline, dict[str, str]]

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (PROGRAMS / "python").exists(), reason="no .venv-mlflow: make .venv-mlflow/run"),
]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of the code with a short training in it, and the embedded data beside it."""
    folder = tmp_path_factory.mktemp("azure")
    code = snapshot(folder / "code")
    config = json.loads((code / "config/config_demo.json").read_text())
    config |= {"checkpoint_every_minutes": 0, "data": {"num_workers": 0, "val_fraction": 0.4}}
    config["autoencoder_train"]["max_epochs"] = config["diffusion_train"]["max_epochs"] = 1
    config["diffusion_train"]["batch_size"] = 2  # so that there are steps to be interrupted between
    config["sampling"]["steps"] = 10
    (code / "config/config_demo.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(
        json.dumps({k: str(folder / "data") for k in ("model_dir", "tfevent_path", "output_dir", "data_base_dir")})
    )
    command = [PROGRAMS / "python", "download_brats_data.py", "-e", folder / "environment.json", "--phantom", "24"]
    subprocess.run(command, cwd=code, check=True, capture_output=True)
    return code


def pipeline(code: Path, folder: Path) -> LocalPipeline:
    """The repository's own pipeline with little to do, beginning with the demo weights."""
    settings = read_settings(ROOT / "mlops/pipelines/pipeline_config.yml", PipelineSettings)
    # Samples are few, so the gate's noise is large; that it tells good from bad is for its own tests.
    little = {"data": DATA, "start": "demo:1", "samples": 8, "config": "config/config_demo.json"}
    job = build(settings.model_copy(update=little), "1")._to_dict()
    assets = {f"azureml:{DATA}": code.parent / "data", "azureml:demo:1": ROOT / "checkpoints/demo"}
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return LocalPipeline(job, code, folder, assets, environment)


@pytest.fixture(scope="module")
def done(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The whole pipeline, run once, with what its steps said."""
    local = pipeline(code, tmp_path_factory.mktemp("outputs"))
    return local, {step: local.run(step) for step in STEPS}


def lineage(folder: Path) -> dict:
    return json.loads((folder / "lineage.json").read_text())


def test_first_candidate_becomes_the_champion(done: Done) -> None:
    local, said = done
    decision = json.loads((local.output("register", "decision") / "decision.json").read_text())
    assert decision["decision"] == "promote", decision
    assert "ldm3d-diffusion: version 1 is the champion now" in said["register"]
    assert len(list(local.output("evaluate", "samples").glob("*.nii.gz"))) == 8


def test_every_asset_names_its_parents(done: Done) -> None:
    local, _ = done
    places = {
        "split": ("prepare", "split"),
        "volumes": ("prepare", "volumes"),
        "autoencoder": ("autoencoder", "model"),
        "latents": ("diffusion", "latents"),
        "diffusion": ("diffusion", "model"),
        "metrics": ("evaluate", "metrics"),
    }
    found = {kind: lineage(local.output(*place)) for kind, place in places.items()}
    assert {kind: {parent["name"] for parent in of["parents"]} for kind, of in found.items()} == {
        "split": {"phantoms"},
        "volumes": {"phantoms"},
        "autoencoder": {"ldm3d-split", "ldm3d-volumes", "start"},
        "latents": {"ldm3d-volumes", "ldm3d-autoencoder"},
        "diffusion": {"ldm3d-latents", "ldm3d-autoencoder", "start"},
        "metrics": {"ldm3d-diffusion", "ldm3d-volumes"},
    }
    own = {of["name"]: (of["version"], of["digest"]) for of in found.values()}
    for of in found.values():
        for parent in of["parents"]:
            assert own.get(parent["name"], (parent["version"], parent["digest"])) == (
                parent["version"],
                parent["digest"],
            )
    assert found["split"]["parents"] == found["volumes"]["parents"]


def test_the_registry_has_weights_metrics_and_lineage(done: Done) -> None:
    local, _ = done
    look = (
        "import json, mlflow; c = mlflow.MlflowClient()\n"
        "v = c.get_model_version_by_alias('ldm3d-diffusion', 'champion')\n"
        "print(json.dumps([v.tags, sorted(a.path for a in c.list_artifacts(v.run_id, 'weights'))]))"
    )
    command = [str(PROGRAMS / "python"), "-c", look]
    said = subprocess.run(command, cwd=local.code, env=local.environment, capture_output=True, text=True, check=True)
    tags, files = json.loads(said.stdout.splitlines()[-1])
    wanted = {f"weights/{name}" for name in ("autoencoder.safetensors", "diffusion_unet.safetensors", "metrics.json")}
    assert wanted <= {*files}
    assert tags["parent.0"].startswith("ldm3d-latents:1@") and tags["asset.split"].startswith("ldm3d-split:1@")


def test_again_the_same_candidate_is_judged_against_the_champion(done: Done) -> None:
    local, _ = done
    said = local.run("register")
    assert "no worse than the champion" in said and "version 1 is the champion now" in said


def test_what_was_changed_is_not_registered(done: Done) -> None:
    local, _ = done
    index = next(local.output("diffusion", "latents").glob("latents-*/index.json"))
    before = index.read_text()
    index.write_text(before + " ")
    try:
        process = local.start("register")
        said, _ = process.communicate(timeout=300)
    finally:
        index.write_text(before)
    assert process.returncode == 2 and "latents was changed after it was made" in said


@pytest.mark.parametrize("step", ["autoencoder", "diffusion"])
def test_a_preempted_step_goes_on_exactly(done: Done, code: Path, tmp_path: Path, step: str) -> None:
    whole, _ = done
    local = pipeline(code, tmp_path)
    for before in STEPS[: STEPS.index(step)]:
        shutil.copytree(whole.folder / before, local.folder / before)
    model = local.output(step, "model")
    process = local.start(step)
    wait_for_states(process, model / f"{step}_last.1.pt")
    os.killpg(process.pid, signal.SIGKILL)  # without a warning: that of a machine that is taken away may come too late
    process.communicate()
    assert not (model / "lineage.json").exists()
    assert "resuming from" in local.run(step)
    assert lineage(model)["digest"] == lineage(whole.output(step, "model"))["digest"]


def wait_for_states(process: "subprocess.Popen[str]", older: Path) -> None:
    """Until the training has saved a second state, so that it is in its middle."""
    for _ in range(3000):
        assert process.poll() is None, process.stdout and process.stdout.read()
        if older.is_file():
            return
        time.sleep(0.1)
    raise AssertionError("no state was saved")
