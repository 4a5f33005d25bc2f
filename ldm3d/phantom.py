"""The embedded data set: anatomically real brains with tumours, made on the spot.

Each subject is the ICBM152 template seen through a smooth random map from the subject's space to the template's, with
wider or narrower ventricles and sulci, a grown tumour that pushes its surroundings away, and the contrasts, shading and
noise of a scanner. All of it is a function of space in millimetres: a subject keeps its anatomy at any spacing.
"""

import gzip
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ldm3d.console import log, progress
from ldm3d.errors import DataError, UserError
from ldm3d.files import atomic_path, write_text
from ldm3d.phantom_anatomy import draw_anatomy, fit, tissue_maps
from ldm3d.phantom_scan import scan
from ldm3d.phantom_template import load_template
from ldm3d.phantom_tumour import draw_tumour, tumour_starts

Shape = tuple[int, int, int]

TASK = "Task01_BrainTumour"
CHANNELS = ("FLAIR", "T1w", "t1gd", "T2w")
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
DEFAULT_SHAPE, DEFAULT_SPACING = (48, 64, 48), 3.2
# Raised when subjects change, so that old and new ones are never mixed in one folder.
VERSION = 1
# Holds the parameters while the data set is being written, dataset.json being there only when it is whole.
CLAIM = "phantom-unfinished.json"
# Elsewhere a forked process is unsafe or unknown; there each worker loads the template itself.
FORK = sys.platform == "linux"


@dataclass(frozen=True)
class Phantom:
    """One subject.

    Attributes:
        image: (4, X, Y, Z) float32, channels as in `CHANNELS`; arbitrary scanner units, 0 outside the brain.
        label: (X, Y, Z) uint8, classes as in `LABELS`.
        affine: (4, 4), voxel index to mm, RAS; the origin of the world is the centre of the grid.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def make_phantom(seed: int, index: int, shape: Shape = DEFAULT_SHAPE, spacing: float = DEFAULT_SPACING) -> Phantom:
    """Make subject `index` of the data set `seed`.

    Args:
        seed: of the data set, 0 or more.
        index: of the subject, 0 or more; subjects do not depend on each other.
        shape: voxels along X, Y, Z. The default grid holds every brain whole; a smaller one cuts it.
        spacing: edge of a voxel in mm.

    Raises:
        UserError: an argument makes no sense.
        DataError: the template is not installed.
    """
    _check_grid(shape, spacing)
    _check_count("seed", seed, 0)
    _check_count("index", index, 0)
    rng = np.random.default_rng([seed, index])
    template = load_template(float(spacing))
    anatomy = draw_anatomy(rng)
    tumour = draw_tumour(rng, anatomy.to_subject)
    middle, shrink = fit(template, anatomy)
    axes = tuple(
        ((np.arange(n) - (n - 1) / 2) * spacing * shrink + m).astype(np.float32)
        for n, m in zip(shape, middle, strict=True)
    )
    tissue = tissue_maps(template, anatomy, tumour.push(axes), axes)
    parts, label = tumour.grow(axes, tissue, spacing)
    image = scan(rng, axes, tissue, parts)
    return Phantom(image, label, _affine(shape, spacing))


def _check_grid(shape: Shape, spacing: float) -> None:
    """Refuse a grid that cannot be.

    Raises:
        UserError: naming the argument and what would be right.
    """
    whole = len(shape) == 3 and all(isinstance(n, int | np.integer) and n > 0 for n in shape)
    if not whole:
        raise UserError(f"phantom: shape {shape} must be three positive whole numbers of voxels")
    if not 0.5 <= spacing <= 20:
        raise UserError(f"phantom: spacing {spacing} mm must be from 0.5 to 20")


def _affine(shape: Shape, spacing: float) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    return affine


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"phantom: {name} {value} must be a whole number, {least} or more")


def write_dataset(
    root: str | Path,
    num: int,
    seed: int = 0,
    shape: Shape = DEFAULT_SHAPE,
    spacing: float = DEFAULT_SPACING,
    workers: int = 1,
) -> None:
    """Write `num` subjects under `root` in the layout of the Decathlon's Task01_BrainTumour.

    `dataset.json`, written last, holds the parameters under the key "phantom". Files that are there already are kept:
    an interrupted call is finished by the next one, and a call for what is there returns at once.

    Args:
        root: the folder that gets `Task01_BrainTumour` (`data_base_dir` of the environment file).
        num: of subjects, 1 or more.
        seed: of the data set.
        shape: voxels along X, Y, Z.
        spacing: edge of a voxel in mm.
        workers: processes to share the work; the files do not depend on it.

    Raises:
        UserError: an argument makes no sense.
        DataError: another data set is there, or the template is not installed.
        OutputError: the folder cannot be written to.
    """
    for name, value, least in (("num", num, 1), ("seed", seed, 0), ("workers", workers, 1)):
        _check_count(name, value, least)
    _check_grid(shape, spacing)
    folder = Path(root) / TASK
    made_from = {
        "version": VERSION,
        "num": num,
        "seed": seed,
        "shape": list(map(int, shape)),
        "spacing": float(spacing),
    }
    _claim(folder, made_from)
    missing = [index for index in range(num) if not all(path.is_file() for path in _files(folder, index))]
    if not missing and (folder / "dataset.json").is_file():
        log(f"{folder}: the embedded data set of {num} cases is there already")
        return
    make = partial(_write_case, folder, seed, shape, spacing)
    if missing and FORK:
        # Worker processes are forked from this one and find the template in their memory.
        load_template(float(spacing))
        tumour_starts()
    for _ in progress(_in_processes(make, missing, workers), "making brains", total=len(missing), unit="case"):
        pass
    write_text(folder / "dataset.json", json.dumps(_description(num, made_from), indent=2) + "\n")
    (folder / CLAIM).unlink(missing_ok=True)
    log(f"{folder}: {num} cases of the embedded data set")


def _claim(folder: Path, made_from: dict[str, Any]) -> None:
    """Note what the folder is going to hold, so that no later call mixes other subjects into it.

    Raises:
        DataError: the folder holds, or was going to hold, something else.
    """
    for name in ("dataset.json", CLAIM):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("phantom")
        except (ValueError, AttributeError):
            found = None
        if found != made_from:
            what = f"the embedded data set made from {json.dumps(found)}" if found else "another data set"
            raise DataError(
                f"{folder} holds {what}, not the one asked for ({json.dumps(made_from)}); "
                "remove the folder, or use another data_base_dir"
            )
        return
    if any((folder / name).exists() for name in ("imagesTr", "labelsTr")):
        raise DataError(f"{folder} holds images of another data set; remove the folder, or use another data_base_dir")
    write_text(folder / CLAIM, json.dumps({"phantom": made_from}) + "\n")


def _files(folder: Path, index: int) -> tuple[Path, Path]:
    name = f"BRATS_{index + 1:03d}.nii.gz"
    return folder / "imagesTr" / name, folder / "labelsTr" / name


def _in_processes(make: Callable[[int], None], indices: list[int], workers: int) -> Iterator[None]:
    if workers == 1 or len(indices) < 2:
        yield from map(make, indices)
        return
    context = multiprocessing.get_context("fork" if FORK else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(indices)), context, initializer=_leave_interrupts_to_parent)
    try:
        yield from pool.map(make, indices)
    except BrokenProcessPool as error:
        raise UserError(
            f"a process was killed while making brains (out of memory?); --workers {workers} may be too many"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_case(folder: Path, seed: int, shape: Shape, spacing: float, index: int) -> None:
    phantom = make_phantom(seed, index, shape, spacing)
    image, label = _files(folder, index)
    _write_nifti(label, phantom.label, phantom.affine)
    _write_nifti(image, np.rint(np.moveaxis(phantom.image, 0, -1)).astype(np.int16), phantom.affine)


def _write_nifti(target: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    nifti = nib.Nifti1Image(volume, affine)
    nifti.header.set_xyzt_units("mm", "sec" if volume.ndim == 4 else None)
    with atomic_path(target) as path:
        # No time in the gzip header: the same subject is the same file.
        path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=1, mtime=0))


def _description(num: int, made_from: dict[str, Any]) -> dict[str, Any]:
    """The content of dataset.json, with the keys of the Decathlon's own."""
    names = [_files(Path(), index)[0].name for index in range(num)]
    return {
        "name": "BRATS",
        "description": "Embedded data set, no patients: simulated tumours in brains bent from the ICBM152 template",
        "reference": "Fonov et al. 2009, ICBM152 2009a non-linear symmetric template",
        "licence": "as the ICBM152 template, whose licence nilearn gives as unknown",
        "release": f"phantom {VERSION}",
        "tensorImageSize": "4D",
        "modality": {str(channel): name for channel, name in enumerate(CHANNELS)},
        "labels": {str(value): name for value, name in enumerate(LABELS)},
        "numTraining": num,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
        "phantom": made_from,
    }
