"""The online endpoint: entities as azure-ai-ml reads them, and blue and green against a stub of the client."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from arm import Template, read_json
from programs import ROOT

from ldm3d.errors import ConfigError, WeightsError
from mlops.commands import run_command
from mlops.deployment import endpoint as command
from mlops.deployment.endpoint import (
    COLORS,
    Endpoint,
    autoscale_parameters,
    deployment_entity,
    endpoint_entity,
    read_config,
)

AZURE = ROOT / "mlops/azure"

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


@pytest.mark.parametrize("action", ["show", "traffic", "deploy", "remove"])
def test_what_azure_refuses_is_said_in_one_line(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from azure.core.exceptions import HttpResponseError

    def refused(*_: object, **__: object) -> None:
        raise HttpResponseError("(Forbidden) not you\nand much more")

    client = StubClient()
    for operations in (client.online_endpoints, client.online_deployments):
        vars(operations).update(dict.fromkeys(vars(operations), refused))
    monkeypatch.setattr(command, "connect", lambda workspace: client)
    more = {
        "traffic": ["--color", "blue", "--percent", "100"],
        "deploy": ["--color", "blue", "--model", "m:1", "--identity", IDENTITY],
        "remove": ["--color", "blue"],
    }
    monkeypatch.setattr("sys.argv", ["endpoint", action, *more.get(action, [])])
    with pytest.raises(SystemExit) as ended:
        run_command(command.main)
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {action} failed: (Forbidden) not you\n")
