"""Kills, stops and lost parts: no accepted job is lost, none is seen to run twice."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import DEADLINE_SECONDS, Service, finished, free_port, is_running, running, until

LONG = {"num": 8, "seed": 3, "steps": 50}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path, max_batch=2) as started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """For tests that leave it as they found it."""
    with running(tmp_path_factory.mktemp("shared"), max_batch=2) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(shared: Service) -> dict[str, str]:
    """What the long job gives when nothing happens; every service here has the same weights."""
    with shared.client() as client:
        return digests(finished(client, client.post("/v1/samples", json=LONG).json()["id"]))


def begin_long_job(client: httpx.Client) -> str:
    """A job that has made a volume and is not done."""
    made = client.post("/v1/samples", json=LONG).json()

    def under_way() -> bool:
        job = client.get(f"/v1/jobs/{made['id']}").json()
        assert job["state"] in ("queued", "running")
        return bool(job["progress"] and job["progress"]["done"])

    until(under_way, "the job has made a volume")
    return str(made["id"])


def digests(job: dict[str, Any]) -> dict[str, str]:
    """Of what must be the same each time: sidecars have the time."""
    return {file["name"]: file["sha256"] for file in job["files"] if not file["name"].endswith(".json")}


def test_a_killed_worker_is_replaced_and_its_job_goes_on(service: Service, undisturbed: dict[str, str]) -> None:
    with service.client() as client:
        job_id = begin_long_job(client)
        (worker,) = service.workers()
        made = {path.name for path in (service.data / "jobs" / job_id / "work").glob("*.png")}
        os.kill(worker, signal.SIGKILL)
        job = finished(client, job_id)
        assert job["state"] == "done"
        assert digests(job) == undisturbed
        assert made
        (died,) = (service.data / "jobs" / job_id).glob("died-*")
        assert str(worker) in died.read_text()
        assert service.workers() != [worker]
        assert "ldm3d_models_loaded 1.0" in client.get("/metrics").text  # the dead one's are not counted


def test_a_killed_web_process_loses_nothing(service: Service) -> None:
    with service.client() as client:
        running_job = begin_long_job(client)
        waiting = client.post("/v1/samples", json={"seed": 4, "steps": 2}, headers={"Idempotency-Key": "k"}).json()
    assert service.stop(signal.SIGKILL) == -signal.SIGKILL
    service.start()
    with service.client() as client:
        assert finished(client, running_job)["state"] == "done"
        again = client.post("/v1/samples", json={"seed": 4, "steps": 2}, headers={"Idempotency-Key": "k"}).json()
        assert again["id"] == waiting["id"]
        assert finished(client, waiting["id"])["state"] == "done"
        assert len(client.get("/v1/jobs").json()["jobs"]) == 2


def test_both_killed_at_once(service: Service, undisturbed: dict[str, str]) -> None:
    with service.client() as client:
        job_id = begin_long_job(client)
    assert service.process
    (worker,) = service.workers()
    os.kill(worker, signal.SIGKILL)
    service.stop(signal.SIGKILL)
    service.start()
    with service.client() as client:
        assert digests(finished(client, job_id)) == undisturbed


def test_a_stop_is_quick_and_the_job_goes_on_at_the_next_start(service: Service, undisturbed: dict[str, str]) -> None:
    with service.client() as client:
        job_id = begin_long_job(client)
    assert service.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    folder = service.data / "jobs" / job_id
    assert not (folder / "claim.json").exists()
    assert not list(folder.glob("died-*"))
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "work").glob("*.nii.gz")}
    assert kept
    service.start()
    with service.client() as client:
        assert digests(finished(client, job_id)) == undisturbed
    files = {path.name: path.stat().st_mtime_ns for path in (folder / "files").glob("*.nii.gz")}
    assert files | kept == files  # what was made before the stop was not made again


def test_a_lost_queue_is_filled_again(service: Service) -> None:
    with service.client() as client:
        job_id = begin_long_job(client)
        waiting = client.post("/v1/samples", json={"seed": 4, "steps": 2}).json()["id"]
    service.stop()
    for path in service.data.glob("queue.sqlite*"):
        path.unlink()
    service.start()
    with service.client() as client:
        assert finished(client, job_id)["state"] == finished(client, waiting)["state"] == "done"


def test_an_event_stream_ends_with_its_job(shared: Service) -> None:
    with shared.client() as client:
        job_id = begin_long_job(client)
        with client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            with shared.client() as other:
                other.delete(f"/v1/jobs/{job_id}")
            last = [line for line in lines if line.startswith(("event", "data"))][-2:]
    assert last[0] == "event: end"
    assert '"state":"cancelled"' in last[1]


def test_weights_that_are_let_go_are_loaded_again(tmp_path: Path) -> None:
    with running(tmp_path, idle_minutes=0.005) as service, service.client() as client:
        until(lambda: not client.get("/v1/models").json()["models"][0]["versions"][0]["loaded"], "the worker rests")
        assert client.get("/ready").status_code == 200
        assert client.post("/v1/samples?wait=60", json={"steps": 1}).json()["state"] == "done"


def test_results_expire_and_stay_within_their_room(tmp_path: Path) -> None:
    with running(tmp_path, retention_minutes=0.05) as service, service.client() as client:
        job = client.post("/v1/samples?wait=60", json={"steps": 1}).json()
        assert job["state"] == "done"
        until(lambda: client.get(f"/v1/jobs/{job['id']}").status_code == 404, "the job is removed")
        until(lambda: not list((service.data / "jobs").iterdir()), "its folder is gone")
        assert client.get("/v1/jobs").json()["jobs"] == []


def test_jobs_that_wait_are_sampled_together_and_come_out_the_same(tmp_path: Path) -> None:
    with running(tmp_path, max_batch=4) as service, service.client() as client:
        alone = [client.post("/v1/samples?wait=60", json={"seed": s, "steps": 3}).json() for s in range(4)]
        # Behind this one they wait.
        blocker = begin_long_job(client)
        asked = [client.post("/v1/samples", json={"seed": s, "steps": 3}).json()["id"] for s in range(4)]
        places = [client.get(f"/v1/jobs/{name}").json()["place"] for name in asked]
        assert places == [1, 2, 3, 4]
        together = [finished(client, name) for name in asked]
        assert finished(client, blocker)["state"] == "done"
        assert [digests(job) for job in together] == [digests(job) for job in alone]
        text = client.get("/metrics").text
    sizes = [line for line in text.splitlines() if line.startswith('ldm3d_batch_volumes_bucket{le="2.0"}')]
    (total,) = (line for line in text.splitlines() if line.startswith("ldm3d_batch_volumes_count"))
    # Two batches of 4 of the job in front, and one of the four behind it.
    assert float(total.split()[1]) - float(sizes[0].split()[1]) == 3


def test_the_web_process_never_loads_torch(shared: Service) -> None:
    assert shared.process
    (worker,) = shared.workers()
    assert "libtorch" in Path(f"/proc/{worker}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{shared.process.pid}/maps").read_text()


def test_a_stopped_service_leaves_its_data_and_no_process(service: Service) -> None:
    with service.client() as client:
        assert client.post("/v1/samples?wait=60", json={"steps": 1}).json()["state"] == "done"
    processes = [*service.workers(), service.process.pid if service.process else 0]
    service.stop()
    assert not any(is_running(process) for process in processes)
    assert {path.name for path in service.folder.iterdir()} == {"data", "log.txt", "models.yaml", "weights"}


def test_a_second_service_at_the_same_port_is_refused(shared: Service, tmp_path: Path) -> None:
    other = Service(tmp_path / "other", port=shared.port, models_file=shared.models_file).start(wait=False)
    assert other.process
    assert other.process.wait(DEADLINE_SECONDS) == 2
    assert f"error: cannot listen at 127.0.0.1, port {shared.port}: Address already in use" in other.log()


@pytest.mark.parametrize("trouble", ["models", "weights", "setting"])
def test_what_cannot_start_says_why_in_one_line(tmp_path: Path, trouble: str) -> None:
    service = Service(tmp_path)
    if trouble == "models":
        service.models_file.write_text("models: {}")
    elif trouble == "weights":
        shutil.rmtree(tmp_path / "weights")
    else:
        service.settings["max_nun"] = 3
    service.start(wait=False)
    assert service.process
    assert service.process.wait(DEADLINE_SECONDS) == 2
    (line,) = (line for line in service.log().splitlines() if line.startswith("error: "))
    assert {"models": "models.yaml", "weights": "weights", "setting": "did you mean LDM3D_MAX_NUM"}[trouble] in line
    assert "Traceback" not in service.log()


# Several replicas on Redis.


@contextmanager
def redis(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is missing: apt-get install redis-server")
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_web_processes_and_two_workers_share_redis(tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with redis(tmp_path, port), running(tmp_path, queue_url=url) as first, running(tmp_path, queue_url=url) as second:
        with first.client() as one, second.client() as other:
            asked = [
                client.post("/v1/samples", json=LONG | {"seed": i}).json()["id"]
                for i in (1, 2)
                for client in (one, other)
            ]
            os.kill(first.workers()[0], signal.SIGKILL)
            jobs = [finished(other, name) for name in asked]
            assert {job["state"] for job in jobs} == {"done"}
            assert digests(jobs[0]) == digests(jobs[1]) != digests(jobs[2])
            assert [job["id"] for job in one.get("/v1/jobs").json()["jobs"]] == sorted(asked, reverse=True)
        assert not list(first.data.glob("queue.sqlite*"))


def test_jobs_are_taken_while_redis_is_down_and_done_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with redis(tmp_path, port) as server, running(tmp_path, queue_url=url) as service, service.client() as client:
        server.kill()
        server.wait()
        made = client.post("/v1/samples", json={"steps": 2})
        assert made.status_code == 202
        not_ready = client.get("/ready")
        assert not_ready.status_code == 503
        assert not_ready.json()["checks"]["queue"] == "does not answer"
        assert client.get("/health").status_code == 200
        with redis(tmp_path, port):
            assert finished(client, made.json()["id"])["state"] == "done"
            until(lambda: client.get("/ready").status_code == 200, "ready again")
