"""What is kept of a job, and files that are made once and read often."""

import hashlib
import json
import os
import secrets
import time
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mlops.api.schemas import FileInfo, JobState, ResolvedRequest

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


class Record(BaseModel):
    """What was accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    caller: str
    created: datetime
    request: ResolvedRequest
    version: str
    digest: str
    """Of the version's weights: which stored copy makes it, whatever the version's name stands for later."""
    assigned_by: str
    weights_sha256: dict[str, str]
    result_bytes: int
    """Room that its volumes may take."""
    shadow_of: str | None = None
    """The job whose request it repeats, to compare versions; nobody sees it."""


class Outcome(BaseModel):
    """How a job ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: JobState
    finished: datetime
    started: datetime | None = None
    error: str | None = None
    files: list[FileInfo] = []


def read_record(path: Path) -> Record | None:
    """A job's `job.json`; None where there is none (any more)."""
    try:
        return _record(path, path.stat().st_mtime_ns)
    except (OSError, ValidationError):
        return None


def read_outcome(path: Path) -> Outcome | None:
    """A job's `outcome.json`; None where there is none."""
    try:
        return _outcome(path, path.stat().st_mtime_ns)
    except (OSError, ValidationError):
        return None


@lru_cache(maxsize=1024)
def _record(path: Path, changed: int) -> Record:
    return Record.model_validate_json(path.read_bytes())


@lru_cache(maxsize=1024)  # of 64 volumes it takes 100 KB
def _outcome(path: Path, changed: int) -> Outcome:
    return Outcome.model_validate_json(path.read_bytes())


def create_once(path: Path, content: str, mode: int = 0o666) -> bool:
    """Make a file that is whole and on disk; False if it is there already, or its folder is not."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def flush_folder(folder: Path) -> None:
    """Make names in a folder outlast a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def age_seconds(path: Path) -> float:
    try:
        return datetime.now(UTC).timestamp() - path.stat().st_mtime
    except OSError:
        return 0.0


def new_job_id() -> str:
    """26 letters and digits: milliseconds since 1970, then 80 random bits; sorts by time (a ULID, in lower case)."""
    value = int(time.time() * 1000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -5, -5))
