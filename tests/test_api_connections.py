"""Clients that send without end, or take nothing of what they asked for."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from service import until

from mlops.api import connections
from mlops.api.connections import GuardedProtocol


async def large(scope: Any, receive: Any, send: Any) -> None:
    """More than sockets buffer."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(200):
        await send({"type": "http.response.body", "body": bytes(2**18), "more_body": True})
    await send({"type": "http.response.body"})


@pytest.fixture
def server() -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(large, http=GuardedProtocol, lifespan="off", log_level="error"))


@pytest.fixture
def connection(server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setattr(connections, "READ_SECONDS", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    with socket.create_connection(listener.getsockname()) as made:
        made.settimeout(120)
        yield made
    server.should_exit = True
    thread.join()


def test_headers_behind_a_body_are_not_collected(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        for _ in range(10_000):
            connection.sendall(b"a: b\r\n" * 1000)


def test_a_client_that_reads_nothing_loses_its_connection(server: uvicorn.Server, connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    until(lambda: server.server_state.connections, "the connection is there")
    until(lambda: not server.server_state.connections, "nothing has been read for longer than is allowed")
    taken = 0
    with pytest.raises(ConnectionResetError):
        while part := connection.recv(2**20):
            taken += len(part)
        assert taken < 200 * 2**18
        raise ConnectionResetError


def test_a_slow_reader_gets_all(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    taken, began = 0, time.monotonic()
    while part := connection.recv(2**20):
        taken += len(part)
        time.sleep(0.02)
    assert time.monotonic() - began > connections.READ_SECONDS
    assert taken > 200 * 2**18
