"""Asking for volumes."""

import asyncio
import time
from contextlib import nullcontext
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from mlops.api.callers import Caller
from mlops.api.problems import documented, problem
from mlops.api.records import Record
from mlops.api.schemas import FINISHED, Job, SampleRequest
from mlops.api.service import Service, caller_of, service_of
from mlops.api.views import cancelled

router = APIRouter(tags=["samples"])
POLL_SECONDS = 0.05

LOCATION = {"Location": {"description": "Address of the job.", "schema": {"type": "string"}}}
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key and request within the retention time give the same job, not another one.",
        examples=["study-12-seed-7"],
    ),
]


def require_json(request: Request) -> None:
    """Dependency: raises a `ProblemError` 415 for a body that is not said to be JSON, as `curl -d` alone says."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise problem(415, "send JSON, with the header Content-Type: application/json")


@router.post(
    "/v1/samples",
    status_code=202,
    dependencies=[Depends(require_json)],
    response_model=Job,
    responses={
        200: {"model": Job, "description": "Finished while the request waited.", "headers": LOCATION},
        202: {"model": Job, "description": "Accepted.", "headers": LOCATION},
        **documented(400, 401, 403, 408, 413, 415, 421, 422, 429, 503),
    },
)
async def create_job(
    asked: SampleRequest,
    request: Request,
    response: Response,
    service: Annotated[Service, Depends(service_of)],
    caller: Annotated[Caller, Depends(caller_of)],
    idempotency_key: IdempotencyKey = None,
    wait: Annotated[float, Query(ge=0, description="Seconds to wait for the end of the job.")] = 0,
) -> Job:
    """Ask for volumes. The answer is a job, which is finished if `wait` was long enough."""
    most = service.settings.max_wait_seconds
    if wait > most:
        raise problem(422, f"wait: at most {most:g} s", errors=[{"field": "wait", "message": f"at most {most:g} s"}])
    # Its place is taken before the job is accepted: who is refused has no job.
    with service.streams.one(caller.id) if wait else nullcontext():
        record, _ = await run_in_threadpool(service.accept, asked, caller, idempotency_key)
        request.state.job = record.id
        response.headers["Location"] = f"{request.scope.get('root_path', '')}/v1/jobs/{record.id}"
        job = await _waited(service, record, time.monotonic() + wait, request)
    response.status_code = 200 if job.state in FINISHED else 202
    return job


async def _waited(service: Service, record: Record, until: float, request: Request) -> Job:
    """The job when it has ended or the time is over; cancelled if it was deleted meanwhile."""
    job = await run_in_threadpool(service.job, record.id)
    while job and job.state not in FINISHED and time.monotonic() < until and not await request.is_disconnected():
        await asyncio.sleep(min(POLL_SECONDS, max(0, until - time.monotonic())))
        job = await run_in_threadpool(service.job, record.id)
    return job or cancelled(record)
