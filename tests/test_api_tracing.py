"""Traces: from a caller's span over the request and the job to sampling and decoding, in a real service."""

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service import DEADLINE_SECONDS, ROOT, Service, finished, free_port, running, until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """What a collector gets by OTLP over HTTP: spans by name, each with the name of its service."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[str, Any]]] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.take(gzip.decompress(content) if self.headers["Content-Encoding"] == "gzip" else content)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def take(self, content: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.setdefault(span.name, []).append((service, span))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    made = Receiver()
    yield made
    made.server.shutdown()


def test_a_request_is_followed_to_its_end(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with running(tmp_path) as service, service.client() as client:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        job = client.post("/v1/samples", json={"num": 2, "steps": 3}, headers=headers).json()["id"]
        assert finished(client, job)["state"] == "done"
        until(lambda: "job" in receiver.spans, "the job's span comes")
    assert [name for name in receiver.spans if name.startswith("POST")] == ["POST /v1/samples"]
    (api, request), (worker, made) = receiver.spans["POST /v1/samples"][0], receiver.spans["job"][0]
    assert (api, worker) == ("ldm3d-api", "ldm3d-worker")
    assert request.parent_span_id.hex() == SPAN
    assert made.parent_span_id == request.span_id
    attributes = {a.key: a.value for a in made.attributes}
    assert attributes["ldm3d.job"].string_value == job and attributes["ldm3d.state"].string_value == "done"
    for name in ("sampling", "decoding"):
        ((_, span),) = receiver.spans[name]
        assert span.parent_span_id == made.span_id
        assert made.start_time_unix_nano <= span.start_time_unix_nano < span.end_time_unix_nano
        assert span.end_time_unix_nano <= made.end_time_unix_nano
    spans = [span for found in receiver.spans.values() for _, span in found]
    assert {span.trace_id.hex() for span in spans if span.name in ("job", "decoding")} == {TRACE}
    assert not any("/ready" in name for name in receiver.spans)
    assert "local" not in str(receiver.spans)  # the caller's name


def test_a_receiver_that_is_not_there_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    service = Service(tmp_path).start()
    with service.client() as client:
        assert client.post("/v1/samples?wait=60", json={"steps": 1}).json()["state"] == "done"
    began = time.monotonic()
    service.stop()
    assert time.monotonic() - began < 15


def test_nothing_is_set_up_where_nothing_is_traced() -> None:
    code = (
        "import sys, threading; from mlops.api import tracing; tracing.start('x'); import mlops.api.app\n"
        "assert tracing.here() is None and not tracing.of_requests()['tracing']\n"
        "tracing.part(tracing.begin('job', None), 'sampling', 0, 1); tracing.end(None, 'done'); tracing.stop()\n"
        "assert threading.active_count() == 1\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.exporter')]"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    environment |= {"OTEL_TRACES_EXPORTER": "", "OTEL_EXPORTER_OTLP_ENDPOINT": ""}  # as container files leave them
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_exporter_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier_pigeon")
    service = Service(tmp_path).start(wait=False)
    assert service.process and service.process.wait(DEADLINE_SECONDS) == 2
    assert "error: OTEL_TRACES_EXPORTER: no exporter carrier_pigeon is installed; there are:" in service.log()
