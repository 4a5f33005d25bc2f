"""How a generated volume is written: its name, and the sidecar that says how it was made."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm3d import __version__
from ldm3d.nifti import write_volume
from ldm3d.sampling import Sampler, VolumeId


def file_name(volume: VolumeId, extension: str = "nii.gz") -> str:
    """`synimg_<seed>_<number>.nii.gz`, the same whoever makes the volume."""
    return f"synimg_{volume.seed}_{volume.number}.{extension}"


def write_sample(
    path: Path,
    sampler: Sampler,
    volume: VolumeId,
    values: Tensor,
    scheduler: str,
    steps: int,
    dtype: Literal["float32", "int16"] = "float32",
    time: datetime | None = None,
) -> None:
    """Write a volume, and beside it how it was made.

    Args:
        path: ends with `.nii.gz` or `.nii`; usually `file_name` in a folder.
        sampler: made it.
        volume: which one it is.
        values: (1, X, Y, Z) in [0, 1].
        scheduler: that it was sampled with.
        steps: network evaluations.
        dtype: how voxels are stored.
        time: what the sidecar gives as its time; now if None.

    Raises:
        OutputError: as `ldm3d.nifti.write_volume`.
    """
    sidecar: dict[str, Any] = {
        "seed": volume.seed,
        "index": volume.number,
        "scheduler": scheduler,
        "steps": steps,
        "weights_sha256": sampler.digests,
        "scale_factor": sampler.card.scale_factor,
        "spacing_mm": sampler.card.spacing,
        "intensity_range": sampler.card.intensity_range,
        "device": str(sampler.device),
        # On a CPU another number of threads adds in another order, which shows in the last digit.
        "threads": torch.get_num_threads(),
        "precision": str(sampler.precision.dtype) if sampler.precision.enabled else "torch.float32",
        # In pieces or windows an image is another one in the last digits, or more.
        "decoding": str(sampler.decoding),
        "code_version": __version__,
        "torch_version": torch.__version__,
        "time": (time or datetime.now(UTC)).isoformat(timespec="seconds"),
    }
    write_volume(path, values[0].numpy(), sampler.card.spacing, dtype, sidecar)
