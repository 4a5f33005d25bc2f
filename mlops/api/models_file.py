"""`models.yaml`: which versions of which models are served, and whose requests each of them answers."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml  # type: ignore[import-untyped]
from pydantic import Field, ValidationError, field_validator, model_validator

from ldm3d.definitions import Strict
from ldm3d.errors import ConfigError
from mlops.api.schemas import ModelName

MAX_BYTES = 64 * 1024
MLFLOW = "mlflow:"

VersionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class RegistryVersion(NamedTuple):
    """A version of a model in an MLflow registry."""

    name: str
    alias: str
    """Empty where `version` says which."""
    version: str


def registry_version(weights: str) -> RegistryVersion | None:
    """What `mlflow:NAME@ALIAS` or `mlflow:NAME/VERSION` names; None for a folder.

    Raises:
        ValueError: it begins with `mlflow:` and goes on otherwise.
    """
    if not weights.startswith(MLFLOW):
        return None
    found = re.fullmatch(r"([\w.-][\w. -]*)(?:@([\w.-]+)|/(\d+))", weights.removeprefix(MLFLOW), re.ASCII)
    if not found:
        raise ValueError("must be mlflow:NAME@ALIAS or mlflow:NAME/VERSION, as mlflow:ldm3d@champion or mlflow:ldm3d/3")
    return RegistryVersion(found[1], found[2] or "", found[3] or "")


class VersionEntry(Strict):
    """One version of a model."""

    weights: Annotated[str, Field(min_length=1)]
    """A folder with published weights, relative to the current folder; or a version in an MLflow registry."""
    share: Annotated[int, Field(ge=0, le=100)] | None = None
    """Percentage of the requests that it answers; the only version that answers may leave it out."""
    shadow: bool = False
    """Makes what others answer as well, to be compared; nobody sees its volumes."""

    @field_validator("weights")
    @classmethod
    def _known_form(cls, weights: str) -> str:
        registry_version(weights)
        return weights

    @model_validator(mode="after")
    def _shadows_answer_nothing(self) -> Self:
        if self.shadow and self.share is not None:
            raise ValueError("a shadow answers no requests: leave out its share, or its shadow")
        return self


class ModelEntry(Strict):
    """One model: versions that answer the same requests."""

    assign: Literal["caller", "job"] = "caller"
    """By whose hash a version is chosen: a caller keeps its version, or each job gets one."""
    versions: Annotated[dict[VersionName, VersionEntry], Field(min_length=1)]
    """In the order in which their shares are laid out."""

    @model_validator(mode="after")
    def _shares_make_a_whole(self) -> Self:
        shares = [entry.share for entry in self.versions.values() if not entry.shadow]
        if not shares:
            raise ValueError("every version is a shadow: one must answer the requests")
        if shares != [None] and sum(share or 0 for share in shares) != 100:
            given = " + ".join("none" if share is None else str(share) for share in shares)
            raise ValueError(f"the shares of versions that are no shadows must add up to 100, not {given}")
        return self

    def share(self, version: str) -> int:
        """Percentage of the requests that a version answers."""
        entry = self.versions[version]
        if entry.shadow:
            return 0
        return 100 if entry.share is None else entry.share


class ModelsFile(Strict):
    """The whole file."""

    models: Annotated[dict[ModelName, ModelEntry], Field(min_length=1)]
    """The first one is the default."""


def read_models(path: Path) -> ModelsFile:
    """Read and check `models.yaml`.

    Raises:
        ConfigError: it is missing, too large, not YAML, or says something that cannot be; names file, key and value.
    """
    content = _parse(path, _text(path))
    try:
        return ModelsFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from error


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); name the list of models as LDM3D_MODELS_FILE"
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES // 1024} KiB; that is no list of models")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml tells mypy no types
    """PyYAML's safe loader without aliases, which can stand for far more than they are, and without doubled keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*) in line {self.peek_event().start_mark.line + 1}: write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise yaml.YAMLError(f"{name!r} twice in line {node.start_mark.line + 1} and what follows")
        return super().construct_mapping(node, deep)


def _parse(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; that is no list of models") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise ConfigError(f"{path}: is not usable YAML: {' '.join(str(error).split())}") from error


def _first(error: ValidationError) -> str:
    """The first mistake: key, what is wrong, what was given."""
    first = error.errors(include_url=False)[0]
    keys = [str(part) for part in first["loc"] if part != "[key]"]
    place = ".".join(key if key.isprintable() else ascii(key) for key in keys) or "the file"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{place}: {message}"
    quotes = '; names need quotes: "1"' if first["loc"] and first["loc"][-1] == "[key]" else ""
    return f"{place}: {message} (given: {_short(first['input'])}){quotes}"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
