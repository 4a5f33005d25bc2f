"""Bounds of what one client can take: size and speed of requests, their number, streams at once."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from redis.exceptions import RedisError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlops.api.problems import ProblemError, problem, problem_response

FAILURES_PER_MINUTE = 30
"""Wrong keys from one address."""
ALONE_SECONDS = 10.0
"""Redis is asked again after this time."""


class RateLimit:
    """Requests of one caller, counted on this web process, or on Redis for all of them.

    Args:
        per_minute: requests to all routes together.
        queue_url: of Redis; empty for this process's memory.
    """

    def __init__(self, per_minute: int, queue_url: str):
        self._alone = SlidingWindowCounterRateLimiter(storage_from_string("async+memory://"))
        self._shared = self._alone
        if queue_url:
            options: Any = {"implementation": "redispy", "socket_timeout": 1, "socket_connect_timeout": 1}
            self._shared = SlidingWindowCounterRateLimiter(storage_from_string(f"async+{queue_url}", **options))
        self._shared_from = 0.0
        self._requests = RateLimitItemPerMinute(per_minute)
        self._failures = RateLimitItemPerMinute(FAILURES_PER_MINUTE)

    async def count(self, caller_id: str) -> None:
        """Count a request. Raises a `ProblemError` 429 where there were too many."""
        if not await self._hit(self._requests, f"caller:{caller_id}"):
            raise too_many(f"more than {self._requests.amount} requests in a minute")

    async def count_failure(self, address: str) -> None:
        """Count a wrong key. Raises a `ProblemError` 429 where too many have come from this address."""
        if not await self._hit(self._failures, f"failures:{address}"):
            raise too_many("too many wrong keys from this address")

    async def _hit(self, item: RateLimitItemPerMinute, name: str) -> bool:
        """Redis that does not answer must not end the service: this process then counts by itself for a while."""
        if time.monotonic() >= self._shared_from:
            try:
                return await self._shared.hit(item, name)
            except (RedisError, StorageError, OSError):
                self._shared_from = time.monotonic() + ALONE_SECONDS
        return await self._alone.hit(item, name)


def too_many(detail: str, retry_seconds: int = 10) -> ProblemError:
    """A 429 that says when to come again."""
    return problem(429, f"{detail}; come again in {retry_seconds} s", headers={"Retry-After": str(retry_seconds)})


class Streams:
    """Requests that wait and event streams: each holds a connection, so there are only so many.

    Args:
        most: at once. One caller may have half of them.
    """

    def __init__(self, most: int):
        self.most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def one(self, caller_id: str) -> Iterator[None]:
        """Raises a `ProblemError` 429 where there are too many."""
        if (count := self._open.total()) >= self.most:
            raise too_many(f"{count} clients wait or listen already, which is all that this service takes")
        if (own := self._open[caller_id]) >= max(1, self.most // 2):
            raise too_many(f"you wait or listen {own} times already, which is all that one caller may")
        self._open[caller_id] += 1
        try:
            yield
        finally:
            self._open -= Counter([caller_id])


class RequestLimits:
    """Refuses bodies that are too large or come too slowly.

    Args:
        app: what comes after.
        max_bytes: of a body.
        seconds: within which all of it must have come.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            await self._refuse(413, f"at most {self.max_bytes} bytes are taken", scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self.seconds)
        except TimeoutError:
            await self._refuse(408, f"the request took longer than {self.seconds:g} s to come", scope, receive, send)
            return
        if len(body) > self.max_bytes:
            await self._refuse(413, f"at most {self.max_bytes} bytes are taken", scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        body = b""
        while len(body) <= self.max_bytes:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        return body

    async def _refuse(self, status: int, detail: str, scope: Scope, receive: Receive, send: Send) -> None:
        # What still comes is not read: the connection cannot be used again.
        await problem_response(problem(status, detail, headers={"Connection": "close"}))(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    first = True

    async def replayed() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
