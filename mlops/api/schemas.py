"""What goes over the wire: requests and answers of the API, as OpenAPI shows them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ldm3d.samplers import LARGEST_SEED
from ldm3d.sections import SamplerName

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[JobState, ...] = ("done", "failed", "cancelled")
FileFormat = Literal["nii.gz", "nii"]

EXAMPLE_ID = "01m80t02dd37j2sb08htke4xmw"
JobId = Annotated[str, Field(pattern=r"^[0-9a-hjkmnp-tv-z]{26}$", description="Sorts by time of creation.")]
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


def _whole(value: object) -> object:
    """JSON has one kind of number: 2.0 is 2, and some clients write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SampleRequest(Wire):
    """What to generate. The same request gives the same bytes."""

    num: Annotated[int, Field(ge=1, strict=True, description="Number of volumes."), Whole] = 1
    seed: Annotated[
        int, Field(ge=0, le=LARGEST_SEED, strict=True, description="The same seed gives the same volumes."), Whole
    ] = 0
    steps: Annotated[
        int | None,
        Field(ge=1, strict=True, description="Network evaluations for a volume; the model's default."),
        Whole,
    ] = None
    scheduler: Annotated[SamplerName | None, Field(description="As far as the model's training allows.")] = None
    model: Annotated[ModelName | None, Field(description="Of `GET /v1/models`; the first one listed there.")] = None
    format: Annotated[FileFormat, Field(description="Compressed or not.")] = "nii.gz"
    dtype: Annotated[
        Literal["float32", "int16"], Field(description="How voxels are stored; int16 takes half the room.")
    ] = "float32"
    conditions: Annotated[
        dict[str, str], Field(description="Conditions and their values, as far as the model offers them.")
    ] = {}

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"num": 1, "seed": 7}, {"num": 4, "seed": 1, "steps": 10, "dtype": "int16"}]}
    )


class ResolvedRequest(Wire):
    """A request with everything that it left open decided: what a worker carries out."""

    num: int
    seed: int
    steps: int
    scheduler: SamplerName
    model: str
    format: FileFormat
    dtype: Literal["float32", "int16"]
    conditions: dict[str, str]


class Progress(Wire):
    """How far a running job is."""

    done: int = Field(description="Volumes that are finished.")
    total: int = Field(description="Volumes that were asked for.")
    share: float = Field(ge=0, le=1, description="Of the work, 0 to 1.")
    seconds_left: float | None = Field(description="Estimate; null where there is none yet.")


class FileInfo(Wire):
    name: str
    bytes: int
    media_type: str
    sha256: str


EXAMPLE_JOB: dict[str, Any] = {
    "id": EXAMPLE_ID,
    "state": "running",
    "created": "2026-11-22T10:30:00.416015Z",
    "started": "2026-11-22T10:30:00.613681Z",
    "finished": None,
    "expires": None,
    "place": None,
    "progress": {"done": 1, "total": 4, "share": 0.31, "seconds_left": 20.3},
    "error": None,
    "request": {
        "num": 4,
        "seed": 7,
        "steps": 30,
        "scheduler": "rflow",
        "model": "demo",
        "format": "nii.gz",
        "dtype": "float32",
        "conditions": {},
    },
    "version": "1",
    "assigned_by": "only",
    "weights_sha256": {"autoencoder.safetensors": "8be59797...", "diffusion_unet.safetensors": "25d37ac6..."},
    "files": [],
}


class Job(Wire):
    """A request on its way."""

    id: JobId
    state: JobState
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    expires: datetime | None = Field(None, description="When a finished job is removed.")
    place: int | None = Field(None, description="Place in the queue, from 1; null unless the job waits.")
    progress: Progress | None = None
    error: str | None = Field(None, description="Why it failed.")
    request: ResolvedRequest
    version: str = Field(description="Which version of the model makes it.")
    assigned_by: Literal["only", "caller", "job"] = Field(description="How the version was chosen.")
    weights_sha256: dict[str, str] = Field(description="Digests of the weights' files.")
    files: list[FileInfo] = Field([], description="Under `/v1/jobs/{id}/files/`, once it is done.")

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_JOB]})


class JobPage(Wire):
    """Jobs of the caller, newest first."""

    jobs: list[Job]
    next: JobId | None = Field(description="Value of `before` for the next page; null on the last.")


class VersionInfo(Wire):
    """One version of a model: what it makes, and what may be asked of it."""

    version: str
    share: int = Field(ge=0, le=100, description="Percentage of the requests that it answers.")
    shadow: bool = Field(description="Also makes what others answer, to be compared; nobody sees its volumes.")
    weights_sha256: dict[str, str]
    shape: tuple[int, int, int] = Field(description="Voxels of a volume.")
    spacing_mm: tuple[float, float, float]
    schedulers: list[SamplerName] = Field(description="Which may be asked for; the first is the default.")
    default_steps: int
    max_steps: int
    conditions: dict[str, list[str]] = Field(description="Conditions and the values that each may have.")
    trained_on: str = Field(description="Digest of the training volumes.")
    num_train: int = Field(description="Number of training volumes.")
    loaded: bool = Field(description="Whether a worker has it in memory.")


class ModelInfo(Wire):
    name: ModelName
    versions: list[VersionInfo]


class Limits(Wire):
    max_num: int
    max_steps: int
    max_voxels: int
    max_jobs_per_caller: int
    requests_per_minute: int
    max_wait_seconds: float
    retention_minutes: float


class Catalogue(Wire):
    models: list[ModelInfo]
    limits: Limits


class Me(Wire):
    id: str
    name: str
    role: Literal["viewer", "operator", "admin"]

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "key:q3k9x0ab", "name": "scanner 2", "role": "operator"}]}
    )


class ReloadResult(Wire):
    """What a reload came to."""

    state: Literal["active", "failed", "pending"]
    versions: list[str] = Field(description="`model/version`, of what is served now.")
    error: str | None = Field(None, description="Which version cannot be served, and why.")

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"state": "active", "versions": ["demo/1", "demo/2"], "error": None}]}
    )


class Health(Wire):
    status: Literal["alive"] = "alive"


class Readiness(Wire):
    ready: bool
    checks: dict[str, str] = Field(description="`ok`, or what is wrong.")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[dict[str, Any]] = Field([], description="For each field at fault: `field`, a path, and `message`.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Cannot be used",
                    "status": 422,
                    "detail": "steps 5000: must be between 1 and 1000",
                    "errors": [{"field": "steps", "message": "steps 5000: must be between 1 and 1000"}],
                }
            ]
        }
    )
