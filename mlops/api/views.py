"""A job as its caller sees it, from what is kept of it."""

from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlops.api.records import Record, read_outcome, read_record
from mlops.api.schemas import Job, Progress


def waiting(record: Record, place: int | None) -> Job:
    """A job that waits, at this place in the queue."""
    return Job(**_facts(record), state="queued", place=place)


def under_way(record: Record, started: str, progress: dict[str, Any] | None) -> Job:
    """A job that a worker has."""
    facts = _facts(record) | {"progress": Progress(**progress) if progress else None}
    return Job.model_validate(facts | {"state": "running", "started": started})


@lru_cache(maxsize=1024)
def ended(folder: Path, changed: int, retention: timedelta) -> Job:
    """A job that has ended, which never changes again.

    Args:
        folder: the job's.
        changed: time of its outcome, so that another one is read again.
        retention: after which it is removed.

    Raises:
        FileNotFoundError: it is gone.
    """
    record, outcome = read_record(folder / "job.json"), read_outcome(folder / "outcome.json")
    if record is None or outcome is None:
        raise FileNotFoundError(folder)
    return Job(**_facts(record), **dict(outcome), expires=outcome.finished + retention)


def cancelled(record: Record) -> Job:
    """A job that is gone."""
    return Job(**_facts(record), state="cancelled")


def _facts(record: Record) -> dict[str, Any]:
    return record.model_dump(include={"id", "created", "request", "version", "assigned_by", "weights_sha256"})
