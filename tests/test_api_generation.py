"""What happens to jobs when something goes wrong while volumes are made."""

import errno
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from service import publish

from ldm3d.errors import OutputError
from ldm3d.sampling import Sampler
from mlops.api import generation, jobs
from mlops.api.generation import Generation
from mlops.api.jobs import JobStore
from mlops.api.models import Models
from mlops.api.records import Record, new_job_id
from mlops.api.schemas import Job, ResolvedRequest


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def sampler(weights: Path) -> Sampler:
    return Sampler.from_folder(weights, tiny.CPU)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "data", timedelta(days=1), 100, 100, 10**9)


def accept(store: JobStore, seed: int = 0, num: int = 1, steps: int = 1, **fields: Any) -> Record:
    request = ResolvedRequest(
        num=num, seed=seed, steps=steps, scheduler="rflow", model="m", format="nii.gz", dtype="float32", conditions={}
    )
    facts: dict[str, Any] = {"version": "1", "digest": "d", "assigned_by": "only", "weights_sha256": {}}
    facts |= {"id": new_job_id(), "caller": "me", "created": datetime.now(UTC), "request": request, "result_bytes": 1}
    record, _ = store.accept(Record(**facts | fields))
    return record


def run(store: JobStore, sampler: Sampler, record: Record, max_batch: int = 4, seconds: float = 60) -> Generation:
    made = Generation(store, "worker", sampler, max_batch, seconds, lambda: False)
    claimed = store.claim(record.id, "worker")
    assert claimed
    assert made.run(claimed) == []
    return made


def seen(store: JobStore, record: Record) -> Job:
    job = store.read(record.id)
    assert job
    return job


def failing(sampler: Sampler, monkeypatch: pytest.MonkeyPatch, when: Callable[[list[Any]], Exception | None]) -> None:
    """Let sampling fail where `when` gives an error for the volumes of a batch."""
    real = sampler.sample_volumes

    def sample_volumes(volumes: Any, *args: Any) -> torch.Tensor:
        if error := when(list(volumes)):
            raise error
        return real(volumes, *args)

    monkeypatch.setattr(sampler, "sample_volumes", sample_volumes)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_one_bad_job_takes_no_other_with_it(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = accept(store, seed=13)
    good = [accept(store, seed=seed) for seed in (1, 2)]
    failing(sampler, monkeypatch, lambda ids: ValueError("/secret/path") if 13 in [v.seed for v in ids] else None)
    run(store, sampler, bad)
    assert [seen(store, job).state for job in good] == ["done", "done"]
    job = seen(store, bad)
    assert (job.state, job.error) == ("failed", "the service failed at this job; its log says why")
    assert "/secret/path" in capsys.readouterr().err


NO_MEMORY = [torch.cuda.OutOfMemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_too_little_memory_for_a_batch_halves_it(
    error: Exception, store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def when(ids: list[Any]) -> Exception | None:
        sizes.append(len(ids))
        return error if len(ids) > 1 else None

    job = accept(store, num=4)
    failing(sampler, monkeypatch, when)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run(store, sampler, job)
    assert seen(store, job).state == "done"
    assert sizes == [4, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_too_little_memory_for_one_volume_says_so(
    error: Exception, store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = accept(store)
    failing(sampler, monkeypatch, lambda ids: error)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run(store, sampler, job)
    assert seen(store, job).error == "the device has not memory enough for one volume"


def test_a_job_that_is_deleted_while_its_files_are_written_has_not_failed(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = accept(store)

    def deleted(*args: Any) -> None:
        store.delete(job.id)
        raise OutputError("no such folder")

    monkeypatch.setattr(generation, "write_sample", deleted)
    run(store, sampler, job)
    assert "failed" not in capsys.readouterr().err
    assert not store.folder(job.id).exists()
    assert store.unfinished_ids() == []


def test_nan_is_never_a_volume(store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "sample_volumes", lambda *_: torch.full((1, 1, 16, 16, 16), torch.nan))
    job = accept(store)
    run(store, sampler, job)
    assert (seen(store, job).state, seen(store, job).error) == ("failed", "the model made NaN or infinity")


def test_a_full_disk_fails_the_job_and_tells_no_path(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise generation.OutputError(f"{tmp_path}: cannot be written: {errno.ENOSPC}")

    monkeypatch.setattr(generation, "write_sample", full)
    job = accept(store)
    run(store, sampler, job)
    error = seen(store, job).error or ""
    assert "disk is full" in error
    assert str(tmp_path) not in error


def test_a_job_that_takes_too_long_fails(store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "REPORT_SECONDS", 0)
    job = accept(store, num=2, steps=20)
    run(store, sampler, job, seconds=0.01)
    assert "took longer than 0.01 s" in (seen(store, job).error or "")


def test_a_job_of_another_kind_is_not_overtaken_for_ever(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other, like_first = accept(store, steps=1), accept(store, steps=2), accept(store, steps=1)
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0)
    run(store, sampler, first)
    assert [seen(store, job).state for job in (first, other, like_first)] == ["done", "queued", "queued"]
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 60)
    another = accept(store, steps=1)
    run(store, sampler, like_first)
    assert [seen(store, job).state for job in (other, like_first, another)] == ["queued", "done", "done"]


def test_jobs_for_other_weights_are_never_mixed(store: JobStore, sampler: Sampler) -> None:
    first, foreign = accept(store), accept(store, digest="e")
    run(store, sampler, first)
    assert [seen(store, job).state for job in (first, foreign)] == ["done", "queued"]


def test_volumes_that_are_there_are_not_made_again(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = accept(store, num=3)
    made: list[int] = []
    failing(sampler, monkeypatch, lambda ids: made.extend(v.number for v in ids))
    stops = iter([False, False, False, True, True, True])
    claimed = store.claim(job.id, "worker")
    assert claimed
    assert Generation(store, "worker", sampler, 1, 60, lambda: next(stops, True)).run(claimed) == [job.id]
    assert seen(store, job).state == "queued"
    run(store, sampler, job, max_batch=1)
    assert seen(store, job).state == "done"
    assert made.count(0) == 1
    assert set(made) == {0, 1, 2}


def test_a_batch_is_as_large_as_the_memory_allows(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = Models(weights.parent, tiny.CPU, 8, memory_gib=0.002)
    _, batch = models.get("tiny")
    assert 1 <= batch < 8
    with pytest.raises(Exception, match="one volume of these needs"):
        Models(weights.parent, tiny.CPU, 8, memory_gib=0.0001).get("tiny")
    models.rest()
    assert models.loaded == []
    started = time.monotonic()
    assert models.get("tiny")[1] == batch
    assert time.monotonic() - started < 30


def test_what_one_job_cannot_write_fails_no_other(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = accept(store, seed=1), accept(store, seed=2)
    real = generation.write_sample

    def write_sample(path: Path, *args: Any) -> None:
        if "_2_" in path.name:
            raise OutputError("no room")
        real(path, *args)

    monkeypatch.setattr(generation, "write_sample", write_sample)
    run(store, sampler, first)
    assert [seen(store, job).state for job in (first, second)] == ["done", "failed"]


def test_a_job_that_is_deleted_while_its_files_are_read_ends_no_worker(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = accept(store, seed=1), accept(store, seed=2)
    real = generation.sha256

    def sha256(path: Path) -> str:
        if "_1_" in path.name:
            store.delete(first.id)
        return real(path)

    monkeypatch.setattr(generation, "sha256", sha256)
    run(store, sampler, first)
    assert seen(store, second).state == "done"
    assert [path.name for path in store.jobs.iterdir()] == [second.id]


def test_jobs_of_one_kind_that_come_without_end_keep_no_worker_from_its_other_work(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.2)
    asked = [accept(store, seed=seed, num=3) for seed in range(2)]
    end = time.monotonic() + 20

    def another(ids: list[Any]) -> None:
        if time.monotonic() < end:
            asked.append(accept(store, seed=len(asked), num=3, steps=1))

    store.max_queue = store.max_jobs_per_caller = 10_000
    failing(sampler, monkeypatch, another)
    run(store, sampler, asked[0])
    assert time.monotonic() < end
    assert seen(store, asked[-1]).state == "queued"


def test_a_job_that_cannot_be_ended_waits_with_its_volumes(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = accept(store, num=2)
    claimed = store.claim(job.id, "worker")
    assert claimed
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(jobs, "create_once", full)
        Generation(store, "worker", sampler, 4, 60, lambda: False).run(claimed)
    assert seen(store, job).state == "queued"
    made: list[Any] = []
    failing(sampler, monkeypatch, made.extend)
    run(store, sampler, job)
    assert (seen(store, job).state, len(seen(store, job).files), made) == ("done", 6, [])


def test_progress_that_cannot_be_written_fails_no_job(
    store: JobStore, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "REPORT_SECONDS", 0)
    job = accept(store)
    (store.folder(job.id) / "progress.tmp").mkdir()  # stands in the way
    run(store, sampler, job)
    assert seen(store, job).state == "done"
