"""From claimed jobs to files, where a job ends before its time."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
from service import publish

from ldm3d.errors import OutputError
from ldm3d.sampling import Sampler
from mlops.api import generation, metrics
from mlops.api.generation import Generation
from mlops.api.jobs import JobStore
from mlops.api.records import Record, new_job_id
from mlops.api.schemas import ResolvedRequest


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "data", timedelta(days=1), max_jobs_per_caller=9, max_queue=9, max_disk_bytes=10**9)


def claimed(store: JobStore) -> Record:
    request = ResolvedRequest(
        num=1, seed=0, steps=1, scheduler="rflow", model="m", format="nii", dtype="float32", conditions={}
    )
    record = Record(
        id=new_job_id(),
        caller="me",
        created=datetime.now(UTC),
        request=request,
        version="1",
        digest="d" * 64,
        assigned_by="only",
        weights_sha256={},
        result_bytes=1000,
    )
    store.accept(record)
    assert store.claim(record.id, "worker")
    return record


def ended(state: str) -> float:
    return float(metrics.JOBS_ENDED.labels("m", "1", "no", state)._value.get())


@pytest.mark.parametrize(("deleted", "state"), [(True, "cancelled"), (False, "failed")])
def test_a_job_whose_files_cannot_be_written(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool, state: str
) -> None:
    """Because it was deleted in that moment, which is no failure; or because of the disk, which is one."""
    record, before = claimed(store), (ended("cancelled"), ended("failed"))

    def fails(*args: Any) -> None:
        if deleted:
            store.delete(record.id)
        raise OutputError("no such folder")

    monkeypatch.setattr(generation, "write_sample", fails)
    sampler = Sampler.from_folder(publish(tmp_path / "weights"), tiny.CPU)
    assert Generation(store, "worker", sampler, 4, 60, lambda: False).run(record) == []
    assert (ended("cancelled") - before[0], ended("failed") - before[1]) == (state == "cancelled", state == "failed")
    assert store.folder(record.id).exists() is not deleted
    assert store.unfinished_ids() == []
