"""Errors as RFC 9457 problem documents: what is wrong, with which field, and when to come again."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mlops.api.schemas import Problem

MEDIA_TYPE = "application/problem+json"
TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Request too slow",
    409: "Conflict",
    413: "Body too large",
    415: "Not JSON",
    416: "No such range",
    421: "Not this host",
    422: "Cannot be used",
    429: "Too many",
    500: "Our mistake",
    503: "Not ready",
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
            "description": TITLES[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
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
        errors = [{"field": _path(e["loc"]), "message": e["msg"]} for e in error.errors()]
        detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors[:5])
        return problem_response(problem(422, detail, errors=errors))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback; the client learns nothing of our insides.
        return problem_response(problem(500, "the service failed; its log says why"))


def _path(location: tuple[int | str, ...]) -> str:
    """`body.steps` -> `steps`: clients think in the fields that they sent."""
    parts = [str(part) for part in location]
    return ".".join(parts[1:] if parts[0] in ("body", "query", "path", "header") and len(parts) > 1 else parts)
