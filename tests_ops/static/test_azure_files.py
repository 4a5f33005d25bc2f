"""mlops/azure, mlops/deployment and mlops/pipelines, read by azure-ai-ml, checkov, a PowerShell grammar and our own
evaluation of ARM; each gate is seen to fail on a broken copy."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import azure_powershell as powershell
import pytest
import yaml
from arm import Fault, Template, read_json, values
from azure.ai.ml import load_component, load_environment
from azure_steps import snapshot, substituted
from programs import CHECKOV, ROOT, run

from ldm3d.errors import ConfigError, WeightsError
from mlops.deployment.endpoint import (
    COLORS,
    Endpoint,
    autoscale_parameters,
    deployment_entity,
    endpoint_entity,
    read_config,
)
from mlops.pipelines.settings import PipelineSettings, WorkspaceSettings, read_settings
from mlops.pipelines.training_pipeline import ASSETS, STEPS, build

AZURE, PIPELINES = ROOT / "mlops/azure", ROOT / "mlops/pipelines"
TEMPLATE = read_json(AZURE / "infrastructure.json")
ENVIRONMENTS = ("dev", "staging", "prod")
ML = "Microsoft.MachineLearningServices/workspaces"

# Type -> what Azure allows as a name, and how long it may be.
NAME_RULES = {
    "Microsoft.Storage/storageAccounts": r"[a-z0-9]{3,24}",
    "Microsoft.KeyVault/vaults": r"[A-Za-z][A-Za-z0-9-]{1,22}[A-Za-z0-9]",
    "Microsoft.ContainerRegistry/registries": r"[A-Za-z0-9]{5,50}",
    "Microsoft.OperationalInsights/workspaces": r"[A-Za-z0-9][A-Za-z0-9-]{2,61}[A-Za-z0-9]",
    "Microsoft.Insights/components": r"[A-Za-z0-9._()-]{1,259}",
    "Microsoft.ManagedIdentity/userAssignedIdentities": r"[A-Za-z0-9][A-Za-z0-9_-]{2,127}",
    ML: r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}",
    f"{ML}/computes": r"[^/]+/[a-z][a-z0-9-]{1,22}[a-z0-9]",
    "Microsoft.Network/virtualNetworks": r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_]",
    "Microsoft.Network/networkSecurityGroups": r"[A-Za-z0-9][A-Za-z0-9._-]{0,78}[A-Za-z0-9_]",
    "Microsoft.Network/privateEndpoints": r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_]",
}
PREVIEWS = {"Microsoft.Insights/diagnosticSettings": "has had no other version since 2017 that knows category groups"}
TOO_MUCH = {
    "8e3af657-a8ff-443c-a75c-2fe8c4bcb635": "Owner",
    "b24988ac-6180-42a0-ab88-20f7382dd24c": "Contributor",
    "18d7d88d-d35e-4fb5-a5c3-7773c20a72d9": "User Access Administrator",
    "f58310d9-a9f6-439a-9e8d-f62e7b41a168": "Role Based Access Control Administrator",
}
CHECKOV_EXCEPTIONS = {
    "CKV_AZURE_164": "content trust of images is retired by Azure; images are signed and verified in deploy.yml",
    "CKV_AZURE_166": "quarantine needs a scanner with rights of its own; images are scanned before the push",
    "CKV_AZURE_243": "asks for a kind of workspace; private endpoints are tested below",
}
SECRETS = re.compile(
    r"AccountKey\s*=|SharedAccessSignature|[?&]sig=|InstrumentationKey\s*=|-----BEGIN|"
    r"(?i:password|secret|token|api_?key)[\"']?\s*[:=]\s*[\"'][^\"'$@{]{6,}[\"']|"
    r"\b[A-Za-z0-9+/]{60,}={1,2}|\b[A-Za-z0-9_~.-]{3}8Q~[A-Za-z0-9_~.-]{34}\b"
)
"""Keys and connection strings of Azure, literals behind telling names, keys in base64, Entra's client secrets."""


# --- The templates ---


def strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from (*strings(key), *strings(value))
    elif isinstance(content, list):
        for item in content:
            yield from strings(item)


def check(content: Any, given: dict[str, Any]) -> Template:
    """Everything that can be said of a template without Azure. Raises `Fault`."""
    template = Template(content, given)
    loops = {one["copy"]["name"]: one["type"] for one in content["resources"] if "copy" in one}
    for resource in template.resources:
        check_resource(resource, template.ids, loops)
    for name, value in template.outputs().items():
        if not isinstance(value, str) or not value:
            raise Fault(f"output {name} is {value!r}")
    names = [(one["type"], one["name"], one.get("scope")) for one in template.resources]
    if len(names) != len(set(names)):
        raise Fault("two resources have the same name")
    return template


def check_resource(resource: dict[str, Any], ids: set[str], loops: dict[str, str]) -> None:
    type_, name = resource["type"], resource["name"]
    if not re.fullmatch(NAME_RULES.get(type_, r".{1,260}"), name):
        raise Fault(f"{type_} may not have the name {name}")
    if name.count("/") != type_.count("/") - 1:
        raise Fault(f"{name}: has not as many parts as {type_}")
    if not re.fullmatch(r"20\d\d-[01]\d-[0-3]\d(-preview)?", resource["apiVersion"]):
        raise Fault(f"{name}: {resource['apiVersion']} is no version of an API")
    if resource["apiVersion"].endswith("preview") and type_ not in PREVIEWS:
        raise Fault(f"{name}: {resource['apiVersion']} is a preview")
    after = {target.rpartition(":")[0] if target in ids else loops[target] for target in resource["dependsOn"]}
    body = {key: value for key, value in resource.items() if key != "dependsOn"}
    for text in strings(body):
        for target in re.findall(r"Microsoft\.[\w./]+:[\w./-]+", text):
            check_target(f"{type_} {name}", target, ids, after)


def check_target(who: str, target: str, ids: set[str], after: set[str]) -> None:
    type_, _, name = target.partition(":")
    while target not in ids and "/" in name:  # a subnet is in its network's body
        type_, name = type_.rpartition("/")[0], name.rpartition("/")[0]
        target = f"{type_}:{name}"
    if target not in ids:
        raise Fault(f"{who}: names {target}, which is not in the template")
    if type_ not in after:
        raise Fault(f"{who}: names {target} and does not wait for it")


def resource_of(template: Template, type_: str, part: str = "") -> dict[str, Any]:
    return next(r for r in template.resources if r["type"] == type_ and part in r["name"])


@pytest.fixture(scope="module")
def templates() -> dict[str, Template]:
    return {name: check(TEMPLATE, values(AZURE / f"parameters.{name}.json")) for name in ENVIRONMENTS}


def test_nothing_is_declared_for_nothing(templates: dict[str, Template]) -> None:
    assert templates["prod"].unused() == set()


def test_what_is_private_is_reached_through_private_endpoints_alone(templates: dict[str, Template]) -> None:
    for name, template in templates.items():
        private = template.parameters["privateNetworking"]
        assert private == (name != "dev")
        access = {
            r["type"]: r["properties"]["publicNetworkAccess"]
            for r in template.resources
            if "publicNetworkAccess" in r.get("properties", {})
        }
        assert len(access) == 4 and set(access.values()) == {"Disabled" if private else "Enabled"}
        ends = [r for r in template.resources if r["type"].endswith("/privateEndpoints")]
        reached = {
            link["properties"]["privateLinkServiceId"].partition(":")[0]
            for end in ends
            for link in end["properties"]["privateLinkServiceConnections"]
        }
        assert reached == (set(access) if private else set())
        zones = {r["name"] for r in template.resources if r["type"].endswith("/privateDnsZones")}
        groups = [r for r in template.resources if r["type"].endswith("/privateDnsZoneGroups")]
        used = {
            config["properties"]["privateDnsZoneId"].partition(":")[2]
            for group in groups
            for config in group["properties"]["privateDnsZoneConfigs"]
        }
        assert used == zones and len(groups) == len(ends)


def test_keys_and_passwords_open_nothing(templates: dict[str, Template]) -> None:
    for template in templates.values():
        storage = resource_of(template, "Microsoft.Storage/storageAccounts")["properties"]
        assert not storage["allowSharedKeyAccess"] and not storage["allowBlobPublicAccess"]
        assert not resource_of(template, "Microsoft.ContainerRegistry/registries")["properties"]["adminUserEnabled"]
        assert resource_of(template, "Microsoft.KeyVault/vaults")["properties"]["enableRbacAuthorization"]
        assert resource_of(template, ML)["properties"]["systemDatastoresAuthMode"] == "Identity"


def test_idle_machines_are_given_back_and_training_is_on_spot(templates: dict[str, Template]) -> None:
    for template in templates.values():
        clusters = {
            r["name"].split("/")[1]: r["properties"] for r in template.resources if r["type"] == f"{ML}/computes"
        }
        assert set(clusters) == {"cpu-cluster", "gpu-cluster"}
        for cluster in clusters.values():
            scale = cluster["properties"]["scaleSettings"]
            assert scale["minNodeCount"] == 0 and scale["nodeIdleTimeBeforeScaleDown"] == "PT10M"
            assert cluster["disableLocalAuth"] and not cluster["properties"]["enableNodePublicIp"]
        assert clusters["gpu-cluster"]["properties"]["vmPriority"] == "LowPriority"


def test_roles_are_narrow_and_each_on_one_resource(templates: dict[str, Template]) -> None:
    roles = [r for r in templates["prod"].resources if r["type"] == "Microsoft.Authorization/roleAssignments"]
    assert len(roles) == 5 and len({r["name"] for r in roles}) == 5
    for role in roles:
        assert role["properties"]["roleDefinitionId"].rpartition("/")[2] not in TOO_MUCH
        assert role["scope"] in templates["prod"].ids and role["properties"]["principalType"] == "ServicePrincipal"


def test_logs_of_everything_that_holds_data_are_kept(templates: dict[str, Template]) -> None:
    for template in templates.values():
        kept = {r["scope"].partition(":")[0] for r in template.resources if r["type"].endswith("/diagnosticSettings")}
        assert kept == {
            ML,
            "Microsoft.KeyVault/vaults",
            "Microsoft.ContainerRegistry/registries",
            "Microsoft.Storage/storageAccounts/blobServices",
        }


def test_production_survives_the_loss_of_a_region(templates: dict[str, Template]) -> None:
    assert templates["prod"].parameters["storageSku"] in ("Standard_GRS", "Standard_GZRS", "Standard_RAGRS")


def edit(path: str, value: Any) -> Callable[[Any], None]:
    """Set a value; `Type|key.key` begins at the first resource of a type, a last part `-` removes the key."""

    def change(content: Any) -> None:
        type_, _, rest = path.rpartition("|")
        at = next(r for r in content["resources"] if r["type"].endswith(type_)) if type_ else content
        keys = rest.split(".")
        for key in keys[:-1]:
            at = at[int(key)] if isinstance(at, list) else at[key]
        if value is None:
            del at[int(keys[-1]) if isinstance(at, list) else keys[-1]]
        else:
            at[int(keys[-1]) if isinstance(at, list) else keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (edit("variables.workspaceName", None), "variable workspaceName is used and not declared"),
        (edit("parameters.cpuSize", None), "parameter cpuSize is used and not declared"),
        (edit("variables.storageName", "[format('ldm3d-{0}', parameters('environment'))]"), "may not have the name"),
        (edit("variables.vaultName", "[format('vault-of-ldm3d-{0}', uniqueString('a'))]"), "may not have the name"),
        (edit("storageAccounts|apiVersion", "2023-05-01-preview"), "is a preview"),
        (edit("storageAccounts|apiVersion", "2023-5-1"), "is no version of an API"),
        (
            edit("components|dependsOn", ["[resourceId('Microsoft.Storage/storageAccounts', 'other')]"]),
            "is not in the templ",
        ),
        (edit("components|dependsOn", []), "does not wait for it"),
        (edit("/computes|dependsOn.1", None), "does not wait for it"),
        (edit("/computes|name", "cpu-cluster"), "may not have the name"),
        (
            edit("components|properties.WorkspaceResourceId", "[resourceId('Microsoft.Web/sites', 'x')]"),
            "which is not in",
        ),
        (edit("components|properties.WorkspaceResourceId", "[resourceId('Microsoft.Web/sites')]"), "needs 1 names"),
        (
            edit("components|properties.WorkspaceResourceId", "[nonsense('x')]"),
            "is a function that these tests do not know",
        ),
        (edit("outputs.workspaceName.value", "[variables('nothing')]"), "variable nothing is used and not declared"),
        (
            edit("outputs.keyVaultUri.value", "[reference(resourceId('A.B/c', 'd'), '2023-07-01').vaultUri]"),
            "reference to",
        ),
        (edit("privateEndpoints|dependsOn.0", "nothing"), "depends on nothing"),
    ],
)
def test_a_broken_template_is_noticed(change: Callable[[Any], None], fault: str) -> None:
    broken = copy.deepcopy(TEMPLATE)
    change(broken)
    with pytest.raises(Fault, match=fault):
        check(broken, values(AZURE / "parameters.prod.json"))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"gpuMaxNodes": 99}, "out of range"),
        ({"gpuMaxNodes": "4"}, "is not int"),
        ({"gpuPriority": "Spot"}, "is not allowed"),
        ({"extra": 1}, "is not declared"),
        ({"environment": None}, "is not string"),
    ],
)
def test_broken_parameters_are_noticed(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        Template(TEMPLATE, values(AZURE / "parameters.prod.json") | given)


def test_checkov_finds_nothing_but_the_exceptions_and_finds_a_broken_template(
    templates: dict[str, Template], tmp_path: Path
) -> None:
    # checkov cannot evaluate: it is given what Azure would get.
    whole = {"$schema": TEMPLATE["$schema"], "contentVersion": "1.0.0.0", "resources": templates["prod"].resources}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    broken = copy.deepcopy(whole)
    storage = next(r for r in broken["resources"] if r["type"].endswith("storageAccounts"))
    storage["properties"]["minimumTlsVersion"] = "TLS1_0"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    skipped = ("--skip-check", ",".join(CHECKOV_EXCEPTIONS))
    done = run(
        CHECKOV, "--skip-download", "--compact", "--quiet", "--framework", "arm", "-o", "json", "-d", tmp_path, *skipped
    )
    results = json.loads(done.stdout)["results"]
    found: dict[str, set[str]] = {"/whole.json": set(), "/broken.json": set()}
    for failed in results["failed_checks"]:
        found[failed["file_path"]].add(failed["check_id"])
    assert found["/whole.json"] == set()
    assert found["/broken.json"] == {"CKV_AZURE_44"}


# --- Azure ML ---


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


def test_the_files_agree_on_names(templates: dict[str, Template], job: dict[str, Any]) -> None:
    assert list(WORKSPACES.workspaces) == list(ENVIRONMENTS)
    for name, place in WORKSPACES.workspaces.items():
        assert templates[name].outputs()["workspaceName"] == place.workspace
        assert templates[name].parameters["privateNetworking"] == place.private
    clusters = {r["name"].split("/")[1] for r in templates["prod"].resources if r["type"] == f"{ML}/computes"}
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


# --- The endpoint ---

IDENTITY = "/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i"


def entities(color: str = "green", private: bool = True) -> tuple[Any, Any]:
    config = read_config()
    return endpoint_entity(config, "dev", private, IDENTITY), deployment_entity(
        config, "dev", color, "ldm3d-diffusion:3"
    )


def test_endpoint_and_deployments_load() -> None:
    endpoint, deployment = entities()
    assert endpoint.auth_mode == "aad_token" and endpoint.public_network_access == "disabled"
    assert entities(private=False)[0].public_network_access == "enabled"
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,31}", endpoint.name) and deployment.endpoint_name == endpoint.name
    code = deployment.code_configuration
    assert (Path(code.code) / code.scoring_script).samefile(ROOT / "mlops/deployment/score.py")
    assert str(deployment.model).removeprefix("azureml:") == "ldm3d-diffusion:3"
    rest = deployment._to_rest_object(location="westeurope")
    assert rest.properties.request_settings.max_concurrent_requests_per_instance == 1


def test_autoscale_gets_what_its_template_asks_for() -> None:
    template, config = read_json(AZURE / "autoscale.json"), read_config()
    for color in COLORS:
        given = autoscale_parameters(config, "prod", "mlw-ldm3d-prod", color)["parameters"]
        made = Template(template, {name: of["value"] for name, of in given.items()})
        assert made.unused() == set()
        profile = made.resources[0]["properties"]["profiles"][0]
        assert profile["capacity"]["minimum"] == str(config.autoscale.minInstances)
        rules = {rule["scaleAction"]["direction"]: rule["metricTrigger"] for rule in profile["rules"]}
        assert rules["Increase"]["threshold"] > rules["Decrease"]["threshold"]
        assert rules["Increase"]["metricResourceUri"].endswith(f":mlw-ldm3d-prod/ldm3d-prod/{color}")


class StubClient:
    """As much of MLClient as the endpoint uses."""

    def __init__(self, answer: str = '{"volumes": [{}]}'):
        self.answer, self.endpoint, self.deployments, self.done = answer, None, {}, []
        self.online_endpoints = SimpleNamespace(
            get=self.get,
            begin_create_or_update=self.put,
            invoke=lambda name, request_file, deployment_name: self.answer,
        )
        self.online_deployments = SimpleNamespace(
            begin_create_or_update=self.deploy,
            list=lambda name: list(self.deployments.values()),
            begin_delete=self.delete,
        )

    def get(self, name: str) -> Any:
        from azure.core.exceptions import ResourceNotFoundError

        if self.endpoint is None:
            raise ResourceNotFoundError("none")
        return self.endpoint

    def put(self, endpoint: Any) -> Any:
        self.endpoint = copy.copy(endpoint)
        self.done.append(("endpoint", dict(endpoint.traffic)))
        return SimpleNamespace(result=lambda: None)

    def deploy(self, deployment: Any) -> Any:
        self.deployments[deployment.name] = deployment
        self.done.append(("deployment", deployment.name))
        return SimpleNamespace(result=lambda: None)

    def delete(self, name: str, endpoint_name: str) -> Any:
        del self.deployments[name]
        return SimpleNamespace(result=lambda: None)


def test_blue_then_green_and_back() -> None:
    client = StubClient()
    endpoint = Endpoint(client, "ldm3d-dev")
    assert endpoint.traffic() == {}
    endpoint.deploy(*entities("blue"))
    assert client.done == [("endpoint", {}), ("deployment", "blue")] and endpoint.traffic() == {}
    assert endpoint.move("blue", 100) == {"blue": 100}
    endpoint.deploy(*entities("green"))
    assert endpoint.traffic() == {"blue": 100}
    assert endpoint.move("green", 10) == {"green": 10, "blue": 90}
    with pytest.raises(ConfigError, match="answers 90 % of the requests; deploy the other color"):
        endpoint.deploy(*entities("blue"))
    with pytest.raises(ConfigError, match="answers 10 % of the requests; move the traffic first"):
        endpoint.remove("green")
    assert endpoint.move("blue", 100) == {"blue": 100}
    endpoint.remove("green")
    with pytest.raises(ConfigError, match="has no deployment green, which 50 % would go to"):
        endpoint.move("blue", 50)


@pytest.mark.parametrize("answer", ["", "[]", '{"error": "no"}', '{"volumes": []}', "Internal error"])
def test_a_deployment_that_does_not_answer_gets_no_traffic(answer: str) -> None:
    client = StubClient(answer)
    with pytest.raises(WeightsError, match="its traffic was not changed"):
        Endpoint(client, "ldm3d-dev").deploy(*entities("blue"))
    assert client.endpoint.traffic == {}


# --- deploy_azure.ps1 ---

SCRIPT = (AZURE / "deploy_azure.ps1").read_text()


def test_the_script_keeps_its_rules() -> None:
    assert powershell.faults(SCRIPT) == []


def test_the_script_has_the_three_parameters_and_names_files_that_are_there() -> None:
    assert powershell.parameters(SCRIPT) == {"Environment", "ResourceGroup", "Location"}
    allowed = re.search(r"ValidateSet\(([^)]*)\)", SCRIPT)
    assert allowed and re.findall(r"'(\w+)'", allowed[1]) == list(ENVIRONMENTS)
    for name in re.findall(r"'([\w.]+\.json)'", SCRIPT.replace("deploy infrastructure.json", "")):
        assert (AZURE / name).is_file()
    assert set(re.findall(r"\$outputs\.(\w+)\.value", SCRIPT)) == set(TEMPLATE["outputs"])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Set-StrictMode -Version Latest\n", "", "StrictMode"),
        ("$ErrorActionPreference = 'Stop'", "$ErrorActionPreference = 'Continue'", "ErrorActionPreference"),
        (
            "Test-Prerequisite\n\n$exists",
            "az group list\nTest-Prerequisite\n\n$exists",
            "az is called outside of Invoke-Az",
        ),
        ("    if ($LASTEXITCODE -ne 0) {\n", "    if ($false) {\n", "LASTEXITCODE"),
        ('        throw "az $(', '        Write-Host "az $(', "does not throw"),
        ("SupportsShouldProcess = $true, ConfirmImpact", "ConfirmImpact", "SupportsShouldProcess"),
        ("if ($WhatIfPreference) {\n    Write-Host (Inv", "if ($false) {\n    Write-Host (Inv", "what-if"),
        ("foreach ($file in @($Template", "foreach ($file in @($Template {", "cannot be parsed"),
        ("-ErrorAction SilentlyContinue)) {", "-ErrorAction SilentlyContinue)) {\n iex 'az x'", "evaluates text"),
    ],
)
def test_a_broken_script_is_noticed(old: str, new: str, fault: str) -> None:
    assert SCRIPT.count(old) == 1
    assert any(fault in found for found in powershell.faults(SCRIPT.replace(old, new)))


# --- Secrets ---


def test_no_file_holds_a_secret() -> None:
    folders = (AZURE, PIPELINES, ROOT / "mlops/deployment")
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 20
    for path in files:
        found = SECRETS.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found and found[0][:30]}"


@pytest.mark.parametrize(
    "text",
    [
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=abc==",
        "https://a.blob.core.windows.net/c?sv=2024&sig=abc",
        "InstrumentationKey=00000000-0000",
        '"adminPassword": "hunter2hunter2"',
        "-----BEGIN PRIVATE KEY-----",
        "x: " + "Ab1/" * 20 + "==",
        "client: abc8Q~" + "x" * 34,
    ],
)
def test_a_secret_would_be_noticed(text: str) -> None:
    assert SECRETS.search(text)
