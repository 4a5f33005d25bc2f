"""A client of the service. It needs httpx alone: copy this file to where it is used. docs/API.md shows how."""

import hashlib
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import httpx

PAUSES = (0.5, 1, 2, 4, 8)  # seconds before a request is made again that was not answered, or with 429 or 503
Job = dict[str, Any]


class ServiceError(Exception):
    """The service has refused a request, or failed at a job; the text says why. `status` is of HTTP, 0 for a job."""

    def __init__(self, text: str, status: int = 0, retry_seconds: float = 0):
        super().__init__(text)
        self.status, self.retry_seconds = status, retry_seconds


class Client(httpx.Client):
    """Asks a service at `url`, which may end with a path, with an API key or a token."""

    def __init__(self, url: str, key: str = ""):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        super().__init__(base_url=url, headers=headers, timeout=60, event_hooks={"response": [_check]})

    def submit(self, **asked: Any) -> Job:
        """Ask for volumes (num, seed, steps, ...). A broken connection makes no second job: all tries have one key."""
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return dict(_tried(partial(self.post, "/v1/samples", json=asked, headers=headers)).json())

    def wait(self, job: Job, seconds: float = 3600) -> Job:
        """The job when it is done. Raises `ServiceError` where it has failed, or is not over after `seconds`."""
        until, pause = time.monotonic() + seconds, 0.05
        while job["state"] in ("queued", "running") and time.monotonic() < until:
            time.sleep(pause := min(2 * pause, 2))
            job = _tried(partial(self.get, f"/v1/jobs/{job['id']}")).json()
        if job["state"] != "done":
            raise ServiceError(job["error"] or f"job {job['id']} is {job['state']}")
        return job

    def download(self, job: Job, folder: str | Path) -> list[Path]:
        """The job's files, in `folder`. A file is there only if it is whole and has the digest that the job says."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [_tried(partial(self._file, job, file, Path(folder))) for file in job["files"]]

    def _file(self, job: Job, file: dict[str, Any], folder: Path) -> Path:
        path, digest = folder / Path(file["name"]).name, hashlib.sha256()
        part = path.with_name(f".{path.name}.part")
        with self.stream("GET", f"/v1/jobs/{job['id']}/files/{file['name']}") as answer, open(part, "wb") as written:
            for chunk in answer.iter_raw():
                digest.update(chunk)
                written.write(chunk)
        if digest.hexdigest() != file["sha256"]:
            raise ServiceError(f"{path.name} has come damaged")
        return part.replace(path)


def _check(answer: httpx.Response) -> None:
    if answer.is_error:
        answer.read()
        is_problem = answer.headers.get("content-type") == "application/problem+json"
        text = answer.json()["detail"] if is_problem else answer.reason_phrase
        raise ServiceError(text, answer.status_code, float(answer.headers.get("retry-after", 0)))


def _tried(ask: Any) -> Any:
    for pause in PAUSES:
        try:
            return ask()
        except httpx.TransportError:
            time.sleep(pause)
        except ServiceError as error:
            if error.status not in (429, 503):
                raise
            time.sleep(max(pause, error.retry_seconds))
    return ask()
