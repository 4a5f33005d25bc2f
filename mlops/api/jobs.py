"""Jobs as folders: what was accepted is on disk before anybody is told so, and every change is one atomic file.

    jobs/<id>/job.json       what was accepted; never changed
    jobs/<id>/claim.json     which worker has it; made by one worker only
    jobs/<id>/died-<n>       a claim whose worker has died
    jobs/<id>/progress.json  how far it is
    jobs/<id>/work/          finished volumes of a job that runs
    jobs/<id>/files/         all of them, renamed from `work`
    jobs/<id>/outcome.json   how it ended; made once, by whoever is first
    unfinished/<id>          empty; jobs without outcome, in their order
    callers/                 what belongs to whom (`mlops.api.caller_folder`)

So a process may be killed at any moment, and several web processes and workers may share the folder (hard links and
locks are needed: a local file system or NFS).
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ldm3d.errors import OutputError
from ldm3d.files import write_text
from mlops.api.caller_folder import FOLDER, CallerFolder, Refused
from mlops.api.records import Outcome, Record, create_once, flush_folder, read_json, read_outcome, read_record
from mlops.api.schemas import Job, Progress
from mlops.api.settings import Settings
from mlops.api.views import ended, under_way, waiting

JOB_NAME = re.compile("[0-9a-hjkmnp-tv-z]{26}")


class JobStore:
    """The jobs of a data folder. Any number of processes may use the same.

    Args:
        data_dir: made if it is not there.
        retention: after which finished jobs are removed.
        max_jobs_per_caller: that wait or run.
        max_queue: that wait or run, of everybody.
        max_disk_bytes: of results.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(
        self, data_dir: Path, retention: timedelta, max_jobs_per_caller: int, max_queue: int, max_disk_bytes: int
    ):
        self.retention, self.max_disk_bytes = retention, max_disk_bytes
        self.max_jobs_per_caller, self.max_queue = max_jobs_per_caller, max_queue
        self.data_dir = data_dir
        self.jobs, self.unfinished = data_dir / "jobs", data_dir / "unfinished"
        try:
            for folder in (self.jobs, self.unfinished, data_dir / FOLDER):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{data_dir}: cannot be written: {error.strerror}") from error

    # Accepting.

    def asked_before(self, caller_id: str, key: str, request: str) -> Record | None:
        """The job that the caller got with this idempotency key. Raises `KeyReused` for another request."""
        return self._used(self._caller(caller_id), key, request)

    def accept(self, record: Record, key: str | None = None, request: str | None = None) -> tuple[Record, bool]:
        """Keep a job for good.

        Args:
            record: the job.
            key: the caller's idempotency key.
            request: what was asked, if that is not the job's request: what it comes to differs from version to version.

        Returns:
            The job that the caller has now, and whether it is a new one.

        Raises:
            Refused: there are too many jobs.
            KeyReused: the key was used for another request.
            OutputError: the disk is full or cannot be written to.
        """
        caller, request = self._caller(record.caller), request or record.request.model_dump_json()
        with caller.locked():
            if key is not None and (before := self._used(caller, key, request)):
                return before, False
            self._require_room(caller, record)
            if key is not None:
                caller.keep_key(key, record.id, request)
            caller.mark(record.id)
            self._keep(record)
        return record, True

    def accept_shadow(self, record: Record) -> None:
        """Keep a job that repeats another one. It counts for no caller."""
        self._keep(record)

    def _keep(self, record: Record) -> None:
        """The job is there from its last file on. Of what is before, a crash leaves markers that mean nothing."""
        (self.unfinished / record.id).touch()
        try:
            write_text(self.folder(record.id) / "job.json", record.model_dump_json())
            for folder in (self.unfinished, self.folder(record.id), self.jobs):
                flush_folder(folder)
        except (OSError, OutputError):
            self.delete(record.id)
            raise

    def _used(self, caller: CallerFolder, key: str, request: str) -> Record | None:
        before = caller.job_of_key(key, request, self.is_there)
        return self.record(before) if before else None

    def _require_room(self, caller: CallerFolder, record: Record) -> None:
        records = [record for record in map(self.record, self.unfinished_ids()) if record]
        unfinished = [record.id for record in records if not record.shadow_of]  # shadows cost nobody a place
        if len(unfinished) >= self.max_queue:
            raise Refused(f"{len(unfinished)} jobs wait or run, which is all that this service takes")
        own = set(unfinished) & set(caller.job_ids())
        if len(own) >= self.max_jobs_per_caller:
            raise Refused(f"you have {len(own)} jobs that wait or run, which is all that one caller may have")
        promised = sum(r.result_bytes for r in records) + record.result_bytes
        if promised > self.max_disk_bytes:
            raise Refused("the results of the jobs that wait would not fit on this service's disk")

    # Reading.

    def record(self, job_id: str) -> Record | None:
        """What was accepted under this name; None where there is no such job (any more)."""
        return read_record(self.folder(job_id) / "job.json")

    def outcome(self, job_id: str) -> Outcome | None:
        """How the job ended; None while it has not."""
        return read_outcome(self.folder(job_id) / "outcome.json")

    def read(self, job_id: str, place: Callable[[str], int | None] = lambda name: None) -> Job | None:
        """The job as its caller sees it.

        Args:
            job_id: its name.
            place: gives its place in the queue.
        """
        folder = self.folder(job_id)
        with suppress(OSError):
            return ended(folder, (folder / "outcome.json").stat().st_mtime_ns, self.retention)
        record = self.record(job_id)
        if record is None:
            return None
        claim = read_json(folder / "claim.json")
        if claim is None:
            return waiting(record, place(job_id))
        return under_way(record, claim["started"], read_json(folder / "progress.json"))

    def of_caller(self, caller_id: str, before: str | None) -> list[str]:
        """Names of a caller's jobs, newest first, older than `before`; some may be gone."""
        names = self._caller(caller_id).job_ids()
        return sorted((name for name in names if before is None or name < before), reverse=True)

    def unfinished_ids(self) -> list[str]:
        """Jobs that wait or run, in their order."""
        return sorted(entry.name for entry in os.scandir(self.unfinished))

    def waiting_ids(self) -> list[str]:
        """Jobs that wait, in their order."""
        return [name for name in self.unfinished_ids() if self._waits(name)]

    def is_there(self, job_id: str) -> bool:
        """Whether the job was accepted and not yet removed."""
        return (self.folder(job_id) / "job.json").exists()

    def _waits(self, job_id: str) -> bool:
        folder = self.folder(job_id)
        return self.is_there(job_id) and not any((folder / name).exists() for name in ("claim.json", "outcome.json"))

    def file(self, job_id: str, name: str) -> Path:
        """Where a file of a finished job is; `name` must be one of its outcome's."""
        return self.folder(job_id) / "files" / name

    # Working.

    def claim(self, job_id: str, worker: str) -> Record | None:
        """Take a job that waits; None if it is gone, finished, or another worker was faster."""
        record = self.record(job_id) if JOB_NAME.fullmatch(job_id) else None  # it comes from the queue
        if record is None or not self._waits(job_id):
            return None
        content = json.dumps({"worker": worker, "started": datetime.now(UTC).isoformat()})
        return record if create_once(self.folder(job_id) / "claim.json", content) else None

    def release(self, job_id: str) -> None:
        """Give a job back that was not finished: it waits again, with the volumes that it has."""
        (self.folder(job_id) / "claim.json").unlink(missing_ok=True)

    def work_folder(self, job_id: str) -> Path:
        return self.folder(job_id) / "work"

    def report(self, job_id: str, progress: Progress) -> None:
        """Say how far a job is. Nothing is flushed: after a crash it begins anew; nothing is lost on a full disk."""
        path = self.folder(job_id) / "progress.json"
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):  # the job was deleted, or the disk is full
            temporary.write_text(progress.model_dump_json())
            temporary.replace(path)

    def is_wanted(self, job_id: str) -> bool:
        """Whether a job that runs was neither deleted nor ended."""
        return self.is_there(job_id) and not (self.folder(job_id) / "outcome.json").exists()

    def finish(self, job_id: str, outcome: Outcome) -> bool:
        """End a job; False if it has ended before, or is gone. A job that is done has its files in `work`."""
        folder = self.folder(job_id)
        with suppress(FileNotFoundError):  # deleted meanwhile
            if self.is_there(job_id):
                return self._finish(job_id, folder, outcome)
        if self.is_there(job_id):
            raise FileNotFoundError(folder / "work")
        shutil.rmtree(folder, ignore_errors=True)  # what a worker has written after it was deleted
        return False

    def _finish(self, job_id: str, folder: Path, outcome: Outcome) -> bool:
        if outcome.state == "done" and not (folder / "outcome.json").exists():
            shutil.rmtree(folder / "files", ignore_errors=True)
            flush_folder(folder / "work")
            (folder / "work").rename(folder / "files")
        try:
            first = create_once(folder / "outcome.json", outcome.model_dump_json())
            flush_folder(folder)
        except OSError:  # the disk is full: the volumes are kept for whoever ends the job
            with suppress(OSError):
                (folder / "files").rename(folder / "work")
            raise
        (self.unfinished / job_id).unlink(missing_ok=True)
        shutil.rmtree(folder / "work", ignore_errors=True)
        return first

    # Removing.

    def delete(self, job_id: str) -> None:
        """Cancel a job if it waits or runs, and remove it with its files."""
        folder = self.folder(job_id)
        record = self.record(job_id)
        if record is not None:
            with suppress(OSError):  # a full disk is no reason to keep what takes its room
                create_once(
                    folder / "outcome.json", Outcome(state="cancelled", finished=datetime.now(UTC)).model_dump_json()
                )
            self._caller(record.caller).unmark(job_id)
        (self.unfinished / job_id).unlink(missing_ok=True)
        trash = self.jobs / f".trash-{job_id}"
        with suppress(FileNotFoundError):
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    # Where things are.

    def folder(self, job_id: str) -> Path:
        return self.jobs / job_id

    def _caller(self, caller_id: str) -> CallerFolder:
        return CallerFolder(self.data_dir, caller_id)


def open_store(settings: Settings) -> JobStore:
    """The jobs of the data folder that the settings name."""
    return JobStore(
        settings.data_dir,
        timedelta(minutes=settings.retention_minutes),
        settings.max_jobs_per_caller,
        settings.max_queue,
        int(settings.max_disk_gib * 2**30),
    )
