"""Jobs: how far they are, what they made, and their end."""

import asyncio
from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from mlops.api.callers import Caller
from mlops.api.problems import documented, problem
from mlops.api.schemas import EXAMPLE_ID, FINISHED, Job, JobId, JobPage
from mlops.api.service import Service, caller_of, service_of

router = APIRouter(tags=["jobs"])
POLL_SECONDS = 0.25
AT_ONCE_BYTES = 2**19
"""A file up to this size is read at once, not in pieces that are a call into a thread each."""

PathId = Annotated[JobId, Path(description="Name of the job.", examples=[EXAMPLE_ID])]
ServiceOf = Annotated[Service, Depends(service_of)]
CallerOf = Annotated[Caller, Depends(caller_of)]
FAILURES = documented(400, 401, 403, 404, 421, 422, 429, 503)
FILE_TYPES: dict[str, Any] = {
    kind: {} for kind in ("application/gzip", "application/octet-stream", "application/json", "image/png")
}
# Starlette reads it; not a condition, so that a malformed one is a 400 as HTTP has it, not a 422.
RANGES = {"pattern": r"^bytes=([0-9]+-[0-9]*|-[0-9]+)(, ?([0-9]+-[0-9]*|-[0-9]+))*$"}
FILE_HEADERS = {"ETag": {"description": "SHA-256 of the file, in quotes.", "schema": {"type": "string"}}}


async def own_job(id: PathId, request: Request, service: ServiceOf, caller: CallerOf) -> Job:
    """Dependency: the caller's job. Raises a `ProblemError` 404.

    It looks at one or two files, which takes 20 us; a thread to do so would take ten times as long under load.
    """
    request.state.job = id
    return service.own_job(id, caller)


async def one_stream(service: ServiceOf, caller: CallerOf) -> AsyncIterator[None]:
    """Dependency: one of the streams that may be open at once. Raises a `ProblemError` 429."""
    with service.streams.one(caller.id):
        yield


OwnJob = Annotated[Job, Depends(own_job)]


@router.get("/v1/jobs", response_description="A page of jobs.", responses=documented(400, 401, 403, 421, 422, 429, 503))
async def list_jobs(
    service: ServiceOf,
    caller: CallerOf,
    limit: Annotated[int, Query(ge=1, le=100, description="Jobs on a page.")] = 20,
    before: Annotated[JobId | None, Query(description="`next` of the page before.", examples=[EXAMPLE_ID])] = None,
) -> JobPage:
    """The caller's jobs, newest first."""
    # Here, not in a thread: each of its looks at a file would wait there for the interpreter's lock.
    found = filter(None, map(service.job, service.store.of_caller(caller.id, before)))
    jobs = list(islice(found, limit + 1))
    return JobPage(jobs=jobs[:limit], next=jobs[limit - 1].id if len(jobs) > limit else None)


@router.get("/v1/jobs/{id}", response_description="The job.", responses=FAILURES)
async def get_job(job: OwnJob) -> Job:
    """State, place in the queue, progress and time left; the files, once it is done."""
    return job


@router.get(
    "/v1/jobs/{id}/events",
    response_class=EventSourceResponse,
    responses={200: {"description": "`progress` events on every change, then one `end`; data is the job."}, **FAILURES},
)
async def follow_job(
    job: OwnJob, service: ServiceOf, caller: CallerOf, _: Annotated[None, Depends(one_stream)]
) -> AsyncIterator[ServerSentEvent]:
    """The job as it goes on, as server-sent events."""
    seen: Job | None = None
    while job.state not in FINISHED:
        if job != seen:
            yield ServerSentEvent(data=job, event="progress")
            seen = job
        await asyncio.sleep(POLL_SECONDS)
        now = await run_in_threadpool(service.job, job.id)
        job = now or job.model_copy(update={"state": "cancelled", "place": None, "progress": None})
    yield ServerSentEvent(data=job, event="end")


@router.get(
    "/v1/jobs/{id}/files/{name}",
    response_class=FileResponse,
    responses={
        200: {"description": "The whole file.", "headers": FILE_HEADERS, "content": FILE_TYPES},
        206: {
            "description": "The range that was asked for, or several as parts.",
            "headers": FILE_HEADERS,
            "content": {**FILE_TYPES, "multipart/byteranges": {}},
        },
        **documented(400, 401, 403, 404, 416, 421, 422, 429, 503),
    },
)
def get_file(
    job: OwnJob,
    service: ServiceOf,
    name: Annotated[str, Path(max_length=120, description="One of the job's `files`.", examples=["synimg_7_0.png"])],
    range: Annotated[
        str | None,
        Header(
            alias="Range", description="Parts of the file, in bytes.", examples=["bytes=0-99"], json_schema_extra=RANGES
        ),
    ] = None,
) -> Response:
    """A volume, its sidecar or its preview, or a range of it."""
    try:
        found = next(file for file in job.files if file.name == name)
        path = service.store.file(job.id, name)
        status = path.stat()
        # A browser must not show it to who logs in after the caller.
        headers = {"ETag": f'"{found.sha256}"', "Cache-Control": "private, max-age=3600, immutable"}
        headers["Vary"] = "Authorization"
        answer = FileResponse(path, 200, headers, found.media_type, filename=found.name, stat_result=status)
        if status.st_size <= AT_ONCE_BYTES and range is None:
            return Response(path.read_bytes(), headers=dict(answer.headers))
    except (StopIteration, FileNotFoundError):
        raise problem(404, "this job has no such file") from None
    return answer


@router.delete(
    "/v1/jobs/{id}",
    status_code=204,
    response_description="The job is gone.",
    responses={**FAILURES, **documented(408, 413)},
)
def delete_job(job: OwnJob, service: ServiceOf) -> None:
    """Cancel the job if it waits or runs, and remove it with its files."""
    service.store.delete(job.id)
