"""mlops/docker/nginx.conf, as a real nginx understands it, in front of a small application."""

import asyncio
import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

ROOT = Path(__file__).resolve().parents[1]
NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if Path("/usr/sbin/nginx").exists() else None)
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian's package nginx-light)")
SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"nobody listens at port {port}")


@dataclass
class Behind:
    """The service's stand-in: tells what reaches it."""

    port: int = field(default_factory=free_port)
    paths: list[str] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    async def echo(self, request: Request) -> JSONResponse:
        self.paths.append(request.url.path)
        return JSONResponse({"headers": dict(request.headers), "bytes": len(await request.body())})

    async def events(self, request: Request) -> StreamingResponse:
        self.paths.append(request.url.path)

        async def stream() -> AsyncIterator[str]:
            yield "event: progress\ndata: {}\n\n"
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            yield "event: end\ndata: {}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    def app(self) -> Starlette:
        everything = Route("/{path:path}", self.echo, methods=["GET", "POST"])
        return Starlette(routes=[Route("/v1/jobs/{id}/events", self.events), everything])


@pytest.fixture(scope="module")
def behind() -> Iterator[Behind]:
    behind = Behind()
    server = uvicorn.Server(uvicorn.Config(behind.app(), port=behind.port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(behind.port)
    yield behind
    behind.go_on.set()
    server.should_exit = True
    thread.join()


def make_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "brains")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@dataclass
class Front:
    """nginx with the file of this repository: ports and paths alone are changed."""

    folder: Path
    service: int
    plain: int = field(default_factory=free_port)
    tls: int = field(default_factory=free_port)

    def configuration(self) -> str:
        text = (ROOT / "mlops" / "docker" / "nginx.conf").read_text()
        changes = {
            "/etc/nginx/tls/": f"{self.folder}/",
            "pid /run/nginx.pid;": f"pid {self.folder}/pid; daemon off; master_process off;",
            "/dev/stdout": f"{self.folder}/access.log",
            "listen 80;": f"listen 127.0.0.1:{self.plain};",
            "listen [::]:80;": "",
            "listen 443 ssl": f"listen 127.0.0.1:{self.tls} ssl",
            "listen [::]:443 ssl http2;": "",
            "127.0.0.1:8000": f"127.0.0.1:{self.service}",
            "http {": "http {"
            + "".join(
                f"{kind}_temp_path {self.folder}/{kind};"
                for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            ),
        }
        for before, after in changes.items():
            assert before in text, before
            text = text.replace(before, after)
        return text

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.folder / "tls.crt"))
        return httpx.Client(base_url=f"https://127.0.0.1:{self.tls}", verify=context, trust_env=False, timeout=SECONDS)


def run_nginx(folder: Path, service: int) -> Iterator[Front]:
    front = Front(folder, service)
    make_certificate(folder)
    (folder / "nginx.conf").write_text(front.configuration())
    line = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    checked = subprocess.run([*line, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen(line)
    try:
        wait_for(front.tls)
        yield front
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture(scope="module")
def front(behind: Behind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    yield from run_nginx(tmp_path_factory.mktemp("nginx"), behind.port)


@pytest.fixture
def client(front: Front) -> Iterator[httpx.Client]:
    with front.client() as client:
        yield client


def test_plain_http_is_sent_to_tls(front: Front) -> None:
    answer = httpx.get(f"http://127.0.0.1:{front.plain}/v1/me?x=1", trust_env=False)
    assert answer.status_code == 308 and answer.headers["Location"] == "https://127.0.0.1/v1/me?x=1"


def test_the_service_learns_who_calls_and_how(client: httpx.Client, front: Front) -> None:
    spoofed = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9", "X-Forwarded-Proto": "gopher"}
    answer = client.get("/v1/me", headers={"Authorization": "Bearer x", **spoofed})
    heard = answer.json()["headers"]
    assert heard["x-forwarded-for"] == "127.0.0.1" and heard["x-forwarded-proto"] == "https"
    assert heard["host"] == f"127.0.0.1:{front.tls}" and heard["authorization"] == "Bearer x"
    assert "forwarded" not in heard
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_under_a_path_of_its_own(client: httpx.Client, behind: Behind) -> None:
    behind.paths.clear()
    for path in ("/brains/", "/brains/v1/jobs", "/brains/v1/jobs/7/files/a%20b.nii"):
        assert client.get(path).status_code == 200
    assert behind.paths == ["/", "/v1/jobs", "/v1/jobs/7/files/a b.nii"]


@pytest.mark.parametrize("path", ["/v1/jobs/7/events", "/brains/v1/jobs/7/events"])
def test_progress_is_not_held_back(client: httpx.Client, behind: Behind, path: str) -> None:
    behind.go_on.clear()
    with client.stream("GET", path) as answer:
        text = answer.iter_text()
        assert next(text).startswith("event: progress")
        behind.go_on.set()
        assert "event: end" in "".join(text)
    assert behind.paths[-1] == "/v1/jobs/7/events"


def test_metrics_are_not_for_the_world(client: httpx.Client, behind: Behind) -> None:
    behind.paths.clear()
    assert [client.get(path).status_code for path in ("/metrics", "/brains/metrics")] == [403, 403]
    assert behind.paths == []


def test_a_large_body_is_refused(client: httpx.Client, behind: Behind) -> None:
    assert client.post("/v1/samples", content=b"x" * 64 * 1024).json()["bytes"] == 64 * 1024
    behind.paths.clear()
    refused = client.post("/v1/samples", content=b"x" * (64 * 1024 + 1))
    assert refused.status_code == 413 and refused.json()["status"] == 413
    assert refused.headers["Content-Type"] == "application/problem+json" and behind.paths == []


def test_a_slow_client_does_not_reach_the_service(client: httpx.Client, front: Front, behind: Behind) -> None:
    behind.paths.clear()
    context = ssl.create_default_context(cafile=str(front.folder / "tls.crt"))
    with (
        socket.create_connection(("127.0.0.1", front.tls), SECONDS) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as slow,
    ):
        slow.sendall(b"POST /v1/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        assert client.get("/v1/quick").status_code == 200
        assert behind.paths == ["/v1/quick"]
        slow.sendall(b"67890")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    assert behind.paths == ["/v1/quick", "/v1/slow"]


def test_nothing_secret_is_logged(client: httpx.Client, front: Front) -> None:
    client.get("/v1/logged?access_token=s3cret", headers={"Authorization": "Bearer s3cret"})
    deadline = time.monotonic() + SECONDS
    while "/v1/logged" not in (front.folder / "access.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "s3cret" not in (front.folder / "access.log").read_text()


def test_a_service_that_is_down_is_503(tmp_path: Path) -> None:
    for front in run_nginx(tmp_path, free_port()):
        with front.client() as client:
            answer = client.get("/v1/me")
        assert answer.status_code == 503 and answer.json()["status"] == 503 and answer.headers["Retry-After"] == "5"


def test_too_many_requests_of_one_address_are_refused(client: httpx.Client) -> None:
    answers = []
    for _ in range(5000):  # 200 at once, and then 50 a second
        answers.append(client.get("/v1/me"))
        if answers[-1].status_code != 200:
            break
    assert len(answers) > 200 - 20, "what the tests above took of the 200 has come back"
    assert answers[-1].status_code == 429 and answers[-1].json()["status"] == 429
    assert answers[-1].headers["Retry-After"] == "1"
