"""Finished jobs, read while the service works on them: nothing is locked, written or made, and anything may vanish."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm3d.errors import DataError
from mlops.api.records import Outcome, Record, read_outcome, read_record

VOLUME_ENDINGS = (".nii", ".nii.gz")


class FinishedJob(NamedTuple):
    """A job that has ended, however it ended."""

    record: Record
    outcome: Outcome
    folder: Path

    @property
    def version(self) -> tuple[str, str]:
        """Names of model and version."""
        return self.record.request.model, self.record.version

    def volumes(self) -> list[Path]:
        """Files of a job that is done; some may be gone."""
        return [self.folder / "files" / f.name for f in self.outcome.files if f.name.endswith(VOLUME_ENDINGS)]

    def recipe(self, path: Path) -> str:
        """Two volumes with the same recipe are the same volume: requests that name no seed ask for the same again."""
        request = self.record.request
        name = path.name.partition(".")[0]
        return f"{self.record.digest} {name} {request.scheduler} {request.steps} {sorted(request.conditions.items())}"


def job_names(data_dir: Path) -> list[str]:
    """Names of all jobs, newest first.

    Raises:
        DataError: this is no folder of the service.
    """
    try:
        names = [entry.name for entry in os.scandir(data_dir / "jobs")]
    except OSError as error:
        raise DataError(f"{data_dir}: is not the service's data folder: {error.strerror}") from error
    return sorted((name for name in names if not name.startswith(".")), reverse=True)


def read_job(data_dir: Path, name: str) -> FinishedJob | None:
    """A job that has ended; None where it has not, or is gone."""
    folder = data_dir / "jobs" / name
    record, outcome = read_record(folder / "job.json"), read_outcome(folder / "outcome.json")
    return FinishedJob(record, outcome, folder) if record and outcome else None


def finished_jobs(data_dir: Path) -> Iterator[FinishedJob]:
    """All jobs that have ended, newest first."""
    return filter(None, (read_job(data_dir, name) for name in job_names(data_dir)))
