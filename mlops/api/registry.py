"""Weights from an MLflow registry, as `ldm3d.mlflow_tracking` registers them at the end of a training."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm3d.errors import ConfigError, WeightsError
from ldm3d.files import sha256
from mlops.api.models_file import RegistryVersion

URI = "MLFLOW_TRACKING_URI"
SUFFIX = "-diffusion"
"""A version of this model holds both networks; `tracking.mlflow_model` of the training is the name before it."""
# MLflow's own patience, minutes for each call, would hold a reload.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Set where the environment does not say otherwise."""


def mlflow_client() -> tuple[str, Any]:
    """The server's address, and MLflow, told to give up after seconds.

    Raises:
        ConfigError: MLflow is not installed, or MLFLOW_TRACKING_URI is not set.
    """
    uri = os.environ.get(URI)
    if not uri:
        raise ConfigError(f"{URI} is not set: it must name the MLflow server, as http://127.0.0.1:5000")
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise ConfigError("MLflow is not installed: pip install mlflow") from error
    return uri, mlflow


def download(wanted: RegistryVersion, files: Sequence[str], folder: Path) -> Path:
    """Download the published weights of a registered version.

    Args:
        wanted: the model by the training's `tracking.mlflow_model` or by its registered name, which ends in
            `-diffusion`; with an alias or a number.
        files: which of its files; the last one's digest is the version's tag `sha256`.
        folder: where to; made here.

    Returns:
        Folder with the files.

    Raises:
        ConfigError: MLflow is not installed, or MLFLOW_TRACKING_URI is not set.
        WeightsError: the registry does not answer, does not know the version, or sends other files than were
            registered.
    """
    uri, mlflow = mlflow_client()
    try:
        version = _find(mlflow.MlflowClient(uri, uri), wanted)
        folder.mkdir()
        for name in files:
            address = f"{version.source.rstrip('/')}/{name}"
            mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=str(folder), tracking_uri=uri)
    except Exception as error:  # each kind of server and store raises its own
        raise WeightsError(f"MLflow at {_public(uri)} does not give it: {_reason(error, uri)}") from error
    registered = version.tags.get("sha256")
    if registered and registered != sha256(folder / files[-1]):
        raise WeightsError(f"MLflow at {_public(uri)} gives another {files[-1]} than was registered; register it again")
    return folder


def _find(client: Any, wanted: RegistryVersion) -> Any:
    name = wanted.name.removesuffix(SUFFIX) + SUFFIX
    if wanted.alias:
        return client.get_model_version_by_alias(name, wanted.alias)
    return client.get_model_version(name, wanted.version)


def _public(uri: str) -> str:
    """The address without name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def _reason(error: Exception, uri: str) -> str:
    """The first line of what may be a page."""
    line = (str(error).splitlines() or [""])[0].replace(uri, _public(uri))
    return f"{type(error).__name__}: {line[:200]}"
