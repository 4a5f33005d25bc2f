"""The service does what its OpenAPI document says: schemathesis calls every route with what that allows and forbids.

All of its checks run, in all of its phases, with API keys on. Narrowed, and why:

- What a request may ask for depends on the model (`GET /v1/models`), which OpenAPI cannot say. The document that
  schemathesis gets says it for the one model of this test; otherwise good requests would be refused with 422.
- Whether a range lies in a file depends on the file: 400 and 416 count as right answers to ranges of the right form.
- A good `Idempotency-Key` that was used for another request is refused, as it should be, and schemathesis repeats
  keys: it gets to try wrong ones only. tests/test_api_routes.py tries good ones.
- `object_level_authorization` needs two users; tests/test_api_security.py has them. `max_response_time` measures
  nothing on a machine that also runs other tests.
- Limits of requests and jobs are so high that 429 hides nothing; their tests are elsewhere. Without keys everybody is
  admin, so that nothing of the document's `security` could be checked.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
from service import Service

from mlops.api import schemas
from mlops.api.problems import MEDIA_TYPE

LIMITS = {
    "requests_per_minute": 1_000_000,
    "max_jobs_per_caller": 10_000,
    "max_queue": 10_000,
    "max_num": 2,
    "max_steps": 3,
    "max_wait_seconds": 1,
}
CONFIG = """
suppress-health-check = ["all"]
continue-on-failure = true
request-timeout = 30
color = false

[generation]
deterministic = true
max-examples = {examples}

[phases.stateful]
generation.max-examples = {examples}

[checks]
object_level_authorization.enabled = false

[[operations]]
include-operation-id = "get_file"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "416"]
"""
OPERATIONS = {
    "create_job",
    "list_jobs",
    "get_job",
    "follow_job",
    "get_file",
    "delete_job",
    "list_models",
    "reload_models",
    "who_am_i",
    "health",
    "ready",
    "get_metrics",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"), **LIMITS)
    service.key = service.make_key("admin")
    try:
        yield service.start()
    finally:
        service.stop()


@pytest.fixture
def document(service: Service) -> dict[str, Any]:
    return dict(httpx.get(f"{service.url}/openapi.json").json())


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        yield from operations.values()


def narrowed(document: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any]:
    """The document, with what the only model offers."""
    ((version,), name) = models[0]["versions"], models[0]["name"]
    asked = document["components"]["schemas"]["SampleRequest"]["properties"]
    asked["model"] = {"enum": [name, None]}
    asked["scheduler"] = {"enum": [*version["schedulers"], None]}
    assert version["conditions"] == {}
    asked["conditions"]["maxProperties"] = 0
    return document


def without_key(document: dict[str, Any]) -> dict[str, Any]:
    """The document without the header Idempotency-Key."""
    operation = document["paths"]["/v1/samples"]["post"]
    operation["parameters"] = [p for p in operation["parameters"] if p["name"] != "Idempotency-Key"]
    return document


def schemathesis(
    service: Service, document: dict[str, Any], folder: Path, *options: str, examples: int = 10
) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, in a folder of its own, so that it remembers nothing."""
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "schemathesis.toml").write_text(CONFIG.format(examples=examples))
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json", f"--url={service.url}"]
    return subprocess.run(
        [*command, f"--header=Authorization: Bearer {service.key}", *options],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_schemathesis_finds_nothing(service: Service, document: dict[str, Any], tmp_path: Path) -> None:
    with service.client() as client:
        document = narrowed(document, client.get("/v1/models").json()["models"])
    result = schemathesis(service, without_key(document), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Tested: {len(OPERATIONS)}" in result.stdout


def test_wrong_requests_for_volumes_are_refused(service: Service, document: dict[str, Any], tmp_path: Path) -> None:
    options = ("--include-operation-id=create_job", "--mode=negative", "--phases=coverage,fuzzing")
    result = schemathesis(service, document, tmp_path, *options, examples=30)
    assert result.returncode == 0, result.stdout + result.stderr


def test_schemathesis_would_find_something(service: Service, document: dict[str, Any], tmp_path: Path) -> None:
    del document["paths"]["/v1/jobs/{id}"]["get"]["responses"]["404"]
    result = schemathesis(
        service, document, tmp_path, "--include-operation-id=get_job", "--phases=coverage", examples=1
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Received: 404" in result.stdout


def test_the_document_says_what_clients_need(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert {operation["operationId"] for operation in operations(document)} == OPERATIONS
    for operation in operations(document):
        assert operation["summary"] and operation["description"].endswith(".")
        assert not any("Successful Response" in answer["description"] for answer in operation["responses"].values())
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (operation["operationId"], parameter["name"])


def test_every_error_is_a_problem_document(document: dict[str, Any]) -> None:
    for operation in operations(document):
        errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
        if operation["operationId"] == "ready":
            assert set(errors.pop("503")["content"]) == {"application/json"}  # says what is not ready
        assert errors
        assert all(set(answer["content"]) == {MEDIA_TYPE} for answer in errors.values())


def test_the_document_shows_this_services_limits(document: dict[str, Any]) -> None:
    asked = document["components"]["schemas"]["SampleRequest"]["properties"]
    assert asked["num"]["maximum"] == LIMITS["max_num"]
    assert asked["seed"]["maximum"] == 2**63 - 1
    assert asked["steps"]["anyOf"][0]["maximum"] == LIMITS["max_steps"]
    (wait,) = (p for p in document["paths"]["/v1/samples"]["post"]["parameters"] if p["name"] == "wait")
    assert wait["schema"]["maximum"] == LIMITS["max_wait_seconds"]


@pytest.mark.parametrize("name", ["SampleRequest", "Job", "Me", "ReloadResult", "Problem"])
def test_examples_are_what_they_show(document: dict[str, Any], name: str) -> None:
    model: type[pydantic.BaseModel] = getattr(schemas, name)
    examples = document["components"]["schemas"][name]["examples"]
    assert examples
    for example in examples:
        model.model_validate_json(json.dumps(example))
