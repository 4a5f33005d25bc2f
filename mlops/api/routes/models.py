"""What is served, and serving something else."""

import asyncio
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.concurrency import run_in_threadpool

from mlops.api.callers import Caller
from mlops.api.presence import workers
from mlops.api.problems import documented, problem
from mlops.api.queue import QueueDown
from mlops.api.schemas import Catalogue, Limits, Me, ReloadResult
from mlops.api.service import Service, caller_of, service_of

router = APIRouter(tags=["models"])
RELOAD_SECONDS = 30.0
POLL_SECONDS = 0.1
ServiceOf = Annotated[Service, Depends(service_of)]


@router.get("/v1/models", response_description="What is served.", responses=documented(400, 401, 403, 421, 429, 503))
async def list_models(service: ServiceOf) -> Catalogue:
    """Models and versions, what may be asked of each, and this service's limits."""
    settings = service.settings
    loaded = {digest for worker in workers(settings.data_dir / "workers") for digest in worker.loaded}
    limits = Limits(**{name: getattr(settings, name) for name in Limits.model_fields})
    return Catalogue(models=[model.info(settings, loaded) for model in service.active().models], limits=limits)


@router.get("/v1/me", response_description="The caller.", responses=documented(400, 401, 403, 421, 429, 503))
async def who_am_i(caller: Annotated[Caller, Depends(caller_of)]) -> Me:
    """Who the caller is to this service."""
    return Me.model_validate({"id": caller.id, "name": caller.name, "role": str(caller.role)})


@router.post(
    "/v1/admin/reload",
    response_description="The reload is over; `state` says how.",
    responses={
        202: {"model": ReloadResult, "description": "The worker is busy, and reloads when it is not."},
        **documented(400, 401, 403, 408, 413, 421, 429, 503),
    },
)
async def reload_models(response: Response, service: ServiceOf) -> ReloadResult:
    """Read `models.yaml` again. New versions are tried first; if one cannot be used, nothing changes."""
    try:
        name = await run_in_threadpool(service.ask_for_reload)
    except QueueDown as error:
        raise problem(503, "the queue does not answer", headers={"Retry-After": "5"}) from error
    until = time.monotonic() + RELOAD_SECONDS
    while not (is_over := (result := await run_in_threadpool(last_reload, service)).get("name", "") >= name):
        if time.monotonic() > until:
            break
        await asyncio.sleep(POLL_SECONDS)
    response.status_code = 200 if is_over else 202
    active = await run_in_threadpool(service.catalogue.read)
    return ReloadResult(
        state="pending" if not is_over else "failed" if result["error"] else "active",
        versions=[version.name for version in active.versions] if active else [],
        error=result["error"] if is_over else None,
    )


def last_reload(service: Service) -> dict[str, Any]:
    """What the last reload came to, as the worker has written it."""
    try:
        return dict(json.loads((service.settings.data_dir / "reload.json").read_bytes()))
    except (OSError, ValueError):
        return {}
