"""What all routes of the web process share, and how a request becomes a job."""

import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import prod
from typing import cast

from fastapi import Request

from ldm3d.errors import ConfigError, OutputError
from mlops.api import metrics, tracing
from mlops.api.caller_folder import KeyReused, Refused
from mlops.api.callers import Caller
from mlops.api.catalogue import ActiveModel, ActiveSet, ActiveVersion, Catalogue
from mlops.api.jobs import JobStore
from mlops.api.limits import RateLimit, Streams, too_many
from mlops.api.problems import problem
from mlops.api.queue import LATE, RELOAD, URGENT, Queue, QueueDown
from mlops.api.records import Record, new_job_id
from mlops.api.schemas import Job, SampleRequest
from mlops.api.settings import Settings
from mlops.api.usage import Usage
from mlops.api.validation import FieldError, find_model, validate_request

log = logging.getLogger("ldm3d.service")

PER_VOLUME_BYTES = 256 * 1024
"""Room for preview, sidecar and header."""
VOXEL_BYTES = {"float32": 4, "int16": 2}
PLACES_SECONDS = 0.25
"""The queue is looked through at most so often."""


@dataclass
class Service:
    """The web process's parts."""

    settings: Settings
    store: JobStore
    queue: Queue
    catalogue: Catalogue
    rate: RateLimit
    streams: Streams
    usage: Usage
    _places: tuple[float, dict[str, int]] = field(default=(0.0, {}))

    def active(self) -> ActiveSet:
        """What is served. Raises a `ProblemError` 503 where no worker has loaded anything yet."""
        try:
            active = self.catalogue.read()
        except ConfigError as error:
            log.error("%s", error)
            raise problem(503, "what is served cannot be read; a reload may mend it") from error
        if active is None:
            raise problem(503, "no worker has loaded a model yet; see /ready", headers={"Retry-After": "5"})
        return active

    def job(self, job_id: str) -> Job | None:
        """The job as its caller sees it."""
        return self.store.read(job_id, self.place)

    def own_job(self, job_id: str, caller: Caller) -> Job:
        """The caller's job. Raises a `ProblemError` 404, for foreign ones too: nobody learns that they are there."""
        record = self.store.record(job_id)
        job = self.job(job_id) if record and record.caller == caller.id and not record.shadow_of else None
        if job is None:
            raise problem(404, "there is no such job, or it was removed")
        return job

    def place(self, job_id: str) -> int | None:
        """Place among the jobs that wait, from 1."""
        seen, places = self._places
        if time.monotonic() - seen > PLACES_SECONDS or job_id not in places:
            places = {name: number for number, name in enumerate(self.store.waiting_ids(), 1)}
            self._places = time.monotonic(), places
        return places.get(job_id)

    def accept(self, asked: SampleRequest, caller: Caller, key: str | None) -> tuple[Record, bool]:
        """Make a job of a request.

        Args:
            asked: the request.
            caller: who asks.
            key: idempotency key.

        Returns:
            The job, and whether it is a new one.

        Raises:
            ProblemError: 422, a field cannot be granted, or the key was used for another request; 429, there is no
                room; 503, nothing is served yet, or the disk is full.
        """
        job_id, request = new_job_id(), asked.model_dump_json()
        try:
            if key and (before := self.store.asked_before(caller.id, key, request)):
                return before, False
            model = find_model(self.active(), asked.model)
            version, assigned_by = model.assign(caller.id, job_id)
            record = self._record(job_id, caller, asked, version, assigned_by)
            record, is_new = self.store.accept(record, key, request)
        except FieldError as error:
            field_error = {"field": error.field, "message": error.message}
            raise problem(422, str(error), errors=[field_error]) from error
        except KeyReused as error:
            raise problem(422, str(error), errors=[{"field": "Idempotency-Key", "message": str(error)}]) from error
        except Refused as error:
            metrics.JOBS_REFUSED.inc()
            raise too_many(str(error)) from error
        except (OutputError, OSError) as error:
            log.error("no job can be kept: %s", error)
            raise problem(503, "this service's disk is full, or cannot be written to") from error
        if is_new:
            metrics.JOBS_ACCEPTED.labels(model.name, version.version, "no").inc()
            self.usage.count(caller.id, model.name, version.version, record.request.num)
            self._enqueue(record.id)
            try:
                self._accept_shadows(record, model, asked, caller)
            except (OutputError, OSError) as error:  # the caller has the job
                log.error("job %s has no shadow: %s", record.id, error)
        return record, is_new

    def _record(
        self, job_id: str, caller: Caller, asked: SampleRequest, version: ActiveVersion, assigned_by: str
    ) -> Record:
        request = validate_request(asked, version, self.settings)
        volume_bytes = prod(version.shape) * VOXEL_BYTES[request.dtype] + PER_VOLUME_BYTES
        if request.num * volume_bytes > self.store.max_disk_bytes:
            raise FieldError("num", f"num {request.num}: so many volumes do not fit on this service's disk")
        return Record(
            id=job_id,
            caller=caller.id,
            created=datetime.now(UTC),
            request=request,
            version=version.version,
            digest=version.digest,
            assigned_by=assigned_by,
            weights_sha256=version.weights_sha256,
            result_bytes=request.num * volume_bytes,
            traceparent=tracing.here(),
        )

    def _accept_shadows(self, record: Record, model: ActiveModel, asked: SampleRequest, caller: Caller) -> None:
        """Let shadow versions make the same, unless that could cost somebody a place."""
        for version in model.shadows():
            if len(self.store.unfinished_ids()) > self.store.max_queue // 2:
                return
            try:
                made = self._record(new_job_id(), caller, asked, version, record.assigned_by)
            except FieldError:  # another version may offer less
                continue
            self.store.accept_shadow(made.model_copy(update={"shadow_of": record.id}))
            metrics.JOBS_ACCEPTED.labels(model.name, version.version, "yes").inc()
            self._enqueue(made.id, LATE)

    def ask_for_reload(self) -> str:
        """Ask a worker to read models.yaml again. Returns the wish's name. Raises `QueueDown`."""
        name = RELOAD + new_job_id()
        self.queue.put(name, URGENT)
        return name

    def _enqueue(self, job_id: str, *priority: int) -> None:
        try:
            self.queue.put(job_id, *priority)
        except QueueDown as error:
            # The job is on disk: a worker finds it there.
            log.warning("job %s is kept, but %s", job_id, error)


async def service_of(request: Request) -> Service:
    """Dependency: the parts of the web process."""
    return cast(Service, request.app.state.service)


async def caller_of(request: Request) -> Caller:
    """Dependency: who calls, on routes that are not open."""
    return cast(Caller, request.state.caller)
