"""Errors as RFC 9457 problem documents: what is wrong, with which field, and when to come again."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.api.schemas import Problem

MEDIA_TYPE = "application/problem+json"
TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Request too slow",
    413: "Body too large",
    415: "Not JSON",
    416: "No such range",
    421: "Not this host",
    422: "Cannot be used",
    429: "Too many",
    500: "Our mistake",
    503: "Not ready",
}


# When it happens, for OpenAPI and docs/API.md.
WHY = {
    400: "The Host header is not one of this service's, the Range header is malformed, or the body is not UTF-8.",
    401: "There is no key or token, or it is unknown, revoked or expired.",
    403: "The role is not enough, the token names none, or a page of another origin asks.",
    404: "There is no such job or file, it was removed, or it is somebody else's.",
    408: "The body took too long to come.",
    413: "The body is larger than the service takes.",
    415: "The body is not said to be application/json.",
    416: "The file has no such range.",
    421: "Without keys the service answers its own machine only.",
    422: "A field, header or parameter cannot be used; `errors` names it.",
    429: "Too many requests, jobs or streams; come again after Retry-After seconds.",
    503: "No model is loaded yet; keys, queue or provider cannot be asked; disk or audit log cannot be written.",
}


def _header(description: str, kind: str, required: bool = True) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": kind}}


HEADERS = {
    401: {"WWW-Authenticate": _header("How to log in: Bearer.", "string")},
    416: {"Content-Range": _header("Size of the file: `bytes */SIZE`.", "string")},
    429: {"Retry-After": _header("Seconds.", "integer")},
    503: {"Retry-After": _header("Seconds.", "integer", required=False)},
}


class ProblemError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        title: the kind of problem in a few words, the same each time.
        detail: what is wrong here, and what would be right.
        errors: for each field at fault its `field` and `message`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        errors: list[dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, title, detail)
        self.status, self.title, self.detail = status, title, detail
        self.errors, self.headers = errors or [], headers or {}


def problem(status: int, detail: str, **more: Any) -> ProblemError:
    """A `ProblemError` with the usual title of its status."""
    return ProblemError(status, TITLES[status], detail, **more)


def problem_response(error: ProblemError) -> Response:
    content = Problem(title=error.title, status=error.status, detail=error.detail, errors=error.errors)
    return JSONResponse(
        content.model_dump(exclude_none=True), error.status, headers=error.headers, media_type=MEDIA_TYPE
    )


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for OpenAPI."""
    return {
        status: {
            "description": f"{TITLES[status]}. {WHY[status]}",
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            "headers": HEADERS.get(status, {}),
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem document."""

    @app.exception_handler(ProblemError)
    async def _ours(request: Request, error: ProblemError) -> Response:
        return problem_response(error)

    @app.exception_handler(HTTPException)
    async def _starlettes(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        title = TITLES.get(error.status_code, "Error")
        return problem_response(ProblemError(error.status_code, title, str(error.detail), headers=headers))

    @app.exception_handler(RequestValidationError)
    async def _pydantics(request: Request, error: RequestValidationError) -> Response:
        errors = [_field_error(e) for e in error.errors()]
        detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors[:5])
        return problem_response(problem(422, detail, errors=errors))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback; the client learns nothing of our insides.
        return problem_response(problem(500, "the service failed; its log says why"))


class PlainErrors:
    """Makes problem documents of what Starlette refuses in plain text: hosts, origins and ranges.

    Args:
        app: what comes after.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: Message | None = None
        text = b""

        async def unless_plain(message: Message) -> None:
            nonlocal refused, text
            if message["type"] == "http.response.start" and message["status"] >= 400:
                kind = Headers(raw=message["headers"]).get("content-type", "")
                refused = message if kind.startswith("text/plain") else None
            if refused is None:
                await send(message)
            else:
                text += message.get("body", b"")

        await self.app(scope, receive, unless_plain)
        if refused is not None:
            status, headers = refused["status"], Headers(raw=refused["headers"])
            kept = {name: value for name, value in headers.items() if name not in ("content-type", "content-length")}
            detail = text.decode() or f"there is only {headers.get('content-range', '')}"
            error = ProblemError(status, TITLES.get(status, "Error"), detail, headers=kept)
            await problem_response(error)(scope, receive, send)


def _field_error(error: dict[str, Any]) -> dict[str, str]:
    if error["type"] == "json_invalid":  # its location ends with a position
        return {"field": "body", "message": f"not JSON from character {error['loc'][-1]} on: {error['ctx']['error']}"}
    return {"field": _path(error["loc"]), "message": str(error["msg"])}


def _path(location: tuple[int | str, ...]) -> str:
    """`body.steps` -> `steps`: clients think in the fields that they sent."""
    parts = [str(part) for part in location]
    return ".".join(parts[1:] if parts[0] in ("body", "query", "path", "header") and len(parts) > 1 else parts)
