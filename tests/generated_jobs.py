"""A data folder with finished jobs, as the service leaves them, for what reads them."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ldm3d.brain import coarse, distance, image_features
from ldm3d.nifti import write_volume
from ldm3d.reference_profile import FACTS, FEATURES, ReferenceProfile, write_profile
from mlops.api.records import Outcome, Record, new_job_id
from mlops.api.schemas import FileInfo, ResolvedRequest

SHAPE, SPACING = (24, 24, 24), (6.0, 6.0, 6.0)
DIGESTS = {"1": "a" * 64, "2": "b" * 64}


def brain(seed: int, size: float = 1.0, variety: float = 1.0) -> np.ndarray:
    """(24, 24, 24): an ellipsoid with some noise, another one for each seed."""
    rng = np.random.default_rng(seed)
    radii = 8 * size * (1 + 0.08 * variety * rng.standard_normal(3))
    tissue = 0.6 + 0.05 * variety * rng.standard_normal()
    places = np.stack(np.meshgrid(*(np.arange(24) - 11.5,) * 3, indexing="ij"), -1)
    inside = ((places / radii) ** 2).sum(-1) < 1
    return np.clip(np.where(inside, tissue + 0.03 * rng.standard_normal(SHAPE), 0), 0, 1).astype(np.float32)


def job(
    data: Path,
    volumes: Sequence[np.ndarray],
    version: str = "1",
    seed: int = 0,
    state: str = "done",
    seconds: float = 2.0,
    digest: str | None = None,
    **fields: Any,
) -> Path:
    """A job that has ended; its folder."""
    request = ResolvedRequest(
        num=max(1, len(volumes)), seed=seed, steps=5, scheduler="rflow", model="demo", format="nii", dtype="float32",
        conditions={},
    )  # fmt: skip
    now = datetime.now(UTC)
    facts: dict[str, Any] = {"caller": "key:abcdefgh", "assigned_by": "job", "weights_sha256": {}, "result_bytes": 1}
    record = Record(
        id=new_job_id(), created=now, request=request, version=version, digest=digest or DIGESTS[version],
        **facts | fields,
    )  # fmt: skip
    folder = data / "jobs" / record.id
    (folder / "files").mkdir(parents=True)
    files = []
    for number, volume in enumerate(volumes):
        name = f"synimg_{seed}_{number}.nii"
        write_volume(folder / "files" / name, volume, SPACING)
        files.append(FileInfo(name=name, bytes=1, media_type="x", sha256=""))
    outcome = Outcome(state=state, started=now, finished=now + timedelta(seconds=seconds), files=files)  # type: ignore[arg-type]
    (folder / "job.json").write_text(record.model_dump_json())
    (folder / "outcome.json").write_text(outcome.model_dump_json())
    return folder


def profile(volumes: Sequence[np.ndarray], **fields: Any) -> ReferenceProfile:
    """The profile of training volumes."""
    features = [image_features(volume, SPACING) for volume in volumes]
    means = [coarse(volume) for volume in volumes]
    facts: dict[str, Any] = {"trained_on": "t" * 64, "num_train": len(volumes), "channel": 0}
    return ReferenceProfile(
        spacing=SPACING,
        size=SHAPE,
        features={name: sorted(found.get(name, 0.0) for found in features) for name in FEATURES},
        facts={name: {"unknown": 2} for name in FACTS},
        mean_image=np.mean(means, axis=0).ravel().tolist(),
        pair_distances=sorted(distance(a, b) for a, b in zip(means, means[1:] + means[:1], strict=True)),
        **facts | fields,
    )


def give_reference(data: Path, volumes: Sequence[np.ndarray]) -> None:
    """Put a profile beside the stored weights of both versions."""
    made = profile(volumes)
    for digest in DIGESTS.values():
        folder = data / "models" / digest
        folder.mkdir(parents=True, exist_ok=True)
        write_profile(folder, made)


def figures(text: str) -> dict[str, float]:
    """Of an exposition."""
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: math.nan if value == "NaN" else float(value) for name, _, value in rows}
