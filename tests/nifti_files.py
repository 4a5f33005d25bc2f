"""Tiny NIfTI files and data sets that the tests of the data rooms make for themselves."""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm3d.cases import Case

SHAPE = (10, 12, 8)


def volume(seed: int = 0, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """(*shape) int16 noise, 0 on the faces."""
    inner = np.random.default_rng(seed).integers(1, 1000, [n - 2 for n in shape])
    return np.pad(inner, 1).astype(np.int16)


def write(
    path: Path, array: np.ndarray, spacing: Sequence[float] = (1, 1, 1), affine: np.ndarray | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0]) if affine is None else affine), path)
    return path


def make_cases(
    folder: Path, num: int, shape: Sequence[int] = SHAPE, spacing: Sequence[float] = (1, 1, 1)
) -> list[Case]:
    """Cases c00, c01, ... of 3-D files."""
    names = [f"c{index:02d}" for index in range(num)]
    return [
        Case(name, write(folder / f"{name}.nii.gz", volume(index, shape), spacing)) for index, name in enumerate(names)
    ]


def make_task01(folder: Path, num: int) -> None:
    """The Decathlon's layout; channel c of case i is `volume(10 * i + c)`."""
    training = []
    for index in range(num):
        name = f"BRATS_{index:03d}.nii.gz"
        channels = np.stack([volume(10 * index + channel) for channel in range(4)], axis=-1)
        write(folder / "imagesTr" / name, channels)
        write(folder / "labelsTr" / name, (volume(index) > 500).astype(np.uint8))
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    content = {"modality": modality, "training": training, "test": ["./imagesTs/BRATS_900.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(content))
