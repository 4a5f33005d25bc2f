"""NIfTI in and out: the right affine, spacing and provenance, one channel at a time."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ldm3d.errors import DataError, OutputError
from ldm3d.files import atomic_path, write_text

INT16_MAX = 32767
# nibabel answers a damaged file with any of these, depending on where the damage is.
_DAMAGE = (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error)


def centred_affine(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """RAS affine with the world's origin in the middle of the volume.

    Args:
        shape: number of voxels (X, Y, Z).
        spacing: voxel size in mm (3).

    Returns:
        (4, 4) float64, voxel index -> mm; x grows to the right, y to the front, z upwards.
    """
    affine = np.diag([*map(float, spacing), 1.0])
    affine[:3, 3] = -(np.asarray(shape, dtype=float) - 1) / 2 * affine.diagonal()[:3]
    return affine


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along each axis of a volume with this (4, 4) affine."""
    x, y, z = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def apart_mm(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """How far at most two affines (4, 4) take a voxel of a grid (X, Y, Z) apart: at one of its corners, in mm."""
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in shape))]).T
    return float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max())


def stem_of(path: str | Path) -> str:
    """File name without folder and without `.nii.gz` or `.nii`."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def read_volume(path: str | Path, channel: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read one volume, turned to RAS.

    Of a 4-D file only the channel asked for is read; a compressed one is decompressed no further than that channel.

    Args:
        path: `.nii` or `.nii.gz`, 3-D (X, Y, Z) or 4-D (X, Y, Z, C).
        channel: which channel, from 0; may be None where there is only one.

    Returns:
        Volume (X, Y, Z) float32 with the file's scaling applied, and its (4, 4) affine.

    Raises:
        DataError: the file cannot be read, is damaged, is not NIfTI, has other dimensions, or lacks the channel.
    """
    image = _opened(path)
    index = _channel_index(path, image, channel)
    affine = _checked_affine(path, image)
    try:
        volume = np.asarray(image.dataobj[index])
    except _DAMAGE as error:
        raise DataError(f"{path}: is damaged or cut short: {_one_line(error)}") from error
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, volume.shape)
    return np.array(nib.apply_orientation(volume, orientation), dtype=np.float32, order="C"), affine


def num_channels(path: str | Path) -> int:
    """How many volumes a file holds: 1 for (X, Y, Z), C for (X, Y, Z, C). Only its header is read.

    Raises:
        DataError: as `read_volume`.
    """
    shape = _opened(path).shape
    return shape[3] if len(shape) == 4 else 1


def orientation_of(path: str | Path) -> str:
    """Where the axes of a file's voxels point: `RAS` to the right, front and top. Only its header is read.

    Raises:
        DataError: as `read_volume`.
    """
    return "".join(nib.aff2axcodes(_checked_affine(path, _opened(path))))


def says_orientation(path: str | Path) -> bool:
    """Whether a file's header says where its axes point: without `qform` and `sform` everyone guesses.

    Raises:
        DataError: as `read_volume`.
    """
    header = _opened(path).header
    return bool(header["qform_code"] or header["sform_code"])


def _opened(path: str | Path) -> Any:
    """The image with its header read and its dimensions checked, its voxels not."""
    try:
        image = nib.load(path, keep_file_open=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read as NIfTI: {_one_line(error)}") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise DataError(f"{path}: is {type(image).__name__}, not NIfTI")
    shape, dtype = image.shape, image.get_data_dtype()
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(f"{path}: has shape {shape}; a volume (X, Y, Z) or channels (X, Y, Z, C) are needed")
    if not (np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating)):
        raise DataError(f"{path}: holds {dtype} values; plain numbers are needed")
    return image


def _channel_index(path: str | Path, image: Any, channel: int | None) -> tuple[Any, ...]:
    """What to index the file's array with to get the 3-D volume of `channel`."""
    shape = image.shape
    channels = shape[3] if len(shape) == 4 else 1
    if channel is None and channels > 1:
        raise DataError(f"{path}: has {channels} channels; say which one, 0 to {channels - 1}")
    if not 0 <= (channel or 0) < channels:
        raise DataError(f"{path}: has no channel {channel}; it has {channels}, counted from 0")
    # `...` alone lets nibabel take the whole array; an index into the last axis is one contiguous run of bytes.
    return (...,) if len(shape) == 3 else (..., channel or 0)


def _checked_affine(path: str | Path, image: Any) -> np.ndarray:
    affine = np.asarray(image.affine, dtype=float)
    # Where two axes are nearly one, the determinant may be large and no axis be the world's x, y or z.
    if not np.isfinite(affine).all() or np.isnan(nib.io_orientation(affine)).any():
        raise DataError(f"{path}: its affine {affine[:3].tolist()} does not say where the voxels are")
    return affine


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def write_volume(
    path: str | Path,
    volume: np.ndarray,
    spacing: Sequence[float],
    dtype: Literal["float32", "int16"] = "float32",
    sidecar: Mapping[str, Any] | None = None,
) -> None:
    """Write a volume as `.nii.gz` or `.nii`, centred at the world's origin, and its provenance as `.json` beside it.

    The same input gives the same bytes. The sidecar appears first, both appear whole or not at all: there is never
    a volume without its provenance.

    Args:
        path: ends with `.nii.gz` or, not compressed, `.nii`.
        volume: (X, Y, Z), RAS, values in [0, 1].
        spacing: voxel size in mm (3).
        dtype: how voxels are stored; "int16" takes half the room and reads back within 1/32767.
        sidecar: what to write as `<name>.json`; nothing if None.

    Raises:
        OutputError: values that are not finite, or outside [0, 1] for int16; the name; or the folder cannot be written.
    """
    path = Path(path)
    if not path.name.endswith((".nii.gz", ".nii")):
        raise OutputError(f"{path}: the name of a volume must end with .nii.gz or .nii")
    image = _image(path, np.asarray(volume, dtype=np.float32), spacing, dtype)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as raw:
            if path.name.endswith(".gz"):
                # An empty name and time 0 in the gzip header: bytes depend on the content alone.
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
                    image.to_stream(file)
            else:
                image.to_stream(raw)
        if sidecar is not None:
            write_text(path.with_name(f"{stem_of(path)}.json"), json.dumps(sidecar, indent=2, allow_nan=False) + "\n")


def _image(path: Path, volume: np.ndarray, spacing: Sequence[float], dtype: str) -> Any:
    if volume.ndim != 3 or len(spacing) != 3:
        raise ValueError(f"shape {volume.shape} and spacing {spacing} are not those of one 3-D volume")
    bad = volume.size - np.count_nonzero(np.isfinite(volume))
    if bad:
        raise OutputError(f"{path}: not written: {bad} of {volume.size} values are NaN or infinite")
    if dtype == "int16":
        low, high = float(volume.min()), float(volume.max())
        if low < 0 or high > 1:
            raise OutputError(f"{path}: not written: values run from {low:g} to {high:g}, int16 holds [0, 1]")
        volume = np.round(volume * INT16_MAX).astype(np.int16)
    affine = centred_affine(volume.shape, spacing)
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1 / INT16_MAX if dtype == "int16" else 1, 0)
    return image
