"""Connections that send their request too slowly, or headers without end, or read no answer, are closed.

Uvicorn bounds none of them with its fast parser. Bodies are bounded by `mlops.api.limits.RequestLimits`.
"""

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
HEADER_BYTES = 32 * 1024
READ_SECONDS = 60.0
"""A client takes nothing of its answer for at most so long."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A client that does not get its headers across in time, or sends too many, loses it."""

    _timer: TimerHandle | None = None
    _unread: TimerHandle | None = None
    _in_headers = True
    _header_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:  # the next request on a connection that is kept
            self._await_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)
        else:  # behind a body in pieces: nobody needs them, and they would pile up without end
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._in_headers, self._header_bytes = False, 0
        self._no_timer()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all_is_read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_timer()
        self._all_is_read()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        self._no_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _all_is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
