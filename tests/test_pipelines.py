"""The small parts of the pipeline: settings, what a step begins with, lineage, registration against a stub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from scripts import Desk

from ldm3d.config import load_config
from ldm3d.errors import ConfigError, DataError, UserError
from ldm3d.files import sha256
from ldm3d.nifti import write_volume
from mlops.pipelines import begin, lineage, register, training_pipeline
from mlops.pipelines.lineage import Record, describe, digest_of, read_lineage, verify
from mlops.pipelines.settings import PipelineSettings, Workspace, WorkspaceSettings, read_settings
from mlops.pipelines.workspace import IN_A_JOB, connect, connect_from_job, tag_assets

ROOT = Path(__file__).parents[1]
PIPELINES = ROOT / "mlops/pipelines"
METRICS = Path(__file__).parent / "gate"


class TestSettings:
    def test_the_repositorys_files_are_valid_and_name_a_valid_training(self):
        settings = read_settings(PIPELINES / "pipeline_config.yml", PipelineSettings)
        load_config(ROOT / settings.config)
        read_settings(ROOT / "mlops/azure/workspace_config.yml", WorkspaceSettings)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("data", "brats"),
            ("data", "brats:latest:1"),
            ("gpus", 0),
            ("samples", 7),
            ("seed", -1),
            ("timeout_hours", 0),
            ("shared_memory", "16"),
            ("model", "LDM 3D"),
            ("compute", {"cpu": "cpu-cluster"}),
            ("epochs", 3),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, tmp_path, key, value):
        content = yaml.safe_load((PIPELINES / "pipeline_config.yml").read_text()) | {key: value}
        (tmp_path / "c.yml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=rf"c\.yml: {key}"):
            read_settings(tmp_path / "c.yml", PipelineSettings)

    @pytest.mark.parametrize("text", ["", "a: [", "- 1"])
    def test_a_file_that_is_none_is_refused(self, tmp_path, text):
        (tmp_path / "c.yml").write_text(text)
        with pytest.raises(ConfigError):
            read_settings(tmp_path / "c.yml", PipelineSettings)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_settings(tmp_path / "none.yml", PipelineSettings)


class TestBegin:
    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["begin", *map(str, arguments)])
        return begin.main()

    def test_hands_on_what_was_published_and_writes_the_environment(self, tmp_path, monkeypatch):
        (tmp_path / "one").mkdir()
        for name in ("split.json", "autoencoder.safetensors", "autoencoder_last.pt"):
            (tmp_path / "one" / name).write_text(name)
        arguments = ["--data", tmp_path / "data", "--model", tmp_path / "two", "--take", tmp_path / "one"]
        assert self.run(monkeypatch, *arguments, "--environment", tmp_path / "e.json") == 0
        # Training states stay behind: the next stage would take them for its own.
        assert {p.name for p in (tmp_path / "two").iterdir()} == {"split.json", "autoencoder.safetensors"}
        written = json.loads((tmp_path / "e.json").read_text())
        assert written["model_dir"] == str(tmp_path / "two") and written["data_base_dir"] == str(tmp_path / "data")

    def test_a_second_start_leaves_what_is_there(self, tmp_path, monkeypatch):
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        (tmp_path / "one/split.json").write_text("old")
        (tmp_path / "two/split.json").write_text("grown")
        arguments = ["--data", tmp_path, "--model", tmp_path / "two", "--take", tmp_path / "one"]
        self.run(monkeypatch, *arguments, "--environment", tmp_path / "e.json")
        assert (tmp_path / "two/split.json").read_text() == "grown"

    def test_an_empty_output_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "one").mkdir()
        arguments = ["--data", tmp_path, "--model", tmp_path / "two", "--take", tmp_path / "one"]
        with pytest.raises(DataError, match="has none of split"):
            self.run(monkeypatch, *arguments, "--environment", tmp_path / "e.json")


def asset(folder: Path, kind: str, files: dict[str, str], *parents: Path, version: str = "3") -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    described = [read_lineage(parent) for parent in parents]
    records = [Record(name=p.name, version=p.version, digest=p.digest) for p in described]
    describe(kind, f"m-{kind}", version, folder, records)
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Path]:
    """Assets as a pipeline leaves them, with text for weights."""
    split = asset(tmp_path / "split", "split", {"split.json": "{}"})
    one = asset(tmp_path / "one", "autoencoder", {"autoencoder.safetensors": "a"}, split)
    two = asset(tmp_path / "two", "diffusion", {"diffusion_unet.safetensors": "u", "autoencoder.safetensors": "a"}, one)
    metrics = asset(tmp_path / "metrics", "metrics", {"metrics.json": (METRICS / "a.json").read_text()}, two)
    return {"split": split, "autoencoder": one, "diffusion": two, "metrics": metrics}


class TestLineage:
    def test_tags_name_each_parent_with_version_and_digest(self, chain):
        found = verify(list(chain.values()))
        tags = found["diffusion"].tags()
        assert tags["parent.0"] == f"m-autoencoder:3@{found['autoencoder'].digest[:16]}"
        assert tags["sha256"] == digest_of(chain["diffusion"], "diffusion")

    def test_a_changed_asset_is_noticed(self, chain):
        (chain["autoencoder"] / "autoencoder.safetensors").write_text("other")
        with pytest.raises(DataError, match="autoencoder was changed after it was made"):
            verify(list(chain.values()))

    def test_an_asset_of_another_pipeline_is_noticed(self, chain, tmp_path):
        other = asset(tmp_path / "other", "autoencoder", {"autoencoder.safetensors": "b"}, chain["split"])
        with pytest.raises(DataError, match="was made of m-autoencoder:3@"):
            verify([chain["split"], other, chain["diffusion"], chain["metrics"]])

    def test_states_and_events_are_not_the_asset(self, chain):
        before = digest_of(chain["autoencoder"], "autoencoder")
        (chain["autoencoder"] / "autoencoder_last.pt").write_text("state")
        assert digest_of(chain["autoencoder"], "autoencoder") == before

    def test_raw_data_are_known_by_names_and_contents(self, tmp_path):
        (tmp_path / "d/x").mkdir(parents=True)
        (tmp_path / "d/x/a.nii").write_text("1")
        before = digest_of(tmp_path / "d", "data")
        (tmp_path / "d/x/a.nii").rename(tmp_path / "d/x/b.nii")
        assert digest_of(tmp_path / "d", "data") != before

    def test_damage_and_absence_are_users_errors(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_lineage(tmp_path)
        (tmp_path / lineage.FILE).write_text("{}")
        with pytest.raises(DataError, match="is damaged"):
            read_lineage(tmp_path)
        with pytest.raises(DataError, match="holds no split"):
            digest_of(tmp_path, "split")


class MlflowException(Exception):
    def __init__(self, error_code: str):
        self.error_code = error_code
        super().__init__(error_code)


class StubRegistry:
    """As much of MLflow's client as is used; `fails` is what every call answers with."""

    def __init__(self, folder: Path):
        self.folder, self.versions, self.aliases, self.fails = folder, [], {}, ""

    def __call__(self, *uris: str) -> "StubRegistry":
        return self

    def get_model_version_by_alias(self, model, alias):
        if self.fails:
            raise MlflowException(self.fails)
        if alias not in self.aliases:
            raise MlflowException("RESOURCE_DOES_NOT_EXIST")
        return self.versions[int(self.aliases[alias]) - 1]

    def search_registered_models(self, query):
        return self.versions[:1]

    def create_registered_model(self, model):
        assert not self.versions

    def search_model_versions(self, query):
        return self.versions

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.versions)}"))

    def set_terminated(self, run_id):
        pass

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(artifact_uri=str(self.folder / run_id)))

    def log_artifact(self, run_id, path, folder):
        (self.folder / run_id / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.folder / run_id / folder)

    def create_model_version(self, model, source, run_id, tags):
        number = str(len(self.versions) + 1)
        self.versions.append(SimpleNamespace(version=number, source=source, run_id=run_id, tags=dict(tags)))
        return self.versions[-1]

    def set_model_version_tag(self, model, version, key, value):
        self.versions[int(version) - 1].tags[key] = value

    def set_registered_model_alias(self, model, alias, version):
        self.aliases[alias] = version


@pytest.fixture
def registry(tmp_path, monkeypatch) -> StubRegistry:
    stub, module = StubRegistry(tmp_path / "artifacts"), ModuleType("mlflow")

    def download(artifact_uri, dst_path, tracking_uri):
        return shutil.copy(artifact_uri, dst_path)

    vars(module).update(
        MlflowClient=stub,
        exceptions=SimpleNamespace(MlflowException=MlflowException),
        artifacts=SimpleNamespace(download_artifacts=download),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://registry.example")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return stub


class TestRegister:
    def run(self, monkeypatch, chain, *more):
        folders = ["--model", chain["diffusion"], "--metrics", chain["metrics"]]
        assets = ["--assets", chain["split"], chain["autoencoder"]]
        decision = chain["metrics"].parent / "decision.json"
        words = [*folders, *assets, "--name", "m", "--decision", decision, *more]
        monkeypatch.setattr(sys, "argv", ["register", *map(str, words)])
        register.main()
        return json.loads(decision.read_text())

    def replace_metrics(self, chain, name):
        shutil.rmtree(chain["metrics"])
        asset(chain["metrics"], "metrics", {"metrics.json": (METRICS / f"{name}.json").read_text()}, chain["diffusion"])

    def test_first_is_promoted_then_a_worse_one_is_kept_out(self, monkeypatch, chain, registry):
        (chain["diffusion"] / "reference_profile.json").write_text("{}")
        assert self.run(monkeypatch, chain)["decision"] == "promote"
        assert registry.aliases == {"champion": "1"}
        beside = {path.name for path in Path(registry.versions[0].source).iterdir()}
        assert beside == {
            "autoencoder.safetensors",
            "diffusion_unet.safetensors",
            "metrics.json",
            "reference_profile.json",
        }
        assert registry.versions[0].tags["asset.split"].startswith("m-split:3@")
        (chain["diffusion"] / "diffusion_unet.safetensors").write_text("worse")
        describe("diffusion", "m-diffusion", "4", chain["diffusion"], [])
        self.replace_metrics(chain, "blurred")
        decision = self.run(monkeypatch, chain)
        assert decision["decision"] == "keep" and decision["champion"] == "1"
        assert registry.aliases == {"champion": "1"} and len(registry.versions) == 1

    def test_weights_that_the_training_registered_are_not_registered_twice(self, monkeypatch, chain, registry):
        digest = sha256(chain["diffusion"] / "diffusion_unet.safetensors")
        source = str(registry.folder / "training/weights")
        registry.versions.append(
            SimpleNamespace(version="1", source=source, run_id="training", tags={"sha256": digest})
        )
        self.run(monkeypatch, chain)
        assert len(registry.versions) == 1 and registry.aliases == {"champion": "1"}
        assert (registry.folder / "training/weights/metrics.json").is_file()
        assert self.run(monkeypatch, chain)["champion"] == "1"

    def test_figures_that_are_not_said_to_be_the_models_promote_nothing(self, monkeypatch, chain, registry):
        describe("metrics", "m-metrics", "3", chain["metrics"], [])
        with pytest.raises(DataError, match=r"does not name m-diffusion:3@.*: another model was evaluated"):
            self.run(monkeypatch, chain)
        assert not registry.versions

    @pytest.mark.parametrize("folder", ["model", "metrics"])
    def test_a_folder_of_another_kind_is_refused(self, monkeypatch, chain, registry, folder):
        with pytest.raises(DataError, match="not the only"):
            self.run(monkeypatch, chain, f"--{folder}", chain["autoencoder"])
        assert not registry.versions

    def test_a_registry_that_does_not_answer_is_no_missing_champion(self, monkeypatch, chain, registry):
        registry.fails = "TEMPORARILY_UNAVAILABLE"
        with pytest.raises(UserError, match="the registry does not answer: TEMPORARILY_UNAVAILABLE"):
            self.run(monkeypatch, chain)
        assert not registry.versions

    def test_a_champion_without_figures_is_an_error(self, monkeypatch, chain, registry):
        self.run(monkeypatch, chain)
        shutil.rmtree(registry.folder)
        with pytest.raises(DataError, match=r"the champion, has no metrics\.json"):
            self.run(monkeypatch, chain)

    def test_without_an_address_it_says_what_to_set(self, chain, monkeypatch):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
            self.run(monkeypatch, chain)


class TestWorkspace:
    def test_outside_of_a_job_there_is_none(self, monkeypatch):
        for name in IN_A_JOB:
            monkeypatch.delenv(name, raising=False)
        assert connect_from_job() is None

    def test_a_subscription_must_be_said(self, monkeypatch):
        monkeypatch.delenv("AZURE_SUBSCRIPTION_ID", raising=False)
        with pytest.raises(ConfigError, match="AZURE_SUBSCRIPTION_ID"):
            connect(Workspace(resource_group="rg", workspace="mlw-1", private=False))


def test_prepare_splits_and_caches(tmp_path):
    desk = Desk(tmp_path / "desk").furnish()
    for number in range(4):
        volume = np.random.default_rng(number).random((16, 16, 16), dtype=np.float32)
        write_volume(desk.data / f"case{number}.nii.gz", volume, (6.0, 6.0, 6.0))
    command = [
        sys.executable,
        "-m",
        "mlops.pipelines.prepare",
        *desk.files,
        "--set",
        f"data.cache_dir={tmp_path}/cache",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache/volumes").glob("*.volume"))) == 4
    assert set(json.loads((desk.model / "split.json").read_text())) >= {"train", "validation"}


class AzureError(Exception):
    pass


@pytest.fixture
def azure(monkeypatch):
    """azure-core, which is not in this environment, as far as it is used."""
    names = ("azure", "azure.core", "azure.core.exceptions")
    modules = {name: ModuleType(name) for name in names}
    modules["azure.core.exceptions"].AzureError = AzureError
    for name in names:
        monkeypatch.setitem(sys.modules, name, modules[name])


def test_assets_of_the_workspace_are_tagged(chain, azure):
    saved = []
    data = SimpleNamespace(
        get=lambda name, version: SimpleNamespace(name=name, version=version, tags={"mine": "1"}),
        create_or_update=saved.append,
    )
    tag_assets(SimpleNamespace(data=data), verify(list(chain.values())).values())
    assert {asset.name for asset in saved} == {"m-split", "m-autoencoder", "m-diffusion", "m-metrics"}
    assert all(asset.tags["mine"] == "1" and asset.tags["sha256"] for asset in saved)


def test_an_asset_that_cannot_be_tagged_is_named(chain, azure):
    def get(name, version):
        raise AzureError("not found")

    with pytest.raises(ConfigError, match="data asset m-split:3 cannot be tagged: not found"):
        tag_assets(SimpleNamespace(data=SimpleNamespace(get=get)), verify([chain["split"]]).values())


def test_without_azure_ml_the_pipeline_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "azure.ai.ml", None)
    settings = read_settings(ROOT / "mlops/pipelines/pipeline_config.yml", PipelineSettings)
    with pytest.raises(ConfigError, match=r"azure-ai-ml is not .* mlops/azure/README\.md, section The pipeline"):
        training_pipeline.build(settings, "1")
