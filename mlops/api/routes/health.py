"""Whether the service lives, whether it can work, and its figures."""

import shutil
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from ldm3d.errors import UserError
from mlops.api import metrics
from mlops.api.presence import workers
from mlops.api.problems import documented
from mlops.api.queue import QueueDown
from mlops.api.schemas import Health, Readiness
from mlops.api.service import Service, service_of

router = APIRouter(tags=["health"])
ServiceOf = Annotated[Service, Depends(service_of)]


@router.get("/health", response_description="It lives.", responses=documented(400, 421))
async def health() -> Health:
    """The process answers."""
    return Health()


@router.get(
    "/ready",
    response_description="It can work.",
    responses={503: {"model": Readiness, "description": "It cannot work yet."}, **documented(400, 421)},
)
def ready(response: Response, service: ServiceOf) -> Readiness:
    """Whether a request would be worked on: queue reachable, models known, weights loaded by a worker that lives."""
    checks = _checks(service)
    is_ready = set(checks.values()) == {"ok"}
    response.status_code = 200 if is_ready else 503
    return Readiness(ready=is_ready, checks=checks)


def _checks(service: Service) -> dict[str, str]:
    return {"queue": _queue(service), "models": _models(service), "workers": _workers(service)}


def _queue(service: Service) -> str:
    try:
        service.queue.ping()
    except QueueDown:
        return "does not answer"
    return "ok"


def _models(service: Service) -> str:
    try:
        return "ok" if service.catalogue.read() else "no worker has loaded any yet"
    except UserError:
        return "what is served cannot be read"


def _workers(service: Service) -> str:
    states = {worker.state for worker in workers(service.settings.data_dir / "workers")}
    return "ok" if states - {"starting"} else "starting" if states else "none lives"


@router.get(
    "/metrics",
    response_class=Response,
    response_description="The figures.",
    responses={200: {"content": {"text/plain": {}}}, **documented(400, 421)},
)
def get_metrics(service: ServiceOf) -> Response:
    """All figures in Prometheus's text format."""
    _look_around(service)
    content, media_type = metrics.exposition()
    return Response(content, media_type=media_type)


def _look_around(service: Service) -> None:
    store, settings = service.store, service.settings
    waiting, unfinished = store.waiting_ids(), store.unfinished_ids()
    oldest = store.record(waiting[0]) if waiting else None
    metrics.QUEUE_JOBS.set(len(waiting))
    metrics.RUNNING_JOBS.set(len(unfinished) - len(waiting))
    metrics.OLDEST_SECONDS.set((datetime.now(UTC) - oldest.created).total_seconds() if oldest else 0)
    metrics.QUEUE_LIMIT.set(settings.max_queue)
    metrics.DISK_LIMIT.set(store.max_disk_bytes)
    metrics.DISK_FREE.set(shutil.disk_usage(settings.data_dir).free)
    metrics.READY.set(set(_checks(service).values()) == {"ok"})
    states = [worker.state for worker in workers(settings.data_dir / "workers")]
    for state in ("starting", "idle", "busy", "asleep"):
        metrics.WORKERS.labels(state).set(states.count(state))
