"""What the data folder keeps of each caller: marks of their jobs, and which idempotency key made which job.

callers/<digest>/jobs/<id>           empty
callers/<digest>/keys/<digest>.json  the job that the key made, and a digest of what was asked
callers/<digest>/.lock               held while a job is accepted
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ldm3d.files import write_text
from mlops.api.records import age_seconds, digest, read_json

FOLDER = "callers"
LOCK_SECONDS = 10.0


class Refused(Exception):
    """The job is not accepted; the caller may come again."""


class KeyReused(Exception):
    """The idempotency key belongs to another request."""


class CallerFolder:
    """One caller's. Its name is a digest: what a caller is called never reaches a path.

    Args:
        data_dir: the service's data folder.
        caller_id: as `Caller.id`.
    """

    def __init__(self, data_dir: Path, caller_id: str):
        self._folder = data_dir / FOLDER / digest(caller_id)
        self._jobs = self._folder / "jobs"
        self._jobs.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, nobody else accepts a job of this caller. Raises `Refused` where another one does not end."""
        try:
            with FileLock(self._folder / ".lock", timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise Refused("the service is busy; come again in a moment") from None

    def job_ids(self) -> list[str]:
        """The caller's jobs, in no order; some may be gone."""
        return [entry.name for entry in os.scandir(self._jobs)]

    def mark(self, job_id: str) -> None:
        """The job is this caller's from now on."""
        (self._jobs / job_id).touch()

    def unmark(self, job_id: str) -> None:
        """The job is gone."""
        (self._jobs / job_id).unlink(missing_ok=True)

    def keep_key(self, key: str, job_id: str, request: str) -> None:
        """Note which job the key made. Raises `OutputError`."""
        write_text(self._key_file(key), json.dumps({"job": job_id, "request": digest(request)}))

    def job_of_key(self, key: str, request: str, is_there: Callable[[str], bool]) -> str | None:
        """The job that the key made, if it still is there. Raises `KeyReused` if it was made for another request."""
        content = read_json(self._key_file(key))
        if content is None or not is_there(content["job"]):
            return None
        if content["request"] != digest(request):
            raise KeyReused("this Idempotency-Key was used for another request; take a new key for a new request")
        return str(content["job"])

    def _key_file(self, key: str) -> Path:
        return self._folder / "keys" / f"{digest(key)}.json"


def forget_gone_jobs(data_dir: Path, is_there: Callable[[str], bool], settled_seconds: float) -> None:
    """Keys live as long as their jobs; so do marks. Younger ones may belong to a job that is being accepted."""
    for file in (data_dir / FOLDER).glob("*/*/*"):
        content = read_json(file) if file.parent.name == "keys" else {"job": file.name}
        if (content is None or not is_there(content["job"])) and age_seconds(file) > settled_seconds:
            file.unlink(missing_ok=True)
