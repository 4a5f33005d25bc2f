"""From claimed jobs to files: batches over several jobs, progress, and what ends a job before its time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ldm3d.console import log
from ldm3d.errors import OutputError, UserError, shortage
from ldm3d.files import sha256
from ldm3d.montage import montage
from ldm3d.nifti import stem_of
from ldm3d.samples import file_name, write_sample
from ldm3d.sampling import Sampler, VolumeId
from mlops.api import metrics, tracing
from mlops.api.jobs import JobStore
from mlops.api.records import Outcome, Record
from mlops.api.schemas import FileInfo, Progress

REPORT_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
"""So long may jobs of one kind be taken together: then other kinds, reloads and tidying have their turn."""
MEDIA_TYPES = {".gz": "application/gzip", ".nii": "application/octet-stream", ".json": "application/json"}


class Stopped(Exception):
    """The worker is to end."""


class Unwanted(Exception):
    """Nobody wants any volume of the batch any more."""


@dataclass
class Task:
    """A job that this worker has."""

    record: Record
    folder: Path
    started: datetime
    deadline: float
    missing: list[VolumeId] = field(default_factory=list)
    in_batch: int = 0
    span: Any = None

    def __post_init__(self) -> None:
        """Volumes that a worker before has made whole are not made again."""
        request = self.record.request
        self.missing = [v for v in map(self._volume, range(request.num)) if not self.preview(v).exists()]
        names = {"ldm3d.job": self.record.id, "ldm3d.model": request.model, "ldm3d.version": self.record.version}
        self.span = tracing.begin("job", self.record.traceparent, **names)

    def _volume(self, number: int) -> VolumeId:
        return VolumeId(self.record.request.seed, number)

    def path(self, volume: VolumeId) -> Path:
        return self.folder / file_name(volume, self.record.request.format)

    def preview(self, volume: VolumeId) -> Path:
        """The last file of a volume: where it is, the others are."""
        return self.folder / f"{stem_of(self.path(volume))}.png"

    def progress(self, share_of_batch: float) -> Progress:
        total = self.record.request.num
        done = total - len(self.missing)
        share = (done + share_of_batch * self.in_batch) / total
        seconds = (datetime.now(UTC) - self.started).total_seconds()
        left = seconds / share * (1 - share) if share > 0.02 else None
        return Progress(done=done, total=total, share=round(share, 4), seconds_left=left and round(left, 1))


def kind(record: Record) -> tuple[str, str, int, str]:
    """Jobs of one kind can be sampled together."""
    return record.digest, record.request.scheduler, record.request.steps, str(sorted(record.request.conditions.items()))


class Generation:
    """Carries out a job, and with it those that wait and can be sampled together with it.

    Args:
        store: where jobs are.
        worker: name of this worker.
        sampler: of the jobs' version.
        max_batch: volumes at once.
        job_seconds: that a job may take.
        is_stopping: whether the worker is to end.
    """

    def __init__(
        self,
        store: JobStore,
        worker: str,
        sampler: Sampler,
        max_batch: int,
        job_seconds: float,
        is_stopping: Callable[[], bool],
    ):
        self.store, self.worker, self.sampler = store, worker, sampler
        self.max_batch, self.job_seconds, self.is_stopping = max_batch, job_seconds, is_stopping
        # On a GPU a volume's last digits depend on what is sampled beside it: no foreign jobs there.
        self.mixes = sampler.device.type == "cpu"
        self.tasks: list[Task] = []
        self._reported = 0.0
        self._began = time.monotonic()

    def run(self, first: Record) -> list[str]:
        """Finish `first` and all jobs that were taken with it.

        Returns:
            Jobs that were given back, with the volumes that they have, because the worker is to end.
        """
        self._begin(first)
        try:
            while self.tasks and not self.is_stopping():
                self._drop_unwanted()
                self._end_complete()
                if self.mixes and self.tasks:
                    self._take_compatible()
                if self.tasks:
                    self._make(list(islice(self._volumes(), self.max_batch)))
                self._end_complete()
        except Stopped:
            pass
        finally:
            for task in self.tasks:
                self.store.release(task.record.id)
                tracing.end(task.span, "given back")
        return [task.record.id for task in self.tasks]

    def _begin(self, record: Record) -> None:
        folder = self.store.work_folder(record.id)
        self.tasks.append(Task(record, folder, datetime.now(UTC), time.monotonic() + self.job_seconds))

    def _volumes(self) -> Iterator[tuple[Task, VolumeId]]:
        """What is missing. A job's batches are the same whatever waits beside it, unless that changes nothing."""
        return ((task, volume) for task in self.tasks for volume in task.missing)

    def _take_compatible(self) -> None:
        if time.monotonic() - self._began > PATIENCE_SECONDS:
            return
        wanted = kind(self.tasks[0].record)
        missing = sum(len(task.missing) for task in self.tasks)
        for name in self.store.waiting_ids():
            if missing >= self.max_batch:
                return
            waiting = self.store.record(name)
            if waiting and kind(waiting) == wanted and (record := self.store.claim(name, self.worker)):
                self._begin(record)
                missing += len(self.tasks[-1].missing)

    def _make(self, batch: list[tuple[Task, VolumeId]]) -> None:
        for task in self.tasks:
            task.in_batch = sum(owner is task for owner, _ in batch)
        tasks = [task for task in self.tasks if task.in_batch]
        try:
            self._sample(batch, tasks)
        except Unwanted:
            self._drop_unwanted()
        except Stopped:
            raise
        except Exception as error:
            if shortage(error) and len(batch) > 1:
                torch.cuda.empty_cache()
                log(f"warning: no memory for {len(batch)} volumes at once; going on with half as many")
                self.max_batch = len(batch) // 2
            elif shortage(error):
                torch.cuda.empty_cache()
                self._fail(tasks[0], "the device has not memory enough for one volume", error)
            elif len(tasks) > 1:  # one job must not take others with it
                for task in tasks:  # what of it was written before the error is there
                    missing = [(owner, volume) for owner, volume in batch if owner is task and volume in task.missing]
                    if missing:
                        self._make(missing)
            elif not self.store.is_wanted(tasks[0].record.id):  # deleted, and its folder with it, under the writer
                self._drop_unwanted()
            else:
                self._fail(tasks[0], _said_to_caller(error), error)

    def _sample(self, batch: list[tuple[Task, VolumeId]], tasks: list[Task]) -> None:
        request, record = tasks[0].record.request, tasks[0].record
        started, began = time.perf_counter(), time.time_ns()
        stepped = began

        def on_step(step: int) -> None:
            nonlocal stepped
            stepped = time.time_ns()
            self._watch(step / request.steps, tasks)

        volumes = [volume for _, volume in batch]
        values = self.sampler.sample_volumes(volumes, request.scheduler, request.steps, on_step)
        for task in tasks:
            tracing.part(task.span, "sampling", began, stepped, **{"ldm3d.volumes": len(batch)})
            tracing.part(task.span, "decoding", stepped, time.time_ns(), **{"ldm3d.volumes": len(batch)})
        if not torch.isfinite(values).all():
            raise UserError("the model made NaN or infinity")
        metrics.BATCH_SECONDS.labels(request.model, record.version).observe(time.perf_counter() - started)
        metrics.BATCH_VOLUMES.observe(len(batch))
        for (task, volume), volume_values in zip(batch, values, strict=True):
            self._write(task, volume, volume_values)

    def _write(self, task: Task, volume: VolumeId, values: torch.Tensor) -> None:
        request = task.record.request
        write_sample(task.path(volume), self.sampler, volume, values, request.scheduler, request.steps, request.dtype)
        spacing = self.sampler.card.spacing
        montage({f"generated, seed {volume.seed}, number {volume.number}": [values[0]]}, spacing, task.preview(volume))
        task.missing.remove(volume)
        task.in_batch -= 1
        metrics.VOLUMES.labels(request.model, task.record.version, _is_shadow(task.record)).inc()

    def _watch(self, share: float, tasks: list[Task]) -> None:
        """Between two steps: say how far it is, and see whether to go on."""
        if self.is_stopping():
            raise Stopped
        now = time.monotonic()
        if now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        for task in tasks:
            self.store.report(task.record.id, task.progress(share))
        if not any(self.store.is_wanted(task.record.id) and now < task.deadline for task in tasks):
            raise Unwanted

    def _drop_unwanted(self) -> None:
        for task in list(self.tasks):
            if not self.store.is_wanted(task.record.id):
                self._end(task, Outcome(state="cancelled", started=task.started, finished=datetime.now(UTC)))
            elif time.monotonic() > task.deadline:
                self._fail(task, f"it took longer than {self.job_seconds:g} s, which is all that a job may take")

    def _end_complete(self) -> None:
        for task in list(self.tasks):
            if task.missing:
                continue
            try:
                files = [_described(path) for path in sorted(task.folder.iterdir()) if not path.name.startswith(".")]
                self._end(task, Outcome(state="done", started=task.started, finished=datetime.now(UTC), files=files))
            except FileNotFoundError:
                if self.store.is_wanted(task.record.id):
                    raise
                self._drop_unwanted()  # deleted, and its folder with it, under the reader

    def _fail(self, task: Task, said: str, error: Exception | None = None) -> None:
        log(f"warning: job {task.record.id} failed: {said}{f' ({error!r})' if error else ''}")
        self._end(task, Outcome(state="failed", started=task.started, finished=datetime.now(UTC), error=said))

    def _end(self, task: Task, outcome: Outcome) -> None:
        record = task.record
        self.store.finish(record.id, outcome)
        self.tasks.remove(task)  # not before: a job that could not be ended is given back
        tracing.end(task.span, outcome.state, outcome.error)
        labels = (record.request.model, record.version)
        metrics.count_end(*labels, bool(record.shadow_of), outcome.state)
        if outcome.state == "done" and not record.shadow_of:
            metrics.JOB_SECONDS.labels(*labels).observe((outcome.finished - record.created).total_seconds())


def _said_to_caller(error: Exception) -> str:
    """What a caller may know: no paths, nothing of our insides."""
    if isinstance(error, OutputError):
        return "the result could not be kept: this service's disk is full, or cannot be written to"
    if type(error) is UserError:
        return str(error)
    return "the service failed at this job; its log says why"


def _described(path: Path) -> FileInfo:
    media_type = MEDIA_TYPES.get(path.suffix, "image/png")
    return FileInfo(name=path.name, bytes=path.stat().st_size, media_type=media_type, sha256=sha256(path))


def _is_shadow(record: Record) -> str:
    return "yes" if record.shadow_of else "no"
