"""mlops/azure's ARM templates, evaluated by our own reading and judged by checkov; broken copies are noticed."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arm import Fault, Template, read_json, values
from programs import CHECKOV, ROOT, run

AZURE = ROOT / "mlops/azure"
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
