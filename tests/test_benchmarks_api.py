"""benchmarks of the service: they run against a real one, and see what goes wrong."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import api, soak
from benchmarks.api_load import Asked, at_rate, percentiles, saturate
from benchmarks.api_overload import unharmed
from benchmarks.soak import growth, is_small
from benchmarks.soak_clients import Findings

Run = Callable[[Any], dict[str, Any]]
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk, a package of Debian, is missing")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call a benchmark's main with `--tiny`, and read its result."""

    def call(module: Any) -> dict[str, Any]:
        output = tmp_path / "result.json"
        monkeypatch.setattr("sys.argv", [module.__file__, "--tiny", "--output", str(output)])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        module.main()
        result: dict[str, Any] = json.loads(output.read_text())
        return result

    return call


@needs_wrk
def test_all_that_is_measured_of_the_service_runs(run: Run, tmp_path: Path) -> None:
    result = run(api)
    for name in ("routes", "overhead", "memory", "overload"):
        assert result[name]["rows"] and isinstance(result[name]["held"], bool), name
    for row in result["routes"]["rows"]:
        assert 0 < row["p50 ms"] <= row["p95 ms"] <= row["p99 ms"] <= row["max ms"], row
        assert row["goal"] == ("reached" if row["requests/s"] >= 1000 and row["p99 ms"] < 50 else "missed")
    assert [row["jobs"] for row in result["memory"]["rows"]] == [0, 2, 4, 6]
    assert all(row["web MiB"] > 30 and row["worker MiB"] > 100 for row in result["memory"]["rows"])
    timings = result["overhead"]["timings"]
    assert result["overhead"]["overhead"] == timings["service"]["median"] / timings["script"]["median"] - 1
    rest, usual, heavy = result["overload"]["rows"]
    assert rest["accepted"] == 0 < usual["accepted"] < heavy["accepted"] + heavy["429"]
    assert heavy["other answers"] == 0 and result["overload"]["accepted jobs that were not done"] == []
    text = (tmp_path / "result.md").read_text()
    assert "| GET /v1/me |" in text and "| 10 times |" in text


def test_a_soak_kills_the_worker_and_loses_nothing(run: Run) -> None:
    result = run(soak)
    assert result["killed the worker after minutes"] > 0
    assert result["answers"]["accepted"] > 3
    assert any(name.startswith("wrong request") for name in result["answers"])
    assert result["problems"] == []
    assert all(held for name, held in result["held"].items() if "growth" not in name), result["held"]
    assert {"web MiB", "worker MiB", "open files"} <= result["readings"][0].keys()


def test_growth_is_seen() -> None:
    level, rising = [100.0, 103.0] * 10, [100.0 + n for n in range(20)]
    assert growth(level[:3]) is None and not is_small(None, 8)
    assert is_small(growth(level), 8)
    assert growth(rising) == {"before": 107.0, "after": 117.0, "growth": 10.0}
    assert not is_small(growth(rising), 8) and is_small(growth(rising), 10)


def test_a_soak_remembers_what_was_wrong() -> None:
    findings = Findings()
    for status, headers in ((200, {}), (503, {}), (429, {"Retry-After": "10"}), (429, {})):
        findings.answered("job", httpx.Response(status, headers=headers), 0.1)
    findings.answered("/ready", httpx.Response(503), 0.1)
    assert len(findings.server_errors) == len(findings.unannounced) == 1
    assert findings.counts == {"job: 200": 1, "job: 503": 1, "job: 429": 2, "/ready: 503": 1}
    assert len(findings.problems()) == 2
    assert findings.percentiles()["job"] == {"p50": 100, "p99": 100}


def test_harm_is_measured_against_the_usual_load() -> None:
    usual = {"accepted p99 ms": 40.0, "look p99 ms": 10.0}
    assert unharmed([usual, {"accepted p99 ms": 79.0, "look p99 ms": 49.0}])
    assert not unharmed([usual, {"accepted p99 ms": 81.0, "look p99 ms": 10.0}])
    assert not unharmed([usual, {"accepted p99 ms": 10.0, "look p99 ms": 51.0}])
    assert not unharmed([usual, {"accepted p99 ms": None, "look p99 ms": 10.0}])


@contextmanager
def answering(status: int, seconds: float = 0) -> Iterator[str]:
    """A server that answers everything alike; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(seconds)
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@needs_wrk
def test_wrong_answers_are_no_speed() -> None:
    with answering(404) as url:
        assert saturate(url, "key", Asked("/", status=404), 1)["requests/s"] > 1
        with pytest.raises(RuntimeError, match="status=200"):
            saturate(url, "key", Asked("/"), 1)


def test_times_count_from_when_a_request_was_due() -> None:
    with answering(200, 0.1) as url:
        raw = Asked("/").raw("127.0.0.1", "key")
        answers = asyncio.run(at_rate(url, lambda number: raw, 50, 0.2))
        assert [(answer.status, answer.body) for answer in answers] == [(200, b"ok")] * 10
        assert all(answer.seconds > 0.09 for answer in answers)
        assert [round(answer.due - answers[0].due, 3) for answer in answers[:3]] == [0, 0.02, 0.04]
        (late,) = asyncio.run(at_rate(url, lambda number: raw, 1, 1, timeout=0.01))
        assert late.status == 0
    (refused,) = asyncio.run(at_rate(url, lambda number: raw, 1, 1))
    assert refused.status == 0
    assert percentiles([0.001] * 99 + [1.0])["max ms"] == 1000
