"""Order among the jobs: what dead processes have left, what is too old, what takes too much room."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

from filelock import FileLock, Timeout

from mlops.api import metrics
from mlops.api.caller_folder import forget_gone_jobs
from mlops.api.jobs import JobStore
from mlops.api.records import Outcome, age_seconds, read_json

DEATHS = 3
"""So many workers may die of one job before it has failed."""
SETTLED_SECONDS = 60.0
"""A marker without its job that is older belongs to a request that was killed."""


def recover(store: JobStore, is_alive: Callable[[str], bool]) -> list[str]:
    """Put in order what dead processes have left.

    Args:
        is_alive: whether the worker of this name lives.

    Returns:
        Jobs that wait, in their order: those that the queue does not know must be put there.
    """
    # Another worker that is at it does this one's work.
    with suppress(Timeout), FileLock(store.data_dir / ".recovery.lock", timeout=0):
        for name in store.unfinished_ids():
            _recover(store, name, is_alive)
    return store.waiting_ids()


def _recover(store: JobStore, name: str, is_alive: Callable[[str], bool]) -> None:
    folder = store.folder(name)
    if not store.is_there(name):
        if age_seconds(store.unfinished / name) > SETTLED_SECONDS:
            (store.unfinished / name).unlink(missing_ok=True)
        return
    if (folder / "outcome.json").exists():
        (store.unfinished / name).unlink(missing_ok=True)
        return
    claim = read_json(folder / "claim.json")
    if claim is None or is_alive(claim["worker"]):
        return
    deaths = len(list(folder.glob("died-*"))) + 1
    with suppress(FileNotFoundError):
        (folder / "claim.json").rename(folder / f"died-{deaths}")
    if deaths >= DEATHS:
        text = f"{deaths} workers have died at this job, perhaps for want of memory; ask for less"
        store.finish(name, Outcome(state="failed", finished=datetime.now(UTC), error=text))
        if record := store.record(name):  # a version that ends workers must not look faultless
            metrics.count_end(record.request.model, record.version, bool(record.shadow_of), "failed")


def expire(store: JobStore) -> int:
    """Remove finished jobs that are too old, and the oldest ones where there is too little room: shadows first, which
    nobody but the monitor waits for.

    Returns:
        Bytes that the results take which are left.
    """
    _mend(store)
    finished = sorted(
        (not _is_shadow(store, name), o.finished, name, sum(f.bytes for f in o.files)) for name, o in _finished(store)
    )
    room = store.max_disk_bytes - sum(size for *_, size in finished)
    limit = datetime.now(UTC) - store.retention
    for _, when, name, size in finished:
        if when < limit or room < 0:
            store.delete(name)
            room += size
    for trash in store.jobs.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)
    forget_gone_jobs(store.data_dir, store.is_there, SETTLED_SECONDS)
    return store.max_disk_bytes - room


def _mend(store: JobStore) -> None:
    """Mark unfinished jobs whose mark was lost; remove folders without a job, as of a worker that wrote and died."""
    for entry in os.scandir(store.jobs):
        name, folder = entry.name, store.folder(entry.name)
        if name.startswith(".") or (folder / "outcome.json").exists():
            continue
        if store.is_there(name):
            (store.unfinished / name).touch()
        elif age_seconds(folder) > SETTLED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _is_shadow(store: JobStore, name: str) -> bool:
    record = store.record(name)
    return record is not None and record.shadow_of is not None


def _finished(store: JobStore) -> Iterator[tuple[str, Outcome]]:
    for entry in os.scandir(store.jobs):
        name = entry.name
        if not name.startswith(".") and (outcome := store.outcome(name)):
            yield name, outcome
