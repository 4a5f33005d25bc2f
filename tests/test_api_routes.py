"""The service as its clients see it: every route, by real requests to real processes."""

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import pytest
import tiny
from PIL import Image
from scripts import Desk
from service import Service, finished, models_yaml, running, until

from ldm3d.sampling import Sampler


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), max_num=8, max_steps=50, max_wait_seconds=30) as started:
        yield started


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def job(client: httpx.Client) -> dict[str, Any]:
    """A finished job with two volumes."""
    answer = client.post("/v1/samples?wait=30", json={"num": 2, "seed": 3, "steps": 4})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def problem_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    content = dict(answer.json())
    assert content["status"] == status
    assert content["title"] and content["detail"]
    return content


def test_a_job_is_accepted_at_once_and_ends(client: httpx.Client) -> None:
    answer = client.post("/v1/samples", json={"seed": 1, "steps": 2})
    assert answer.status_code == 202
    assert answer.json()["state"] in ("queued", "running")
    address = answer.headers["location"]
    assert address == f"/v1/jobs/{answer.json()['id']}"
    ended = finished(client, address.removeprefix("/v1/jobs/"))
    assert ended["state"] == "done"
    assert ended["created"] <= ended["started"] <= ended["finished"] < ended["expires"]


def test_a_request_that_waits_gets_the_finished_job(job: dict[str, Any]) -> None:
    assert job["state"] == "done"
    assert [file["name"] for file in job["files"]] == [
        f"synimg_3_{i}.{end}" for i in (0, 1) for end in ("json", "nii.gz", "png")
    ]
    assert job["request"] | {"num": 2, "seed": 3, "steps": 4, "scheduler": "rflow", "model": "tiny"} == job["request"]


def test_files_are_what_the_library_makes(service: Service, client: httpx.Client, job: dict[str, Any]) -> None:
    sampler = Sampler.from_folder(service.folder / "weights", tiny.CPU)
    expected = sampler.sample(3, [0, 1], "rflow", 4)
    for number in (0, 1):
        content = client.get(f"/v1/jobs/{job['id']}/files/synimg_3_{number}.nii.gz").content
        image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
        assert (image.get_fdata() == expected[number, 0].double().numpy()).all()


def test_each_file_is_served_with_its_digest_and_type(client: httpx.Client, job: dict[str, Any]) -> None:
    for file in job["files"]:
        answer = client.get(f"/v1/jobs/{job['id']}/files/{file['name']}")
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert len(answer.content) == file["bytes"]
        assert answer.headers["content-type"] == file["media_type"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    preview = client.get(f"/v1/jobs/{job['id']}/files/synimg_3_0.png").content
    assert min(Image.open(io.BytesIO(preview)).size) > 100
    sidecar = client.get(f"/v1/jobs/{job['id']}/files/synimg_3_1.json").json()
    assert (sidecar["seed"], sidecar["index"], sidecar["weights_sha256"]) == (3, 1, job["weights_sha256"])


def test_parts_of_a_file_can_be_asked_for(client: httpx.Client, job: dict[str, Any]) -> None:
    address = f"/v1/jobs/{job['id']}/files/synimg_3_0.nii.gz"
    whole = client.get(address).content
    part = client.get(address, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    beyond = client.get(address, headers={"Range": f"bytes={len(whole) + 5}-"})
    assert problem_of(beyond, 416)["detail"] == f"there is only bytes */{len(whole)}"
    assert beyond.headers["content-range"] == f"bytes */{len(whole)}"
    for wrong in ("bytes=a-b", "lines=1-2", "bytes=20-10", "10-19"):
        problem_of(client.get(address, headers={"Range": wrong}), 400)
    two = client.get(address, headers={"Range": "bytes=0-1,4-5"})
    assert two.status_code == 206
    assert two.headers["content-type"].startswith("multipart/byteranges; boundary=")


def test_whole_numbers_may_have_a_point(client: httpx.Client) -> None:
    body = b'{"num": 2.0, "seed": 7.0, "steps": 1.0}'
    made = client.post("/v1/samples", content=body, headers={"Content-Type": "application/json"}).json()
    assert (made["request"]["num"], made["request"]["seed"], made["request"]["steps"]) == (2, 7, 1)


def test_head_is_get_without_its_body(client: httpx.Client, job: dict[str, Any]) -> None:
    for path in ("/health", "/v1/jobs", f"/v1/jobs/{job['id']}/files/synimg_3_0.nii.gz", "/static/app.js"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert {name: head.headers[name] for name in ("content-type", "content-length")} == {
            name: get.headers[name] for name in ("content-type", "content-length")
        }
    assert client.head("/v1/nothing").status_code == 404


def test_formats(client: httpx.Client) -> None:
    asked = {"seed": 3, "steps": 4, "format": "nii", "dtype": "int16"}
    made = client.post("/v1/samples?wait=30", json=asked).json()
    content = client.get(f"/v1/jobs/{made['id']}/files/synimg_3_0.nii").content
    image = nib.Nifti1Image.from_bytes(content)
    assert image.get_data_dtype() == "int16"


def test_events_tell_of_the_whole_way(client: httpx.Client) -> None:
    made = client.post("/v1/samples", json={"num": 8, "seed": 5, "steps": 50}).json()
    events = []
    with client.stream("GET", f"/v1/jobs/{made['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                events.append([line.removeprefix("event: ")])
            elif line.startswith("data: "):
                events[-1].append(json.loads(line.removeprefix("data: ")))
    assert [name for name, _ in events] == ["progress"] * (len(events) - 1) + ["end"]
    assert events[-1][1]["state"] == "done"
    shares = [job["progress"]["share"] for _, job in events if job["progress"]]
    assert shares == sorted(shares)
    assert len(set(shares)) > 1


def test_deleting_cancels_and_removes(service: Service, client: httpx.Client) -> None:
    first = client.post("/v1/samples", json={"num": 8, "seed": 6, "steps": 50}).json()
    waiting = client.post("/v1/samples", json={"num": 1, "seed": 7, "steps": 49}).json()
    for made in (first, waiting):
        assert client.delete(f"/v1/jobs/{made['id']}").status_code == 204
        problem_of(client.get(f"/v1/jobs/{made['id']}"), 404)
        problem_of(client.delete(f"/v1/jobs/{made['id']}"), 404)
    after = client.post("/v1/samples?wait=30", json={"seed": 8, "steps": 2}).json()
    assert after["state"] == "done"  # the worker has let go of what was deleted
    assert not (service.data / "jobs" / first["id"]).exists()
    assert not (service.data / "unfinished" / first["id"]).exists()


def test_an_idempotency_key_gives_the_same_job(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once-1"}
    answers = [client.post("/v1/samples", json={"seed": 9, "steps": 2}, headers=headers).json() for _ in range(3)]
    assert len({answer["id"] for answer in answers}) == 1
    other = client.post("/v1/samples", json={"seed": 10, "steps": 2}, headers=headers)
    assert problem_of(other, 422)["errors"][0]["field"] == "Idempotency-Key"
    fresh = client.post("/v1/samples", json={"seed": 9, "steps": 2}, headers={"Idempotency-Key": "once-2"}).json()
    assert fresh["id"] != answers[0]["id"]


def test_jobs_come_in_pages(client: httpx.Client) -> None:
    made = [client.post("/v1/samples?wait=30", json={"seed": i, "steps": 1}).json()["id"] for i in range(5)]
    seen, before = [], None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2, **({"before": before} if before else {})}).json()
        assert len(page["jobs"]) <= 2
        seen += [job["id"] for job in page["jobs"]]
        before = page["next"]
        if before is None:
            break
    assert seen == sorted(seen, reverse=True)
    assert set(made) <= set(seen)


def test_models_say_what_can_be_asked_for(client: httpx.Client, job: dict[str, Any]) -> None:
    content = client.get("/v1/models").json()
    (version,) = content["models"][0]["versions"]
    assert version["shape"] == [16, 16, 16]
    assert version["weights_sha256"] == job["weights_sha256"]
    assert version["loaded"]
    assert (version["schedulers"], version["max_steps"], version["conditions"]) == (["rflow"], 50, {})
    assert content["limits"]["max_num"] == 8


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"num": 0}, "num"),
        ({"num": 9}, "num"),
        ({"num": "2"}, "num"),
        ({"num": True}, "num"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"steps": 51}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"scheduler": "ddpm"}, "scheduler"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"model": "none"}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"format": "exe"}, "format"),
        ({"conditions": {"sex": "f"}}, "conditions"),
        ({"conditions": {"a": 1}}, "conditions.a"),
        ({"sneed": 1}, "sneed"),
    ],
)
def test_what_cannot_be_granted_is_refused_by_its_field(
    client: httpx.Client, asked: dict[str, Any], field: str
) -> None:
    content = problem_of(client.post("/v1/samples", json=asked), 422)
    assert [error["field"] for error in content["errors"]] == [field]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"seed": NaN}', b"1" * 100])
def test_bodies_that_are_no_requests(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v1/samples", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    problem_of(answer, answer.status_code)


def test_only_json_is_read(client: httpx.Client) -> None:
    answer = client.post("/v1/samples", content=b'{"seed": 1}', headers={"Content-Type": "text/plain"})
    assert answer.status_code in (415, 422)
    problem_of(answer, answer.status_code)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/00000000000000000000000000",
        "/v1/nothing",
        "/v1/jobs/00000000000000000000000000/files/x",
        "/static/nothing.js",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
    ],
)
def test_what_is_not_there(client: httpx.Client, path: str) -> None:
    problem_of(client.get(path), 404)


@pytest.mark.parametrize("name", ["..%2f..%2fjob.json", "%2e%2e", "job.json", "synimg_3_0.nii.gz%00", "outcome.json"])
def test_no_other_file_is_served(client: httpx.Client, job: dict[str, Any], name: str) -> None:
    assert client.get(f"/v1/jobs/{job['id']}/files/{name}").status_code == 404


def test_a_job_name_that_is_none_is_refused(client: httpx.Client) -> None:
    assert problem_of(client.get("/v1/jobs/..%5c.."), 422)["errors"][0]["field"] == "id"


def test_the_wrong_method(client: httpx.Client) -> None:
    for method, path, allowed in [
        ("PUT", "/v1/samples", "POST"),
        ("PUT", "/v1/jobs/00000000000000000000000000", "DELETE, GET"),
        ("OPTIONS", "/v1/jobs", "GET"),
        ("POST", "/", "GET"),
        ("POST", "/static/index.html", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ]:
        answer = client.request(method, path)
        problem_of(answer, 405)
        assert answer.headers["allow"] == allowed, path


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_a_body_that_is_not_said_to_be_json(client: httpx.Client, kind: str) -> None:
    problem_of(client.post("/v1/samples", content=b"{}", headers={"Content-Type": kind}), 415)


def test_a_body_that_is_not_json(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    errors = problem_of(client.post("/v1/samples", content=b'{"num": }', headers=headers), 422)["errors"]
    assert errors == [{"field": "body", "message": "not JSON from character 8 on: Expecting value"}]
    problem_of(client.post("/v1/samples", content=b'{"model": "\xff"}', headers=headers), 400)


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    problem_of(client.post("/v1/samples", json={"model": "a" * 100_000}), 413)

    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    problem_of(client.post("/v1/samples", content=parts(), headers={"Content-Type": "application/json"}), 413)


def test_a_job_that_is_deleted_while_its_request_waits_is_cancelled(service: Service, client: httpx.Client) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        with service.client() as other:
            answers.append(other.post("/v1/samples?wait=30", json={"num": 8, "seed": 4711, "steps": 50}))

    asking = threading.Thread(target=ask)
    asking.start()

    def asked() -> str | None:
        jobs = client.get("/v1/jobs").json()["jobs"]
        return next((job["id"] for job in jobs if job["request"]["seed"] == 4711), None)

    name = until(asked, "it is accepted")
    client.delete(f"/v1/jobs/{name}")
    asking.join()
    assert (answers[0].status_code, answers[0].json()["state"], answers[0].json()["id"]) == (200, "cancelled", name)


def test_waiting_has_a_limit(client: httpx.Client) -> None:
    assert problem_of(client.post("/v1/samples?wait=31", json={}), 422)["errors"][0]["field"] == "wait"


def test_health_and_metrics(client: httpx.Client, job: dict[str, Any]) -> None:
    assert client.get("/health").json() == {"status": "alive"}
    assert client.get("/ready").json() == {"ready": True, "checks": {"queue": "ok", "models": "ok", "workers": "ok"}}
    name = 'ldm3d_http_requests_total{method="GET",route="/v1/jobs/{id}",status="200"}'
    client.get(f"/v1/jobs/{job['id']}")
    text = until(lambda: name in (found := client.get("/metrics").text) and found, "the request is counted", 10)
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['ldm3d_volumes_total{model="tiny",shadow="no",version="1"}']) >= 2
    assert float(figures['ldm3d_jobs_ended_total{model="tiny",shadow="no",state="done",version="1"}']) >= 1


def test_every_answer_has_safe_headers(client: httpx.Client) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert len(headers["x-request-id"]) == 16
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


def test_no_foreign_page_may_call(client: httpx.Client) -> None:
    preflight = client.options(
        "/v1/samples", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in preflight.headers
    problem_of(client.post("/v1/samples", json={}, headers={"Origin": "https://evil.example"}), 403)
    problem_of(client.get("/v1/jobs", headers={"Host": "evil.example"}), 421)


def test_the_log_has_no_user_text(service: Service, client: httpx.Client) -> None:
    client.get("/v1/jobs/%1b[31mred", headers={"User-Agent": "%1b]0;title%07"})
    client.post("/v1/samples", json={"model": "\x1b[31mred\n", "conditions": {"\x1b": "\n"}})
    assert "\x1b" not in service.log()
    audit = Path(service.data / "audit" / "audit.jsonl").read_text()
    assert "\x1b" not in audit
    assert '"POST /v1/samples"' in audit


def test_the_same_bytes_as_inference_py(trained: Desk, tmp_path: Path) -> None:
    """`trained` has 3 volumes of seed 5, made by the script."""
    sidecar = json.loads((trained.results / "synimg_5_0.json").read_text())
    models_yaml(tmp_path / "models.yaml", {"1": {"weights": str(trained.model)}})
    asked = {"num": 3, "seed": 5, "steps": sidecar["steps"], "scheduler": sidecar["scheduler"]}
    with running(tmp_path) as service, service.client() as client:
        job = client.post("/v1/samples?wait=60", json=asked).json()
        for number in range(3):
            name = f"synimg_5_{number}.nii.gz"
            served = client.get(f"/v1/jobs/{job['id']}/files/{name}").content
            assert served == (trained.results / name).read_bytes()
        ours = client.get(f"/v1/jobs/{job['id']}/files/synimg_5_0.json").json()
        assert ours | {"time": sidecar["time"]} == sidecar
