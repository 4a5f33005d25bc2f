"""The Azure ML workspace: how it is reached, and tags on the assets that a pipeline has made. Never a secret in a file.

Who may do what is decided by the identity: a person's login, or the managed identity of the cluster.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ldm3d.errors import ConfigError
from mlops.pipelines.settings import Workspace

if TYPE_CHECKING:  # it reads weights, which whoever only submits a pipeline need not be able to
    from mlops.pipelines.lineage import Lineage

SUBSCRIPTION = "AZURE_SUBSCRIPTION_ID"
IN_A_JOB = ("AZUREML_ARM_SUBSCRIPTION", "AZUREML_ARM_RESOURCEGROUP", "AZUREML_ARM_WORKSPACE_NAME")
"""Azure ML sets these in every job."""
NOT_INSTALLED = (
    "azure-ai-ml is not installed in this environment; mlops/azure/README.md, section The pipeline, says how to make "
    "one that has it"
)


def connect(workspace: Workspace) -> Any:
    """An `MLClient` of a workspace, with whatever login or managed identity is there.

    Raises:
        ConfigError: the subscription is not said.
    """
    subscription = os.environ.get(SUBSCRIPTION)
    if not subscription:
        raise ConfigError(f"{SUBSCRIPTION} is not set: it must say in which subscription the workspace is")
    return _client(subscription, workspace.resource_group, workspace.workspace)


def connect_from_job() -> Any:
    """An `MLClient` of the workspace that this job runs in; None outside of Azure ML."""
    values = [os.environ.get(name, "") for name in IN_A_JOB]
    return _client(*values) if all(values) else None


def _client(*place: str) -> Any:
    try:
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential
    except ImportError as error:
        raise ConfigError(NOT_INSTALLED) from error
    return MLClient(DefaultAzureCredential(), *place)


def tag_assets(client: Any, lineages: "Iterable[Lineage]") -> None:
    """Put what each asset is made of on the asset itself, where a search in the workspace finds it.

    Raises:
        ConfigError: the workspace lacks an asset, or does not let it be tagged.
    """
    for lineage in lineages:
        with azure_errors(f"data asset {lineage.name}:{lineage.version} cannot be tagged"):
            asset = client.data.get(lineage.name, lineage.version)
            asset.tags = {**(asset.tags or {}), **lineage.tags()}
            client.data.create_or_update(asset)


@contextmanager
def azure_errors(failed: str) -> Iterator[None]:
    """Raises `ConfigError`, with `failed` before it, for what Azure answers or the login lacks."""
    from azure.core.exceptions import AzureError

    try:
        yield
    except AzureError as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(f"{failed}: {reason}") from error
