"""What pipeline_config.yml may say: which data, which training, on which machines. Every key is known and typed."""

from pathlib import Path
from typing import Annotated, TypeVar

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldm3d.errors import ConfigError
from ldm3d.samplers import LARGEST_SEED
from mlops.pipelines.metrics_file import FEWEST

ROOT = Path(__file__).resolve().parents[2]
Asset = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,253}:[A-Za-z0-9][A-Za-z0-9._-]{0,29}$")]
"""`name:version`. Never a label such as `latest`: a pipeline that runs again would read other data."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,30}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Compute(Strict):
    """Clusters of the workspace, by the names that infrastructure.json gives them."""

    cpu: Name
    """Prepares the data, and asks the gate."""
    gpu: Name
    """Trains and samples; may be preempted at any time."""


class PipelineSettings(Strict):
    """A training pipeline."""

    experiment: Name
    """Experiment that the runs belong to."""
    model: Name
    """Registered name of the model; also the first part of the names of all data assets that the pipeline makes."""
    config: str
    """Training configuration, a path in the repository."""
    data: Asset
    """Raw data."""
    split: Asset | None = None
    """Split of an earlier pipeline: its cases keep their sides when the data have grown."""
    start: Asset | None = None
    """Folder with published weights to begin with; null begins from nothing."""
    gpus: Annotated[int, Field(ge=1, le=16)]
    """GPUs of a node, each with a process of its own."""
    samples: Annotated[int, Field(ge=FEWEST, le=4096)]
    """Generated volumes that the candidate is judged by. More of them find smaller differences from the champion."""
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)]
    """Of the generated volumes."""
    timeout_hours: Annotated[float, Field(gt=0, le=720)]
    """A step that runs longer is stopped."""
    shared_memory: Annotated[str, Field(pattern=r"^[1-9][0-9]*g$")]
    """For the processes that load data, as `16g`."""
    compute: Compute


class Workspace(Strict):
    """Where a workspace is."""

    resource_group: Annotated[str, Field(pattern=r"^[A-Za-z0-9._()-]{1,89}[A-Za-z0-9_()-]$")]
    workspace: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{2,32}$")]
    private: bool
    """Whether it is reached through private endpoints alone, as its parameter file says; then so is the endpoint."""


class WorkspaceSettings(Strict):
    """workspace_config.yml: the workspaces, and the environments that every one of them gets."""

    workspaces: dict[Name, Workspace]
    """By the names that deploy_azure.ps1 knows."""
    environments: tuple[str, ...]
    """Files beside it, each an Azure ML environment."""


Settings = TypeVar("Settings", bound=Strict)
WORKSPACES = ROOT / "mlops/azure/workspace_config.yml"


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Raises `ConfigError`: the file cannot be read, or holds what is not known or cannot be."""
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read_workspace(path: Path, environment: str) -> Workspace:
    """One of the workspaces of a workspace_config.yml. Raises `ConfigError`: as above, or it has none of this name."""
    workspaces = read_settings(path, WorkspaceSettings).workspaces
    if environment not in workspaces:
        raise ConfigError(f"--environment {environment}: {path} knows {', '.join(workspaces)}")
    return workspaces[environment]
