"""Several callers: who may do what, who sees what, how much one may take."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from service import DEADLINE_SECONDS, Service, finished, until

from mlops.api.callers import Role
from mlops.api.connections import HEADER_SECONDS
from mlops.api.security import ACCESS

ROLES = ("viewer", "operator", "admin")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("callers")
    service = Service(folder, max_jobs_per_caller=2, max_queue=3, request_seconds=3, max_streams=4)
    service.key = service.make_key("admin", "chief")
    with running_with(service) as started:
        yield started


class running_with:
    """`running`, of a service that is made already."""

    def __init__(self, service: Service):
        self.service = service

    def __enter__(self) -> Service:
        return self.service.start()

    def __exit__(self, *_: object) -> None:
        self.service.stop()


@pytest.fixture(scope="module")
def keys(service: Service) -> dict[str, str]:
    return {role: service.make_key(role, role) for role in ROLES}


@pytest.fixture
def operator(service: Service) -> Iterator[httpx.Client]:
    """A caller of its own for each test, whose jobs are removed in the end."""
    with service.client(service.make_key("operator", "tester")) as client:
        yield client
        for job in client.get("/v1/jobs", params={"limit": 100}).json()["jobs"]:
            client.delete(f"/v1/jobs/{job['id']}")


def example(path: str) -> str:
    return path.replace("{id}", "0" * 26).replace("{name}", "x.png").replace("/static", "/static/app.js")


@pytest.mark.parametrize(("method", "path"), ACCESS, ids=lambda part: part)
def test_each_route_asks_for_its_role(service: Service, keys: dict[str, str], method: str, path: str) -> None:
    needed = ACCESS[method, path]
    body = {"json": {"steps": 0}} if method == "POST" else {}  # refused after the caller is known
    for role, key in [("nobody", ""), *keys.items()]:
        if path == "/v1/admin/reload" and role == "admin":
            continue
        with service.client(key) if key else httpx.Client(base_url=service.url) as client:
            status = client.request(method, example(path), **body).status_code
        may = needed is None or (role != "nobody" and Role.named(role) >= needed)
        assert (status not in (401, 403)) == may, (role, status)
        if not may:
            assert status == (401 if role == "nobody" else 403)


def test_nobody_sees_or_touches_foreign_jobs(service: Service, operator: httpx.Client, keys: dict[str, str]) -> None:
    job = operator.post("/v1/samples?wait=60", json={"steps": 1}).json()
    assert job["state"] == "done"
    address = f"/v1/jobs/{job['id']}"
    with service.client(keys["operator"]) as other, service.client(keys["admin"]) as admin:
        for client in (other, admin):
            for path in (address, f"{address}/events", f"{address}/files/{job['files'][0]['name']}"):
                assert client.get(path).status_code == 404
            assert client.delete(address).status_code == 404
            assert job["id"] not in [seen["id"] for seen in client.get("/v1/jobs").json()["jobs"]]
    assert operator.get(address).json()["state"] == "done"


def test_idempotency_keys_are_each_callers_own(service: Service, operator: httpx.Client, keys: dict[str, str]) -> None:
    headers, asked = {"Idempotency-Key": "same"}, {"steps": 1}
    mine = operator.post("/v1/samples?wait=60", json=asked, headers=headers).json()
    with service.client(keys["operator"]) as other:
        theirs = other.post("/v1/samples?wait=60", json=asked, headers=headers).json()
    assert mine["id"] != theirs["id"]


def test_a_revoked_key_ends_at_once(service: Service) -> None:
    key = service.make_key("viewer", "leaver")
    with service.client(key) as client:
        assert client.get("/v1/me").json()["role"] == "viewer"
        command = [sys.executable, "-m", "mlops.api.keys", "revoke", key.split("_")[1]]
        subprocess.run(command, env=service.environment, check=True, capture_output=True)
        assert client.get("/v1/me").status_code == 401


def test_one_caller_cannot_take_the_whole_queue(service: Service, operator: httpx.Client) -> None:
    long = {"num": 30, "steps": 50}
    answers = [operator.post("/v1/samples", json=long | {"seed": i}) for i in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert int(answers[2].headers["retry-after"]) > 0
    assert "all that one caller may have" in answers[2].json()["detail"]
    with service.client(service.make_key("operator", "second")) as second:
        taken = second.post("/v1/samples", json={"steps": 1})
        assert taken.status_code == 202
        with service.client(service.make_key("operator", "third")) as third:
            full = third.post("/v1/samples", json={"steps": 1})
            assert full.status_code == 429
            assert "all that this service takes" in full.json()["detail"]
        for answer in answers[:2]:
            operator.delete(f"/v1/jobs/{answer.json()['id']}")
        assert finished(second, taken.json()["id"])["state"] == "done"


def test_only_so_many_streams_at_once(service: Service, operator: httpx.Client) -> None:
    job = operator.post("/v1/samples", json={"num": 30, "steps": 50}).json()
    address = f"/v1/jobs/{job['id']}/events"
    with operator.stream("GET", address) as first, operator.stream("GET", address) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        refused = operator.get(address)
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
        before = [job["id"] for job in operator.get("/v1/jobs").json()["jobs"]]
        assert operator.post("/v1/samples?wait=1", json={"steps": 1}).status_code == 429
        assert [job["id"] for job in operator.get("/v1/jobs").json()["jobs"]] == before  # who is refused has no job
        with service.client(service.make_key("operator", "another")) as other:  # who is not kept out
            assert other.post("/v1/samples?wait=0.2", json={"steps": 1}).status_code == 202
    until(
        lambda: operator.post("/v1/samples?wait=0.2", json={"steps": 1}).status_code == 202,
        "streams are given back",
        10,
    )


def test_calling_too_often(tmp_path: Any) -> None:
    service = Service(tmp_path, requests_per_minute=20)
    service.key = service.make_key("viewer")
    with running_with(service), service.client() as client:
        statuses = [client.get("/v1/me").status_code for _ in range(25)]
        assert statuses == [200] * 20 + [429] * 5
        assert client.get("/health").status_code == 200
        with service.client("ldm3d_00000000_" + "a" * 43) as guesser:
            answers = [guesser.get("/v1/me") for _ in range(40)]
        assert {answer.status_code for answer in answers[:30]} == {401}
        assert {answer.status_code for answer in answers[31:]} == {429}
        assert all("retry-after" in answer.headers for answer in answers[31:])


def test_without_a_key_only_this_machine_is_served(tmp_path: Any) -> None:
    service = Service(tmp_path, host="0.0.0.0").start(wait=False)
    assert service.process
    assert service.process.wait(DEADLINE_SECONDS) == 2
    assert "mlops.api.keys create" in service.log()


def test_slow_clients_are_dropped_and_starve_nobody(service: Service, operator: httpx.Client) -> None:
    def connect(sent: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", service.port))
        connection.sendall(sent)
        return connection

    head = b"POST /v1/samples HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    silent = [connect(b"") for _ in range(100)]
    slow_heads = [connect(b"GET /health HTTP/1.1\r\nX-A: ") for _ in range(100)]
    slow_bodies = [connect(head + b"Content-Length: 50\r\n\r\n{") for _ in range(20)]
    started = time.monotonic()
    assert operator.get("/v1/me").status_code == 200
    assert time.monotonic() - started < HEADER_SECONDS / 2  # before any of them is dropped
    for connection in slow_bodies:
        connection.settimeout(DEADLINE_SECONDS)
        assert connection.recv(200).startswith(b"HTTP/1.1 408")
    for connection in [*silent, *slow_heads]:
        connection.settimeout(DEADLINE_SECONDS)
        with pytest.raises((ConnectionResetError, EOFError)):
            if connection.recv(100) == b"":
                raise EOFError
    endless = connect(b"GET /health HTTP/1.1\r\n")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        for _ in range(10_000):
            endless.sendall(b"X-A: " + b"b" * 1000 + b"\r\n")


def test_a_client_that_goes_away_while_it_waits_leaves_nothing_open(service: Service, operator: httpx.Client) -> None:
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            operator.post(
                "/v1/samples?wait=60", json={"num": 20, "steps": 50}, timeout=0.3, headers={"Idempotency-Key": "g"}
            )
    job = operator.get("/v1/jobs").json()["jobs"][0]
    address = f"/v1/jobs/{job['id']}/events"

    def free() -> bool:
        with operator.stream("GET", address) as stream:
            return stream.status_code == 200

    until(free, "the places of those that went are free", 45)  # not only after the 60 s


def test_the_audit_log_tells_who_did_what(service: Service, operator: httpx.Client) -> None:
    job = operator.post("/v1/samples?wait=60", json={"steps": 1}).json()
    operator.get(f"/v1/jobs/{job['id']}/files/{job['files'][0]['name']}")
    operator.delete(f"/v1/jobs/{job['id']}")
    with service.client("wrong") as stranger:
        stranger.get("/v1/jobs")
    me = operator.get("/v1/me").json()

    def entries() -> list[dict[str, Any]]:
        lines = (service.data / "audit" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    until(lambda: any(e["job"] == job["id"] and e["what"].startswith("DELETE") for e in entries()), "it is written", 10)
    mine = [(e["what"], e["outcome"]) for e in entries() if e["job"] == job["id"] and e["caller"] == me["id"]]
    assert mine == [
        ("POST /v1/samples", 200),
        ("GET /v1/jobs/{id}/files/{name}", 200),
        ("DELETE /v1/jobs/{id}", 204),
    ]
    assert ("GET /v1/jobs", 401, None) in [(e["what"], e["outcome"], e["caller"]) for e in entries()]
    secret = operator.headers["authorization"].split("_")[-1]
    assert secret not in (service.data / "audit" / "audit.jsonl").read_text()
    verify = [sys.executable, "-m", "mlops.api.audit", "verify", "--folder", str(service.data / "audit")]
    assert subprocess.run(verify, env=service.environment, capture_output=True).returncode == 0


def test_requests_at_once_with_one_key_make_one_job(operator: httpx.Client) -> None:
    found: list[str] = []

    def ask() -> None:
        answer = operator.post("/v1/samples", json={"steps": 1}, headers={"Idempotency-Key": "race"})
        found.append(answer.json()["id"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
