"""The managed online endpoint on Azure ML: two deployments, of which one answers while the next version is tried.

python -m mlops.deployment.endpoint show --environment dev
python -m mlops.deployment.endpoint deploy --environment dev --color green --model ldm3d-diffusion:3 --identity ID
python -m mlops.deployment.endpoint traffic --environment dev --color green --percent 10
python -m mlops.deployment.endpoint remove --environment dev --color blue

`--workspaces` names another list of workspaces than mlops/azure/workspace_config.yml.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from ldm3d.errors import ConfigError, WeightsError
from mlops.commands import Parser, run_command
from mlops.pipelines.settings import WORKSPACES, Strict, read_settings, read_workspace
from mlops.pipelines.workspace import azure_errors, connect

CONFIG = Path(__file__).with_name("deployment_config.yml")
COLORS = ("blue", "green")
SMOKE = {"num": 1, "seed": 0, "steps": 2}
"""What a new deployment must answer before it gets traffic."""


class Autoscale(Strict):
    """Parameters of mlops/azure/autoscale.json."""

    metric: Literal["CpuUtilizationPercentage", "GpuUtilizationPercentage"]
    minInstances: int
    maxInstances: int
    scaleOutAbove: int
    scaleInBelow: int


class DeploymentConfig(Strict):
    """deployment_config.yml."""

    endpoint: dict[str, Any]
    deployments: dict[str, Any]
    autoscale: Autoscale


def read_config(path: Path = CONFIG) -> DeploymentConfig:
    """Raises `ConfigError`."""
    return read_settings(path, DeploymentConfig)


def endpoint_entity(config: DeploymentConfig, environment: str, private: bool, identity: str) -> Any:
    """An Azure ML endpoint; names of endpoints are unique in a region, so the environment's is part of it."""
    from azure.ai.ml import load_online_endpoint

    content = {
        **config.endpoint,
        "name": f"{config.endpoint['name']}-{environment}",
        "public_network_access": "disabled" if private else "enabled",
    }
    content["identity"] = {**content["identity"], "user_assigned_identities": [{"resource_id": identity}]}
    return load_online_endpoint(io.StringIO(yaml.safe_dump(content)), relative_origin=str(CONFIG))


def deployment_entity(config: DeploymentConfig, environment: str, color: str, model: str) -> Any:
    """An Azure ML deployment of `model`, a registered `name:version`."""
    from azure.ai.ml import load_online_deployment

    code = config.deployments["code_configuration"]
    content = {
        **config.deployments,
        "code_configuration": {**code, "code": str((CONFIG.parent / code["code"]).resolve())},
        "name": color,
        "endpoint_name": f"{config.endpoint['name']}-{environment}",
        "model": f"azureml:{model}",
    }
    return load_online_deployment(io.StringIO(yaml.safe_dump(content)), relative_origin=str(CONFIG))


def autoscale_parameters(config: DeploymentConfig, environment: str, workspace: str, color: str) -> dict[str, Any]:
    """The parameter file for autoscale.json."""
    values = {
        "workspaceName": workspace,
        "endpointName": f"{config.endpoint['name']}-{environment}",
        "deploymentName": color,
        **config.autoscale.model_dump(),
    }
    return {
        "$schema": "https://schema.management.azure.com/schemas/2019-04-01/deploymentParameters.json#",
        "contentVersion": "1.0.0.0",
        "parameters": {name: {"value": value} for name, value in values.items()},
    }


class Endpoint:
    """What is done to the endpoint of a workspace.

    Args:
        client: `MLClient`.
        name: of the endpoint.
    """

    def __init__(self, client: Any, name: str):
        self.client, self.name = client, name

    def traffic(self) -> dict[str, int]:
        """Percent of the requests by deployment; nothing where there is no endpoint yet."""
        from azure.core.exceptions import ResourceNotFoundError

        try:
            return dict(self.client.online_endpoints.get(self.name).traffic or {})
        except ResourceNotFoundError:
            return {}

    def deploy(self, endpoint: Any, deployment: Any) -> None:
        """Create or change the endpoint, and a deployment that gets no traffic; then ask it for a volume.

        Raises:
            ConfigError: the deployment answers requests now: the other one is to be replaced.
            WeightsError: it does not answer with a volume; traffic is as it was.
        """
        before = self.traffic()
        if before.get(deployment.name):
            raise ConfigError(
                f"{deployment.name} answers {before[deployment.name]} % of the requests; deploy the other color, and "
                "move the traffic when it works"
            )
        # An update without traffic in it would take all traffic away.
        endpoint.traffic = before
        self.client.online_endpoints.begin_create_or_update(endpoint).result()
        self.client.online_deployments.begin_create_or_update(deployment).result()
        self.try_out(deployment.name)

    def try_out(self, color: str) -> None:
        """Raises `WeightsError` where a deployment does not answer with a volume."""
        with tempfile.TemporaryDirectory() as folder:
            request = Path(folder) / "request.json"
            request.write_text(json.dumps(SMOKE), encoding="utf-8")
            said = self.client.online_endpoints.invoke(self.name, request_file=str(request), deployment_name=color)
        try:
            volumes = json.loads(said)["volumes"]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{self.name}/{color} answers {said[:200]!r}; its traffic was not changed") from error
        if len(volumes) != SMOKE["num"]:
            raise WeightsError(f"{self.name}/{color} answers with {len(volumes)} volumes; its traffic was not changed")

    def move(self, color: str, percent: int) -> dict[str, int]:
        """Give a deployment so many percent of the requests, and the other one the rest.

        Raises:
            ConfigError: there is no such deployment, or none that could have the rest.
        """
        endpoint = self.client.online_endpoints.get(self.name)
        there = {deployment.name for deployment in self.client.online_deployments.list(self.name)}
        other = next(name for name in COLORS if name != color)
        shares = {name: share for name, share in ((color, percent), (other, 100 - percent)) if share}
        missing = sorted(shares.keys() - there)
        if missing:
            raise ConfigError(f"{self.name} has no deployment {missing[0]}, which {shares[missing[0]]} % would go to")
        endpoint.traffic = shares
        self.client.online_endpoints.begin_create_or_update(endpoint).result()
        return shares

    def remove(self, color: str) -> None:
        """Raises `ConfigError` where it still gets requests."""
        share = self.traffic().get(color)
        if share:
            raise ConfigError(f"{color} answers {share} % of the requests; move the traffic first")
        self.client.online_deployments.begin_delete(name=color, endpoint_name=self.name).result()


def main() -> int:
    args = parse()
    config, workspace = read_config(), read_workspace(args.workspaces, args.environment)
    if args.action == "autoscale":
        print(json.dumps(autoscale_parameters(config, args.environment, workspace.workspace, args.color), indent=2))
        return 0
    endpoint = Endpoint(connect(workspace), f"{config.endpoint['name']}-{args.environment}")
    with azure_errors(f"{args.action} failed"):
        if args.action == "deploy":
            endpoint.deploy(
                endpoint_entity(config, args.environment, workspace.private, args.identity),
                deployment_entity(config, args.environment, args.color, args.model),
            )
        elif args.action == "traffic":
            endpoint.move(args.color, args.percent)
        elif args.action == "remove":
            endpoint.remove(args.color)
        print(json.dumps({"endpoint": endpoint.name, "traffic": endpoint.traffic()}))
    return 0


def percent(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 100")
    return int(text)


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.deployment.endpoint", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    texts = {
        "show": "say where the traffic goes",
        "deploy": "make a deployment without traffic, and try it out",
        "traffic": "give a deployment a share of the requests; 100 to the one before rolls back",
        "autoscale": "print the parameters for autoscale.json",
        "remove": "remove a deployment without traffic",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--environment", default="dev", help="which of the workspaces")
        action.add_argument("--workspaces", type=Path, default=WORKSPACES, help="the list of workspaces")
        if name != "show":
            action.add_argument("--color", choices=COLORS, required=True, help="of the deployment")
        if name == "deploy":
            action.add_argument("--model", required=True, help="registered model, name:version")
            action.add_argument("--identity", required=True, help="endpointIdentityId of infrastructure.json's outputs")
        if name == "traffic":
            action.add_argument("--percent", type=percent, required=True, help="share of the requests")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
