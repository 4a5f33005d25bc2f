"""The active set: which versions of which models are served, and which of them answers a request.

The worker prepares and activates it; the web process reads `active.json` and never a weights file.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError

from ldm3d.definitions import PositiveFloat, Size, Strict
from ldm3d.errors import ConfigError, UserError
from ldm3d.files import write_text
from ldm3d.samplers import choose_sampler
from ldm3d.sections import SAMPLERS, DdpmSchedule, RFlowSchedule, SamplerName
from mlops.api import schemas
from mlops.api.models_file import ModelEntry, read_models
from mlops.api.records import flush_folder
from mlops.api.settings import Settings
from mlops.api.weights_store import StoredVersion, store, store_dir, touch

BUCKETS = 10_000


class ActiveVersion(Strict):
    """One version of a model, with all that routing and checking requests needs of its weights."""

    model: str
    version: str
    digest: str
    """Of its folder in the store."""
    share: int
    """Percentage of the requests that it answers."""
    shadow: bool
    weights_sha256: dict[str, str]
    shape: Size
    """Voxels of a volume."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    schedule: Annotated[DdpmSchedule | RFlowSchedule, Field(discriminator="type")]
    """Of the training; says what samplers and steps there are."""
    conditions: dict[str, list[str]]
    trained_on: str
    num_train: int

    @property
    def name(self) -> str:
        """`model/version`, for metrics and messages."""
        return f"{self.model}/{self.version}"

    def folder(self, data_dir: Path) -> Path:
        """Where its weights are: a `model_dir` for `Sampler.from_folder`."""
        return store_dir(data_dir) / self.digest

    def default_steps(self, max_steps: int) -> dict[SamplerName, int]:
        """The samplers that can be asked for within so many steps, the default first, and the default steps of each."""
        found: dict[SamplerName, int] = {}
        for sampler in SAMPLERS[self.schedule.type]:
            wanted = min(choose_sampler(self.schedule, sampler, None)[1], max_steps)
            try:
                found[sampler] = choose_sampler(self.schedule, sampler, wanted)[1]
            except ConfigError:  # ddpm takes all steps, pndm a least number
                continue
        return found

    def info(self, settings: Settings, loaded: bool) -> schemas.VersionInfo:
        """As `GET /v1/models` shows it."""
        defaults = self.default_steps(settings.max_steps)
        return schemas.VersionInfo(
            schedulers=list(defaults),
            default_steps=next(iter(defaults.values())),
            max_steps=min(self.schedule.num_train_timesteps, settings.max_steps),
            loaded=loaded,
            **self.model_dump(exclude={"model", "digest", "schedule"}),
        )


class Assignment(NamedTuple):
    """Which version makes a job, and how it was chosen."""

    version: ActiveVersion
    assigned_by: Literal["only", "caller", "job"]


class ActiveModel(Strict):
    """One model."""

    name: str
    assign_by: Literal["caller", "job"]
    versions: list[ActiveVersion]

    def assign(self, caller_id: str, job_id: str) -> Assignment:
        """The version that answers a job.

        Callers (or jobs) fall into 10,000 buckets by their hash, another one for each model. The buckets are laid out
        over the versions in their order, so where shares change, only what lies between an old and a new boundary
        goes to another version.
        """
        answering = [version for version in self.versions if version.share]
        if len(answering) == 1:
            return Assignment(answering[0], "only")
        bucket = _bucket(self.name, caller_id if self.assign_by == "caller" else job_id)
        end = 0
        for version in answering:
            end += version.share * BUCKETS // 100
            if bucket < end:
                return Assignment(version, self.assign_by)
        raise AssertionError(f"{self.name}: shares add up to less than 100")

    def shadows(self) -> list[ActiveVersion]:
        """Versions that make what others answer as well."""
        return [version for version in self.versions if version.shadow]

    def info(self, settings: Settings, loaded: set[str]) -> schemas.ModelInfo:
        """As `GET /v1/models` shows it; `loaded` are digests of the versions in a worker's memory."""
        versions = [version.info(settings, version.digest in loaded) for version in self.versions]
        return schemas.ModelInfo(name=self.name, versions=versions)


class ActiveSet(Strict):
    """What is served now."""

    models: list[ActiveModel]
    """The first one is the default."""

    @cached_property
    def digest(self) -> str:
        """Two sets with the same digest answer every request alike."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def versions(self) -> list[ActiveVersion]:
        return [version for model in self.models for version in model.versions]

    @property
    def digests(self) -> set[str]:
        """Of all versions, as `prune` is to keep them."""
        return {version.digest for version in self.versions}

    def model(self, name: str) -> ActiveModel | None:
        return next((model for model in self.models if model.name == name), None)


def prepare(models_file: Path, settings: Settings) -> ActiveSet:
    """Store all weights that `models.yaml` names, and describe the set that would be served. Nothing is activated.

    Raises:
        ConfigError: the file cannot be used.
        WeightsError: so cannot a version's weights; the first such version is named.
        OutputError: the weights cannot be stored.
    """
    entries = read_models(models_file).models
    return ActiveSet(models=[_prepared(models_file, name, entry, settings) for name, entry in entries.items()])


def _prepared(models_file: Path, name: str, entry: ModelEntry, settings: Settings) -> ActiveModel:
    versions = []
    for version, given in entry.versions.items():
        try:
            stored = store(given.weights, settings.data_dir, settings.max_voxels)
        except UserError as error:
            place = f"{models_file}: models.{name}.versions.{version}.weights {given.weights!r}"
            raise type(error)(f"{place}: {error.one_line()}") from error
        versions.append(_described(name, version, entry.share(version), given.shadow, stored))
    return ActiveModel(name=name, assign_by=entry.assign, versions=versions)


def _described(model: str, version: str, share: int, shadow: bool, stored: StoredVersion) -> ActiveVersion:
    return ActiveVersion(
        model=model,
        version=version,
        digest=stored.digest,
        share=share,
        shadow=shadow,
        weights_sha256=stored.weights_sha256,
        shape=stored.shape,
        spacing_mm=stored.card.spacing,
        schedule=stored.card.schedule,
        conditions=stored.card.conditioning,
        trained_on=stored.card.trained_on,
        num_train=stored.card.num_train,
    )


def _bucket(model: str, who: str) -> int:
    digest = hashlib.sha256(f"{model}\0{who}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def active_path(data_dir: Path) -> Path:
    return data_dir / "active.json"


def activate(active: ActiveSet, data_dir: Path) -> None:
    """Serve this set from now on. Versions of the set before stay in the store for a while, for requests on their way.

    Raises:
        OutputError: the set cannot be written; what was served before still is.
    """
    try:
        before = read_active(data_dir)
    except ConfigError:  # damaged; replaced now
        before = None
    for digest in active.digests | (before.digests if before else set()):
        touch(data_dir, digest)
    write_text(active_path(data_dir), active.model_dump_json(indent=1) + "\n")
    flush_folder(data_dir)


def read_active(data_dir: Path) -> ActiveSet | None:
    """What is served; None where nothing was activated yet.

    Raises:
        ConfigError: `active.json` is not what the service wrote.
    """
    path = active_path(data_dir)
    try:
        return ActiveSet.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(f"{path}: is not what the service wrote ({reason}); remove it and start again") from error


class Catalogue:
    """The active set as the web process sees it: read again only when it was replaced."""

    def __init__(self, data_dir: Path):
        self.data_dir = data_dir
        self._path = active_path(data_dir)
        self._held: tuple[tuple[int, int, int], ActiveSet | None] = ((0, 0, 0), None)

    def read(self) -> ActiveSet | None:
        """The set now, for the whole of one request: take it once and use that.

        Raises:
            ConfigError: as `read_active`.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        held, active = self._held
        if stamp != held:
            # Replaced again since the look above, it is newer than its stamp, and is read again next time.
            active = read_active(self.data_dir)
            self._held = (stamp, active)
        return active
