"""Several versions of a model: shares, shadows, and swapping them while requests come."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import Service, finished, models_yaml, publish, running, until

from ldm3d.cards import UNET
from mlops.api.queue import RELOAD, URGENT, Queue
from mlops.api.records import new_job_id

FATAL_TRIAL = """
import os, sys
if "-m" in sys.orig_argv and "mlops.api.worker" in sys.orig_argv:
    sys.path.insert(0, os.getcwd())
    from mlops.api.models import Models
    Models.try_out = lambda *_: os._exit(137)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {name: str(publish(folder / name, seed)) for seed, name in enumerate(("old", "new", "other"))}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, str]) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("shared")
    models_yaml(folder / "models.yaml", {"1": {"weights": weights["old"]}})
    with running(folder) as started:
        yield started


@pytest.fixture
def service(shared: Service, weights: dict[str, str]) -> Service:
    """The same for all tests; whatever one has made of it, it serves the old weights again."""
    models_yaml(shared.models_file, {"1": {"weights": weights["old"]}})
    with shared.client() as client:
        reloaded = client.post("/v1/admin/reload").json()
        assert (reloaded["state"], reloaded["versions"]) == ("active", ["tiny/1"])
    return shared


def made_by(client: httpx.Client, seed: int = 0) -> str:
    job = client.post("/v1/samples?wait=60", json={"seed": seed, "steps": 2}).json()
    assert job["state"] == "done"
    return str(job["version"])


def volumes(job: dict[str, Any]) -> list[str]:
    """Digests of a job's volumes."""
    return [file["sha256"] for file in job["files"] if file["name"].endswith(".nii.gz")]


def figures(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_a_new_version_takes_over_and_no_request_is_dropped(service: Service, weights: dict[str, str]) -> None:
    answers: list[dict[str, Any]] = []
    ended = threading.Event()

    def keep_asking() -> None:
        with service.client() as other:
            while not ended.is_set():
                answer = other.post("/v1/samples?wait=60", json={"seed": len(answers), "steps": 2})
                answers.append({"status": answer.status_code, **answer.json()})

    asking = threading.Thread(target=keep_asking)
    asking.start()
    with service.client() as client:
        until(lambda: len(answers) > 1, "requests are answered")
        models_yaml(service.models_file, {"2": {"weights": weights["new"]}})
        reloaded = client.post("/v1/admin/reload")
        assert (reloaded.status_code, reloaded.json()["state"]) == (200, "active"), reloaded.text
        assert reloaded.json()["versions"] == ["tiny/2"]
        assert made_by(client) == "2"
        count = len(answers)
        until(lambda: len(answers) > count + 1, "requests are answered")
    ended.set()
    asking.join()
    assert {(answer["status"], answer["state"]) for answer in answers} == {(200, "done")}
    versions = [answer["version"] for answer in answers]
    assert versions == sorted(versions)
    assert set(versions) == {"1", "2"}


def spoil(folder: Path, how: str) -> None:
    path = folder / UNET
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "pickle":
        path.rename(path.with_suffix(".pt"))
    else:
        shutil.copy(folder.parent / "good" / UNET, path)
        publish(folder.parent / "foreign", 7)
        shutil.copy(folder.parent / "foreign" / UNET, path)


@pytest.mark.parametrize("how", ["gone", "cut", "pickle", "of another autoencoder"])
def test_a_broken_version_replaces_nothing(service: Service, tmp_path: Path, how: str) -> None:
    publish(tmp_path / "good", 5)
    spoil(publish(tmp_path / "broken", 5), how)
    models_yaml(
        service.models_file,
        {"1": {"weights": str(tmp_path / "good")}, "2": {"weights": str(tmp_path / "broken"), "shadow": True}},
    )
    with service.client() as client:
        before = client.get("/v1/models").json()
        reloaded = client.post("/v1/admin/reload").json()
        assert reloaded["state"] == "failed"
        assert "versions.2" in reloaded["error"]
        assert client.get("/v1/models").json()["models"] == before["models"]
        assert made_by(client) == "1"
    service.stop()
    service.start()  # the broken file is still there: what worked is served
    with service.client() as client:
        assert made_by(client) == "1"


def test_a_signal_reloads_too(service: Service, weights: dict[str, str]) -> None:
    models_yaml(service.models_file, {"2": {"weights": weights["new"]}})
    assert service.process
    os.kill(service.process.pid, signal.SIGHUP)
    with service.client() as client:
        until(lambda: client.get("/v1/models").json()["models"][0]["versions"][0]["version"] == "2", "it is reloaded")


def test_a_job_keeps_the_version_that_it_was_given(service: Service, weights: dict[str, str]) -> None:
    with service.client() as client:
        alone = client.post("/v1/samples?wait=60", json={"seed": 1, "steps": 3}).json()
        blocker = client.post("/v1/samples", json={"num": 8, "seed": 2, "steps": 50}).json()["id"]
        waiting = client.post("/v1/samples", json={"seed": 1, "steps": 3}).json()["id"]
        models_yaml(service.models_file, {"2": {"weights": weights["new"]}})
        assert client.post("/v1/admin/reload").status_code in (200, 202)
        assert finished(client, blocker)["version"] == "1"
        job = finished(client, waiting)
        assert (job["state"], job["version"]) == ("done", "1")
        assert volumes(job) == volumes(alone)


def test_weights_replaced_in_their_folder_change_nothing(
    service: Service, weights: dict[str, str], tmp_path: Path
) -> None:
    folder = publish(tmp_path / "mine", 5)
    models_yaml(service.models_file, {"1": {"weights": str(folder)}})
    with service.client() as client:
        client.post("/v1/admin/reload")
        first = client.post("/v1/samples?wait=60", json={"seed": 1, "steps": 2}).json()
        publish(folder, 6)
        again = client.post("/v1/samples?wait=60", json={"seed": 1, "steps": 2}).json()
    assert first["weights_sha256"] == again["weights_sha256"]
    assert [f["sha256"] for f in first["files"] if "gz" in f["name"]] == [
        f["sha256"] for f in again["files"] if "gz" in f["name"]
    ]


def test_traffic_is_shared_and_stable(tmp_path: Path, weights: dict[str, str]) -> None:
    versions = {"1": {"weights": weights["old"], "share": 50}, "2": {"weights": weights["new"], "share": 50}}
    models_yaml(tmp_path / "models.yaml", versions, assign="job")
    with running(tmp_path) as service, service.client() as client:
        jobs = [client.post("/v1/samples?wait=60", json={"seed": i, "steps": 1}).json() for i in range(16)]
        assert {job["version"] for job in jobs} == {"1", "2"}
        assert {job["assigned_by"] for job in jobs} == {"job"}
        seen = figures(client)
        for version in ("1", "2"):
            count = sum(job["version"] == version for job in jobs)
            assert seen[f'ldm3d_jobs_ended_total{{model="tiny",shadow="no",state="done",version="{version}"}}'] == count
        models_yaml(service.models_file, versions, assign="caller")
        client.post("/v1/admin/reload")
        mine = [client.post("/v1/samples?wait=60", json={"seed": i, "steps": 1}).json() for i in range(6)]
        assert len({job["version"] for job in mine}) == 1
        assert {job["assigned_by"] for job in mine} == {"caller"}


def test_a_shadow_works_unseen(tmp_path: Path, weights: dict[str, str]) -> None:
    versions = {"1": {"weights": weights["old"]}, "2": {"weights": weights["new"], "shadow": True}}
    models_yaml(tmp_path / "models.yaml", versions)
    with running(tmp_path) as service, service.client() as client:
        assert {made_by(client, seed) for seed in range(3)} == {"1"}
        name = 'ldm3d_jobs_ended_total{model="tiny",shadow="yes",state="done",version="2"}'
        until(lambda: figures(client).get(name) == 3, "the shadow has made the same")
        listed = {job["id"] for job in client.get("/v1/jobs").json()["jobs"]}
        shadows = {path.name for path in (service.data / "jobs").iterdir()} - listed
        assert (len(listed), len(shadows)) == (3, 3)  # kept for the monitor
        assert {client.get(f"/v1/jobs/{name}").status_code for name in shadows} == {404}
        assert "models were not changed" not in service.log()


@pytest.fixture
def own_service(tmp_path: Path, weights: dict[str, str]) -> Iterator[Service]:
    models_yaml(tmp_path / "models.yaml", {"1": {"weights": weights["old"]}})
    with running(tmp_path) as started:
        yield started


def test_weights_that_end_the_worker_which_tries_them_replace_nothing(own_service: Service, tmp_path: Path) -> None:
    """As for want of memory: the next worker must not try them at its start, and end too, for ever."""
    publish(tmp_path / "fatal", 9)
    models_yaml(own_service.models_file, {"2": {"weights": str(tmp_path / "fatal")}})
    own_service.stop()
    (site := tmp_path / "site").mkdir()
    (site / "sitecustomize.py").write_text(FATAL_TRIAL)
    os.environ["PYTHONPATH"] = str(site)
    try:
        own_service.start()
    finally:
        del os.environ["PYTHONPATH"]
    with own_service.client() as client:
        assert made_by(client) == "1"
        assert "a worker has died of trying the weights" in own_service.log()
        deaths = own_service.log().count("a worker has ended")
        noted = own_service.data / "reload.json"
        assert not noted.exists()
        reloaded = client.post("/v1/admin/reload").json()  # whoever asks has them tried again
        # Another worker must start before this fails: on a busy machine the answer does not wait for so long.
        assert reloaded["state"] in ("failed", "pending") and reloaded["versions"] == ["tiny/1"]
        until(noted.exists, "the reload is over")
        assert "a worker has died" in json.loads(noted.read_text())["error"]
        assert own_service.log().count("a worker has ended") == deaths + 1 == 2
        until(lambda: client.get("/ready").status_code == 200, "a worker is there")
        assert made_by(client) == "1"


def test_a_damaged_active_set_is_replaced(service: Service) -> None:
    (service.data / "active.json").write_text("{")
    with service.client() as client:
        assert client.get("/ready").json()["checks"]["models"] == "what is served cannot be read"
        assert client.post("/v1/samples", json={}).status_code == 503
        assert client.post("/v1/admin/reload").json()["state"] == "active"
        assert made_by(client) == "1"


def test_a_storm_of_wishes_is_one_reload(service: Service) -> None:
    with service.client() as client:
        job = client.post("/v1/samples", json={"num": 20, "steps": 50}).json()["id"]
        until(lambda: client.get(f"/v1/jobs/{job}").json()["state"] == "running", "the worker is busy")
        before = service.log().count("serving ")
        queue = Queue("", service.data / "queue.sqlite")
        for _ in range(20):
            queue.put(RELOAD + new_job_id(), URGENT)
        client.delete(f"/v1/jobs/{job}")
        until(lambda: service.log().count("serving ") > before, "it is reloaded")
        assert made_by(client) == "1"
        assert service.log().count("serving ") == before + 1
