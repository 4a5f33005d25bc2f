"""What happens to every request on its way out: headers, figures, and a line in the audit log."""

import logging
import secrets
import time

from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.api import metrics
from mlops.api.audit import AuditLog
from mlops.api.security import route_of

log = logging.getLogger("ldm3d.service")

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Content-Security-Policy": PAGE_POLICY,
}
# Long by nature: their time says nothing of the service.
UNTIMED = {"/v1/jobs/{id}/events", "/v1/samples", "/v1/admin/reload"}
# What is looked at again and again is not worth a line each time; refusals always are.
UNAUDITED = {"/v1/jobs", "/v1/jobs/{id}", "/v1/jobs/{id}/events", "/v1/models", "/v1/me"}
OPEN = {"/health", "/ready", "/metrics", "/", "/static", "/openapi.json", ""}


class Observe:
    """Outermost layer of the application.

    Args:
        app: what comes after.
        audit: the audit log.
    """

    def __init__(self, app: ASGIApp, audit: AuditLog):
        self.app, self.audit = app, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = secrets.token_hex(8), time.perf_counter(), 500
        scope.setdefault("state", {})["request_id"] = request_id

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                ours = {**HEADERS, "X-Request-Id": request_id}
                if not scope["path"].startswith("/static"):
                    ours["Cache-Control"] = "no-store"
                extra = [(k.lower().encode(), v.encode()) for k, v in ours.items() if k.lower().encode() not in given]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            self._count(scope, status, time.perf_counter() - started)
            await self._audit(scope, status)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method, template = _route(scope)
        metrics.REQUESTS.labels(method, template, status).inc()
        if template not in UNTIMED:
            metrics.REQUEST_SECONDS.labels(template).observe(seconds)

    async def _audit(self, scope: Scope, status: int) -> None:
        method, template = _route(scope)
        if template in OPEN or (template in UNAUDITED and method == "GET" and status < 400):
            return
        state = scope["state"]
        address = (scope.get("client") or ("", 0))[0]
        try:
            await run_in_threadpool(
                self.audit.record,
                what=f"{method} {template}",
                outcome=status,
                caller=state.get("caller"),
                job=state.get("job"),
                address=address,
                request_id=state["request_id"],
            )
        except Exception:
            log.exception("the audit log cannot be written")


def _route(scope: Scope) -> tuple[str, str]:
    """Method and template; both from short lists, so that nobody can make up new metrics."""
    if "route" not in scope:
        return "other", ""
    return route_of(scope)
