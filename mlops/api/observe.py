"""What happens to every request on its way out: headers, figures, and a line in the audit log."""

import logging
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm3d.errors import UserError
from mlops.api import metrics
from mlops.api.audit import AuditLog
from mlops.api.problems import problem, problem_response
from mlops.api.security import READING, route_of

log = logging.getLogger("ldm3d.service")

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
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
        # After the first entry that could not be written.
        self._failed = False
        metrics.AUDIT_FAILED.set(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        request_id, started, status = secrets.token_hex(8), time.perf_counter(), 500
        scope.setdefault("state", {})["request_id"] = request_id

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                ours = {**HEADERS, "X-Request-Id": request_id}
                # The page's parts belong together: a browser asks each time whether they are still the same.
                ours["Cache-Control"] = "no-cache" if scope["path"].startswith("/static") else "no-store"
                extra = [(k.lower().encode(), v.encode()) for k, v in ours.items() if k.lower().encode() not in given]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            if self._failed and scope["method"] not in READING and not self._works_again():
                refusal = problem(503, "the audit log cannot be written, so nothing may be changed")
                await problem_response(refusal)(scope, receive, observed)
            else:
                await self.app(scope, receive, observed)
        finally:
            self._count(scope, status, time.perf_counter() - started)
            self._audit(scope, status)

    def _works_again(self) -> bool:
        self._failed = not self._record(what="audit log", outcome="works again")
        metrics.AUDIT_FAILED.set(self._failed)
        return not self._failed

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method, template = _route(scope)
        metrics.REQUESTS.labels(method, template, status).inc()
        if template not in UNTIMED:
            metrics.REQUEST_SECONDS.labels(template).observe(seconds)

    def _audit(self, scope: Scope, status: int) -> None:
        method, template = _route(scope)
        if template in OPEN or (template in UNAUDITED and method == "GET" and status < 400):
            return
        state = scope["state"]
        self._failed |= not self._record(
            what=f"{method} {template}",
            outcome=status,
            caller=state.get("caller"),
            job=state.get("job"),
            address=(scope.get("client") or ("", 0))[0],
            request_id=state["request_id"],
        )

    def _record(self, **entry: Any) -> bool:
        """Here, not in a thread, which would wait for the interpreter's lock a hundred times as long as it writes."""
        try:
            self.audit.record(**entry)
        except UserError as error:
            log.error("%s; until it can be written nothing is changed", error)
            metrics.AUDIT_FAILED.set(1)
            return False
        return True


def _route(scope: Scope) -> tuple[str, str]:
    """Method and template; both from short lists, so that nobody can make up new metrics."""
    if "route" not in scope:
        return "other", ""
    return route_of(scope)
