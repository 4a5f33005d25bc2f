"""Jobs as folders: what is kept, who may have it, and what is left when a process dies between two files."""

import errno
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ldm3d.errors import OutputError
from mlops.api import caller_folder, jobs, records
from mlops.api.caller_folder import KeyReused, Refused
from mlops.api.jobs import JobStore
from mlops.api.queue import LATE, URGENT, Queue
from mlops.api.records import Outcome, Record, new_job_id
from mlops.api.schemas import Progress, ResolvedRequest
from mlops.api.upkeep import DEATHS, expire, recover

DAY = timedelta(days=1)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "data", DAY, max_jobs_per_caller=3, max_queue=5, max_disk_bytes=10_000)


def record(caller: str = "me", **fields: Any) -> Record:
    request = {"num": 1, "seed": 0, "steps": 5, "scheduler": "rflow", "model": "m", "format": "nii.gz"}
    asked = ResolvedRequest(**request | {"dtype": "float32", "conditions": {}} | fields.pop("request", {}))
    facts: dict[str, Any] = {
        "id": new_job_id(),
        "caller": caller,
        "created": datetime.now(UTC),
        "request": asked,
        "version": "1",
        "digest": "d" * 64,
        "assigned_by": "only",
        "weights_sha256": {},
        "result_bytes": 1000,
    }
    return Record(**facts | fields)


def end(store: JobStore, job_id: str, **fields: Any) -> bool:
    store.work_folder(job_id).mkdir(parents=True, exist_ok=True)
    return store.finish(job_id, Outcome(**{"state": "done", "finished": datetime.now(UTC)} | fields))


def test_names_sort_by_time_and_are_all_different() -> None:
    names = [new_job_id() for _ in range(2000)]
    assert len(set(names)) == 2000
    assert [name[:10] for name in names] == sorted(name[:10] for name in names)
    assert {len(name) for name in names} == {26}


def test_the_way_of_a_job(store: JobStore) -> None:
    job, is_new = store.accept(record())
    assert is_new
    seen = store.read(job.id, lambda name: 1)
    assert seen and (seen.state, seen.place) == ("queued", 1)
    assert store.claim(job.id, "worker") == job
    assert store.claim(job.id, "another") is None
    store.report(job.id, Progress(done=0, total=1, share=0.5, seconds_left=1))
    seen = store.read(job.id)
    assert seen and seen.progress and (seen.state, seen.progress.share) == ("running", 0.5)
    assert end(store, job.id)
    assert not end(store, job.id, state="failed")
    seen = store.read(job.id)
    assert seen and seen.state == "done" and seen.expires and seen.finished
    assert seen.expires - seen.finished == DAY
    assert store.unfinished_ids() == []


def test_limits(store: JobStore) -> None:
    mine = [store.accept(record())[0] for _ in range(3)]
    with pytest.raises(Refused, match="one caller"):
        store.accept(record())
    for caller in ("a", "b"):
        store.accept(record(caller))
    with pytest.raises(Refused, match="this service"):
        store.accept(record("c"))
    end(store, mine[0].id)
    store.accept(record("c"))


def test_results_that_would_not_fit_are_refused(store: JobStore) -> None:
    store.accept(record(result_bytes=6000))
    with pytest.raises(Refused, match="disk"):
        store.accept(record(result_bytes=6000))
    store.accept(record(result_bytes=4000))


def test_idempotency_keys(store: JobStore) -> None:
    first, _ = store.accept(record(), "key")
    assert store.accept(record(), "key") == (first, False)
    with pytest.raises(KeyReused):
        store.accept(record(request={"seed": 1}), "key")
    other, is_new = store.accept(record("somebody else"), "key")
    assert is_new and other.id != first.id
    store.delete(first.id)
    again, is_new = store.accept(record(), "key")
    assert is_new and again.id != first.id


HOSTILE = ["../../x", "a/b", "\x00", "é" * 300, "x" * 5000, "..", ""]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_of_a_caller_or_key_reaches_a_path(store: JobStore, tmp_path: Path, text: str) -> None:
    job, _ = store.accept(record(f"oidc:{text}"), text or "k")
    assert store.of_caller(f"oidc:{text}", None) == [job.id]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert all(len(path.name) < 100 and path.name.isprintable() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("files", range(4))
def test_a_request_that_dies_before_its_job_is_kept_leaves_nothing_that_counts(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """Killed after so many of the files that accepting writes."""
    written = 0

    def dies(path: Path, text: str) -> None:
        nonlocal written
        if written == files or path.name == "job.json":
            raise KeyboardInterrupt
        written += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    job = record()
    with monkeypatch.context() as patched:
        for module in (caller_folder, jobs):
            patched.setattr(module, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            store.accept(job, "key")
    assert store.read(job.id) is None
    assert recover(store, lambda worker: True) == []
    again, is_new = store.accept(record(), "key")
    assert is_new
    for marker in [*store.unfinished.iterdir(), *store.data_dir.glob("callers/*/*/*")]:
        os.utime(marker, (0, 0))
    assert recover(store, lambda worker: True) == [again.id]
    assert store.unfinished_ids() == [again.id]
    expire(store)
    assert store.of_caller("me", None) == [again.id]
    assert store.accept(record(), "key") == (again, False)


def test_a_full_disk_refuses_and_keeps_nothing(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = record()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError):
            store.accept(job)
    assert store.read(job.id) is None


def test_a_dead_workers_job_waits_again_until_too_many_have_died(store: JobStore) -> None:
    job, _ = store.accept(record())
    for death in range(1, DEATHS):
        assert store.claim(job.id, "worker")
        assert recover(store, lambda worker: True) == []
        assert recover(store, lambda worker: False) == [job.id]
        assert len(list(store.folder(job.id).glob("died-*"))) == death
    store.claim(job.id, "worker")
    assert recover(store, lambda worker: False) == []
    seen = store.read(job.id)
    assert seen and seen.state == "failed" and seen.error and "workers have died" in seen.error


def test_a_worker_that_dies_between_its_last_two_files_loses_nothing(store: JobStore) -> None:
    job, _ = store.accept(record())
    store.claim(job.id, "worker")
    store.work_folder(job.id).mkdir()
    (store.work_folder(job.id) / "a.png").touch()
    store.work_folder(job.id).rename(store.folder(job.id) / "files")  # killed here, before the outcome
    assert recover(store, lambda worker: False) == [job.id]
    store.claim(job.id, "another")
    store.work_folder(job.id).mkdir()
    (store.work_folder(job.id) / "b.png").touch()
    assert end(store, job.id)
    assert [path.name for path in (store.folder(job.id) / "files").iterdir()] == ["b.png"]


def test_deleting_while_a_worker_writes_leaves_nothing(store: JobStore) -> None:
    job, _ = store.accept(record())
    store.claim(job.id, "worker")
    store.delete(job.id)
    assert not store.is_wanted(job.id)
    assert not end(store, job.id)  # the worker has written into the folder that was gone
    assert list(store.jobs.iterdir()) == []
    assert store.of_caller("me", None) == []


def test_old_jobs_go_and_then_the_oldest_for_room(store: JobStore) -> None:
    now = datetime.now(UTC)
    files = [{"name": "a", "bytes": 4000, "media_type": "x/y", "sha256": ""}]
    ended = []
    for age in (timedelta(days=2), timedelta(hours=3), timedelta(hours=2), timedelta(hours=1)):
        job, _ = store.accept(record())
        end(store, job.id, finished=now - age, files=files)
        ended.append(job.id)
    running, _ = store.accept(record())
    assert expire(store) == 8000
    assert [name for name in ended if store.read(name)] == ended[2:]
    assert store.read(running.id)


def test_pages_go_on_where_a_job_was_deleted(store: JobStore) -> None:
    made = []
    for _ in range(4):
        job, _ = store.accept(record())
        end(store, job.id)
        made.append(job.id)
    newest_first = sorted(made, reverse=True)
    store.delete(newest_first[1])
    assert store.of_caller("me", newest_first[0]) == newest_first[2:4]


def test_files_that_cannot_be_read_are_no_jobs(store: JobStore) -> None:
    job, _ = store.accept(record())
    (store.folder(job.id) / "job.json").write_text("{")
    assert store.read(job.id) is None
    assert records.read_json(store.folder(job.id) / "job.json") is None


def test_the_queue_gives_names_in_order_and_urgent_ones_first(tmp_path: Path) -> None:
    queue, other = Queue("", tmp_path / "q.sqlite"), Queue("", tmp_path / "q.sqlite")
    for name, *priority in [("late", LATE), ("a",), ("b",), ("urgent", URGENT)]:
        queue.put(str(name), *map(int, priority))
    assert other.names() == {"late", "a", "b", "urgent"}
    assert [other.get(), queue.get(), other.get(), queue.get(), other.get()] == ["urgent", "a", "b", "late", None]


def test_a_full_disk_keeps_nobody_from_making_room(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ended, waiting = store.accept(record())[0], store.accept(record())[0]
    end(store, ended.id, finished=datetime.now(UTC) - 2 * DAY)
    monkeypatch.setattr(os, "fsync", full)
    expire(store)
    store.delete(waiting.id)
    assert list(store.jobs.iterdir()) == []
    with pytest.raises((OutputError, OSError)):
        store.accept(record())
    assert store.unfinished_ids() == []  # what could not be kept takes nobody's place


def test_a_lost_mark_loses_no_job_and_nothing_is_left_of_what_is_none(store: JobStore) -> None:
    job, _ = store.accept(record())
    (store.unfinished / job.id).unlink()
    left = store.work_folder(new_job_id())
    left.mkdir(parents=True)
    os.utime(left.parent, (0, 0))
    expire(store)
    assert recover(store, lambda worker: True) == [job.id]
    assert [path.name for path in store.jobs.iterdir()] == [job.id]


def test_a_worker_that_finds_another_at_order_goes_on(store: JobStore) -> None:
    job, _ = store.accept(record())
    with FileLock(store.data_dir / ".recovery.lock"):
        assert recover(store, lambda worker: True) == [job.id]


@pytest.mark.parametrize("name", ["a\0b", "../jobs", "", "x" * 5000])
def test_names_from_the_queue_that_are_none(store: JobStore, name: str) -> None:
    assert store.claim(name, "worker") is None


def test_shadows_go_first_where_room_is_short(store: JobStore) -> None:
    file = {"name": "a", "bytes": 4000, "media_type": "x", "sha256": ""}
    names = []
    for shadow_of in (None, "x", None):
        made = record(shadow_of=shadow_of)
        store.accept_shadow(made)
        end(store, made.id, files=[file])
        names.append(made.id)
    assert expire(store) == 8000
    assert [store.record(name) is None for name in names] == [False, True, False]


def test_shadows_cost_nobody_a_place(store: JobStore) -> None:
    for _ in range(5):
        store.accept_shadow(record(shadow_of="x"))
    assert store.accept(record())[1]


def test_an_idempotency_key_stands_for_what_was_asked(store: JobStore) -> None:
    """Not for what that comes to: a retry may be given another version, which has other defaults."""
    first, _ = store.accept(record(), "key", "{}")
    assert store.accept(record(request={"steps": 9}), "key", "{}") == (first, False)
    assert store.asked_before("me", "key", "{}") == first
    with pytest.raises(KeyReused):
        store.asked_before("me", "key", '{"steps":9}')
