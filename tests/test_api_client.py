"""The client, against the real service, and against a connection that breaks."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import Service, running

from mlops.api import client as module
from mlops.api.client import Client, ServiceError


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), max_num=4, max_jobs_per_caller=20) as started:
        yield started


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01, 0.01))


class Broken(ThreadingHTTPServer):
    """In front of a service: hands on what it gets, and cuts the connection before so many of the answers."""

    def __init__(self, address: str, cuts: int):
        super().__init__(("127.0.0.1", 0), Relay)
        self.behind, self.cuts, self.seen = address, cuts, 0
        self.damage = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Relay(BaseHTTPRequestHandler):
    server: Broken

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        answer = httpx.request(self.command, self.server.behind + self.path, content=body, headers=headers)
        self.server.seen += 1
        if self.server.seen <= self.server.cuts:
            self.close_connection = True
            return
        content = answer.content[:-1] + b"?" if self.server.damage else answer.content
        self.send_response(answer.status_code)
        self.send_header("content-type", answer.headers["content-type"])
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def broken(service: Service) -> Iterator[Broken]:
    server = Broken(service.url, cuts=2)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def number_of_jobs(service: Service) -> int:
    return len(list((service.data / "jobs").glob("[!.]*")))


def test_from_request_to_files(service: Service, tmp_path: Path) -> None:
    with Client(service.url) as client:
        job = client.wait(client.submit(num=2, seed=3, steps=2))
        paths = client.download(job, tmp_path / "brains")
    assert [path.name for path in paths] == [file["name"] for file in job["files"]]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "brains").iterdir()} == {
        file["name"]: file["sha256"] for file in job["files"]
    }


def test_a_broken_connection_makes_no_second_job(service: Service, broken: Broken, tmp_path: Path) -> None:
    before = number_of_jobs(service)
    with Client(broken.url) as client:
        job = client.submit(seed=4, steps=2)
        assert broken.seen == 3  # two answers were lost after the service had made a job
        assert number_of_jobs(service) == before + 1
        broken.cuts += 2
        job = client.wait(job)
        broken.cuts = broken.seen + 2
        assert len(client.download(job, tmp_path)) == 3


def test_two_requests_are_two_jobs(service: Service) -> None:
    with Client(service.url) as client:
        assert client.submit(seed=5, steps=1)["id"] != client.submit(seed=5, steps=1)["id"]


def test_a_damaged_file_is_not_kept(service: Service, broken: Broken, tmp_path: Path) -> None:
    with Client(service.url) as client:
        job = client.wait(client.submit(seed=6, steps=1))
    broken.cuts, broken.damage = 0, True
    with Client(broken.url) as client, pytest.raises(ServiceError, match=r"synimg_6_0\.json has come damaged"):
        client.download(job, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".part"]


def test_errors_say_what_the_service_says(service: Service) -> None:
    with Client(service.url) as client:
        with pytest.raises(ServiceError, match="num 5: must be between 1 and 4") as refused:
            client.submit(num=5)
        assert refused.value.status == 422
        job = client.submit(num=4, steps=1000)
        with pytest.raises(ServiceError, match=f"job {job['id']} is (queued|running)"):
            client.wait(job, seconds=0)
        client.delete(f"/v1/jobs/{job['id']}")
        with pytest.raises(ServiceError, match="no such job"):
            client.wait(job)


def test_a_service_that_stays_away(tmp_path: Path) -> None:
    service = Service(tmp_path)
    with Client(service.url) as client, pytest.raises(httpx.ConnectError):
        client.submit()
