"""The pipeline and its components, read by azure-ai-ml; what they name is there, and every setting does something."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from arm import Template, read_json, values
from azure.ai.ml import load_component, load_environment
from azure_steps import snapshot, substituted
from programs import ROOT

from ldm3d.errors import ConfigError
from mlops.deployment.endpoint import read_config
from mlops.pipelines.settings import PipelineSettings, WorkspaceSettings, read_settings
from mlops.pipelines.training_pipeline import ASSETS, STEPS, build

AZURE, PIPELINES = ROOT / "mlops/azure", ROOT / "mlops/pipelines"


SETTINGS = read_settings(PIPELINES / "pipeline_config.yml", PipelineSettings)
WORKSPACES = read_settings(AZURE / "workspace_config.yml", WorkspaceSettings)


def job_of(**changes: Any) -> dict[str, Any]:
    return build(SETTINGS.model_copy(update=changes), "7")._to_dict()


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return job_of()


def test_the_pipeline_is_valid_and_mounts_what_it_makes() -> None:
    built = build(SETTINGS, "7")
    result = built._validate()
    assert result.passed, result.error_messages
    for node in built.jobs.values():
        assert {output.mode for output in node.outputs.values()} == {"rw_mount"}
    for kind, (step, output) in ASSETS.items():
        asset = built.jobs[step].outputs[output]
        assert (asset.name, asset.version) == (f"ldm3d-{kind}", "7")


@pytest.mark.parametrize("step", STEPS)
def test_components_are_valid_and_use_all_of_their_inputs(step: str) -> None:
    component = load_component(PIPELINES / f"components/{step}.yml")
    result = component._validate()
    assert result.passed, result.error_messages
    for kind, names in (("inputs", component.inputs), ("outputs", component.outputs)):
        assert set(re.findall(rf"\$\{{\{{{kind}\.(\w+)}}}}", component.command)) == set(names)
    for optional in (name for name, of in component.inputs.items() if of.optional):
        outside = re.sub(r"\$\[\[.*?]]", "", component.command)
        assert f"inputs.{optional}" not in outside


def test_a_component_with_a_wrong_name_in_its_command_is_noticed(tmp_path: Path) -> None:
    text = (PIPELINES / "components/prepare.yml").read_text().replace("${{inputs.config}}", "${{inputs.confg}}")
    (tmp_path / "prepare.yml").write_text(text)
    component = load_component(tmp_path / "prepare.yml")
    assert not component._validate().passed or set(re.findall(r"inputs\.(\w+)", component.command)) != set(
        component.inputs
    )


def test_trainings_go_on_after_a_preemption(job: dict[str, Any]) -> None:
    for step in ("autoencoder", "diffusion"):
        assert "--resume auto" in job["jobs"][step]["component"]["command"]
        assert job["jobs"][step]["compute"] == "azureml:gpu-cluster"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experiment", "other"),
        ("model", "other"),
        ("config", "config/config_demo.json"),
        ("data", "other:2"),
        ("split", "ldm3d-split:1"),
        ("start", "demo:1"),
        ("gpus", 4),
        ("samples", 128),
        ("seed", 5),
        ("timeout_hours", 1.5),
        ("shared_memory", "64g"),
        ("compute", SETTINGS.compute.model_copy(update={"cpu": "other"})),
        ("compute", SETTINGS.compute.model_copy(update={"gpu": "other"})),
    ],
)
def test_every_setting_does_something(job: dict[str, Any], key: str, value: Any) -> None:
    assert getattr(SETTINGS, key) != value
    assert job_of(**{key: value}) != job


def test_every_setting_is_tried() -> None:
    tried = {
        mark.args[1][i][0] for mark in test_every_setting_does_something.pytestmark for i in range(len(mark.args[1]))
    }
    assert tried == set(PipelineSettings.model_fields)


def test_a_training_configuration_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config/none\.json: there is no such file"):
        job_of(config="config/none.json")


def test_the_files_agree_on_names(job: dict[str, Any]) -> None:
    assert list(WORKSPACES.workspaces) == ["dev", "staging", "prod"]
    for name, place in WORKSPACES.workspaces.items():
        made = Template(read_json(AZURE / "infrastructure.json"), values(AZURE / f"parameters.{name}.json"))
        assert made.outputs()["workspaceName"] == place.workspace
        assert made.parameters["privateNetworking"] == place.private
        clusters = {r["name"].split("/")[1] for r in made.resources if r["type"].endswith("/computes")}
        assert {SETTINGS.compute.cpu, SETTINGS.compute.gpu} == clusters
    environments = [load_environment(AZURE / file) for file in WORKSPACES.environments]
    known = {f"azureml:{e.name}:{e.version}" for e in environments}
    used = {node["component"]["environment"] for node in job["jobs"].values()} | {
        read_config().deployments["environment"]
    }
    assert used == known
    assert set(WORKSPACES.environments) == {p.name for p in AZURE.glob("environment_*.yml")}


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^[\s-]*([A-Za-z0-9_.-]+)==(\S+)$", text, re.M))


@pytest.mark.parametrize(("file", "other"), [("conda_env.yml", set()), ("conda_serve.yml", {"pydantic"})])
def test_environments_have_what_the_project_needs_in_its_versions(file: str, other: set[str]) -> None:
    wanted, found = pins((ROOT / "requirements.txt").read_text()), pins((AZURE / file).read_text())
    assert {name for name in wanted if wanted[name] != found.get(name)} == other
    assert other <= found.keys()
    everything = yaml.safe_load((AZURE / file).read_text())["dependencies"][-1]["pip"]
    assert len(everything) == len(found), "everything is pinned"


def test_the_snapshot_of_a_job_is_small_and_has_what_the_commands_name(tmp_path: Path, job: dict[str, Any]) -> None:
    code = snapshot(tmp_path)
    files = [path for path in code.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5 * 2**20 and len(files) < 500
    assert not [
        path for path in files if path.name.startswith(".env") or path.suffix in (".safetensors", ".pem", ".key")
    ]
    for node in job["jobs"].values():
        for word in re.findall(r"(?:python|=\S+) (?:-m )?([\w./]+)", node["component"]["command"]):
            if word.startswith(("mlops.", "ldm3d.")):
                assert (code / (word.replace(".", "/") + ".py")).is_file(), word
            elif word.endswith(".py"):
                assert (code / word).is_file(), word
    assert (code / SETTINGS.config).is_file() and (code / "mlops/deployment/score.py").is_file()


def test_optional_inputs_are_left_out_where_they_are_not_given() -> None:
    command = "a ${{inputs.x}} $[[--y ${{inputs.y}}]] ${{outputs.z}}"
    assert substituted(command, {"x": 1}, {"z": Path("o")}) == "a 1  o"
    assert substituted(command, {"x": 1, "y": 2}, {"z": Path("o")}) == "a 1 --y 2 o"
