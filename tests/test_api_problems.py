"""Errors that come from around the routes are problem documents too."""

import asyncio
from pathlib import Path

import httpx
import pytest

from mlops.api.app import create_app
from mlops.api.settings import Settings

PAGE = "https://viewer.example"


def ask(folder: Path, method: str, path: str, **headers: str) -> httpx.Response:
    app = create_app(Settings(data_dir=folder, trusted_hosts="brains.example,127.0.0.1", cors_origins=PAGE))

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(call())


@pytest.mark.parametrize("path", ["/health", "/v1/jobs", "/", "/openapi.json"])
def test_a_foreign_host(tmp_path: Path, path: str) -> None:
    answer = ask(tmp_path, "GET", path, Host="evil.example")
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["detail"] == "Invalid host header"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert len(answer.headers["x-request-id"]) == 16


def test_a_preflight_of_a_foreign_page(tmp_path: Path) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    refused = ask(tmp_path, "OPTIONS", "/v1/samples", Origin="https://evil.example", **asked)
    assert (refused.status_code, refused.headers["content-type"]) == (400, "application/problem+json")
    assert "access-control-allow-origin" not in refused.headers
    assert refused.json()["detail"].startswith("Disallowed CORS origin")
    allowed = ask(tmp_path, "OPTIONS", "/v1/samples", Origin=PAGE, **asked)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)


def test_plain_text_that_is_no_error_stays(tmp_path: Path) -> None:
    answer = ask(tmp_path, "GET", "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert "ldm3d_http_requests_total" in answer.text
