"""Errors of the API as RFC 9457 problem documents."""

from typing import Any


class ProblemError(Exception):
    """An error that the client is told of."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        errors: list[dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
    ):
        self.status, self.title, self.detail = status, title, detail
        self.errors, self.headers = errors or [], headers or {}
        super().__init__(status, title, detail)
