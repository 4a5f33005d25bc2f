"""What an operator can set: environment variables `LDM3D_...`, each with its default, unit and effect."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ldm3d.errors import ConfigError

PREFIX = "LDM3D_"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """The service's settings. Both processes, web and worker, read the same."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    # Where.
    data_dir: Path = Path("service_data")
    """Everything that the service writes: queue, jobs, keys, audit log, copies of weights."""
    models_file: Path = Path("mlops/api/models.yaml")
    """Which models are served."""
    queue_url: str = ""
    """`redis://host:6379/0` for several replicas; empty for an SQLite file in `data_dir`."""
    host: str = "127.0.0.1"
    """Address to listen at. Another than loopback needs keys or OIDC."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 for any that is free."""
    root_path: Annotated[str, Field(pattern=r"^(/[\w.~-]+)*$")] = ""
    """Path under which a proxy serves this service, `/brains`."""
    trusted_hosts: Annotated[list[str], NoDecode] = []
    """Names by which clients reach the service, separated by commas; empty for any (without keys: loopback's only)."""
    trusted_proxies: str = "127.0.0.1"
    """Addresses of proxies whose X-Forwarded headers count, separated by commas."""
    cors_origins: Annotated[list[str], NoDecode] = []
    """Origins of foreign pages that may call the service, separated by commas; none by default."""

    # Who.
    oidc_issuer: str = ""
    """Address of an identity provider whose bearer tokens count as well as API keys; empty for none."""
    oidc_audience: str = "ldm3d"
    """What the tokens' `aud` must name."""
    oidc_roles_claim: str = "roles"
    """Claim that holds viewer, operator or admin; dots go into nested claims."""

    # How much.
    max_num: PositiveInt = 64
    """Volumes of one request."""
    max_steps: PositiveInt = 1000
    """Network evaluations for a volume."""
    max_voxels: PositiveInt = 512**3
    """Voxels of a volume; models that make larger ones are not served."""
    max_body_bytes: PositiveInt = 64 * 1024
    """Size of a request's body."""
    max_jobs_per_caller: PositiveInt = 20
    """Jobs of one caller that wait or run."""
    max_queue: PositiveInt = 100
    """Jobs of everybody that wait or run."""
    requests_per_minute: PositiveInt = 6000
    """Requests of one caller, to all routes together."""
    max_wait_seconds: NonNegativeFloat = 120
    """How long `?wait=` may hold a request."""
    max_streams: PositiveInt = 200
    """Waiting requests and event streams at once on one web process; one caller may have half of them."""
    request_seconds: PositiveFloat = 30
    """Time within which a client must have sent its request."""
    retention_minutes: PositiveFloat = 24 * 60
    """Finished jobs are removed after this time."""
    max_disk_gib: PositiveFloat = 20
    """Room for results; the oldest finished jobs go first."""

    # How.
    device: str = ""
    """`cpu`, `cuda` or `cuda:1`; empty for the GPU if there is one."""
    max_batch: PositiveInt = 4
    """Volumes that are sampled together."""
    memory_gib: PositiveFloat | None = None
    """Memory for sampling and decoding; empty for what is free when weights are loaded."""
    idle_minutes: NonNegativeFloat = 10
    """The worker gives the device back after this time without a job; 0 keeps it."""
    job_seconds: PositiveFloat = 3600
    """A job that runs longer has failed."""
    workers: NonNegativeInt = 1
    """Worker processes that `api_server.py` starts beside the web process; 0 where they run elsewhere."""
    worker_metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port at which a worker that runs by itself serves its metrics; 0 for none."""
    audit_dir: Path | None = None
    """The audit log; `audit` in `data_dir` by default. Machines that share a data folder need one each."""
    audit_max_mib: PositiveFloat = 64
    """The audit log begins a new file beyond this size."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: dict[str, object]) -> dict[str, object]:
        for name in ("trusted_hosts", "cors_origins"):
            if isinstance(text := values.get(name), str):
                values[name] = [part.strip() for part in text.split(",") if part.strip()]
        return values

    @model_validator(mode="after")
    def _origins(self) -> Self:
        if "*" in self.cors_origins:
            raise ValueError("cors_origins: name the origins; * would let every page call the service")
        return self

    @property
    def audit_folder(self) -> Path:
        return self.audit_dir or self.data_dir / "audit"

    @property
    def loopback_only(self) -> bool:
        return self.host in LOOPBACK


def load_settings(**given: object) -> Settings:
    """Settings from the environment; `given` ones, as of a command line, come first.

    Raises:
        ConfigError: a variable cannot be used, or is not known.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, 1)
            raise ConfigError(f"{variable}: no such setting{f'; did you mean {near[0]}?' if near else ''}")
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigError(f"{name}: {first['msg']} (given: {first['input']!r})") from error
