"""Make sure that every case can be used before anything is trained on it, on all cores of all ranks."""

import gzip
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import nibabel as nib
import numpy as np

from ldm3d import distributed
from ldm3d.cases import CHANNELS, Case
from ldm3d.console import log, progress
from ldm3d.definitions import VOXEL_SIZE_MM
from ldm3d.errors import DataError, UserError
from ldm3d.nifti import apart_mm, read_volume, spacing_of

T = TypeVar("T")
OnError = Literal["fail", "skip"]

HIGHEST_LABEL = 4
SMALLEST_CONTENT = 0.01  # share of the voxels that must stand out from the darkest value
SHOWN = 20  # damaged cases that an error names
MAX_THREADS = 16  # each holds a volume or two
_ROUND = 64  # cases that a rank does between two meetings with the others: keeps the waits short
_CHUNK = 1 << 20


def examine(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Read a case's image and make sure that it, and its label if there is one, can be used.

    Returns:
        Volume (X, Y, Z) float32, RAS, in the file's own intensities; and its (4, 4) affine.

    Raises:
        DataError: missing, damaged or cut short; other dimensions or channels; values NaN, infinite or all alike;
            a voxel size outside 0.1 to 20 mm; a label of other values than 0 to 4 or on another grid.
    """
    require_files(case)
    volume, affine = _read_whole(case.image, case.channel)
    _check_values(case.image, volume)
    _check_spacing(case.image, affine)
    if case.label is not None:
        _check_label(case.label, volume.shape, affine)
    return volume, affine


def require_files(case: Case) -> None:
    """Raise `DataError`, naming case and contrast, where the image or the label is not there."""
    if not case.image.is_file():
        raise DataError(f"{case.name}: has no {case.attribute('modality') or 'image'}: {case.image} is not there")
    if case.label is not None and not case.label.is_file():
        raise DataError(f"{case.name}: has no label: {case.label} is not there")


def _read_whole(path: Path, channel: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Read one volume of a file of which nothing is missing, in the other channels neither."""
    size = _whole_size(path)
    volume, affine = read_volume(path, channel)
    image = nib.load(path)
    if channel is not None and image.shape[3:] != (len(CHANNELS),):
        raise DataError(f"{path}: has shape {image.shape}; a fourth axis of {len(CHANNELS)} channels is needed")
    expected = image.dataobj.offset + int(np.prod(image.shape)) * image.dataobj.dtype.itemsize
    if size < expected:
        raise DataError(f"{path}: is cut short: {size} bytes of {expected}")
    return volume, affine


def _whole_size(path: Path) -> int:
    """Bytes of a file when decompressed, every one of them and the checksum at the end having been read."""
    if not path.name.endswith(".gz"):
        return path.stat().st_size
    try:
        with gzip.open(path) as file:
            return sum(map(len, iter(lambda: file.read(_CHUNK), b"")))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is damaged or cut short: {error}") from error


def _check_values(path: Path, volume: np.ndarray) -> None:
    bad = volume.size - int(np.count_nonzero(np.isfinite(volume)))
    if bad:
        raise DataError(f"{path}: {bad} of {volume.size} voxels are NaN or infinite")
    lowest = volume.min()
    share = np.count_nonzero(volume > lowest) / volume.size
    if share < SMALLEST_CONTENT:
        raise DataError(f"{path}: is empty: {1 - share:.2%} of its voxels are {lowest:g}")


def _check_spacing(path: Path, affine: np.ndarray) -> None:
    low, high = VOXEL_SIZE_MM
    spacing = spacing_of(affine)
    if not all(low <= size <= high for size in spacing):
        shown = " x ".join(f"{size:g}" for size in spacing)
        raise DataError(f"{path}: a voxel of {shown} mm is not possible; {low:g} to {high:g} mm is")


def _check_label(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    label, label_affine = _read_whole(path, None)
    # NaN differs from itself, so it counts as no whole number.
    if not (label == np.rint(label)).all() or label.min() < 0 or label.max() > HIGHEST_LABEL:
        found = f"{label.min():g} to {label.max():g}"
        raise DataError(f"{path}: labels must be whole numbers from 0 to {HIGHEST_LABEL}; these are {found}")
    if label.shape != shape:
        raise DataError(f"{path}: the label has shape {label.shape}, its image {shape}")
    apart = apart_mm(shape, affine, label_affine)
    if apart > min(spacing_of(affine)) / 2:
        raise DataError(f"{path}: the label lies {apart:.3g} mm beside its image")


def warn_of_guessed_orientation(names: Sequence[str], count: int) -> None:
    """One line for all `names` of `count` cases whose files do not say where their axes point."""
    if names:
        log(
            f"warning: {len(names)} of {count} cases do not say how they lie (qform_code and sform_code are 0): "
            f"{names[0]}, for one. Their axes are taken to point to the left, the front and the top; look at some, and "
            "mend the headers where that is wrong"
        )


def share_out(
    function: Callable[[Case], T],
    cases: Sequence[Case],
    description: str,
    after_round: Callable[[list[T | DataError]], None] = lambda outcomes: None,
) -> list[T | DataError]:
    """Call `function` for every case, each rank its share of them, on all cores.

    Threads suffice, as decompression and NumPy let go of the interpreter.

    Args:
        function: what to do with a case.
        cases: the same on every rank.
        description: for the progress bar.
        after_round: called on every rank, now and then, with what all ranks have got since the last time.

    Returns:
        On every rank, for every case in order: what the function returned, or the `DataError` it raised.

    Raises:
        UserError: any other that the function raised (a full disk), on every rank.
    """
    ranks = distributed.world_size()
    results: list[list[T | DataError]] = [[] for _ in range(ranks)]
    with closing(_in_threads(function, cases[distributed.rank() :: ranks], description)) as outcomes:
        for _ in range(0, len(cases), ranks * _ROUND):
            shares = distributed.gather_objects(_next_round(outcomes))
            gathered = [[_or_raise(outcome) for outcome in share] for share in shares]
            for collected, share in zip(results, gathered, strict=True):
                collected += share
            after_round([outcome for share in gathered for outcome in share])
    return [results[number % ranks][number // ranks] for number in range(len(cases))]


def _next_round(outcomes: Iterator[T | UserError]) -> list[T | UserError]:
    batch = []
    for outcome in islice(outcomes, _ROUND):
        batch.append(outcome)
        if isinstance(outcome, UserError) and not isinstance(outcome, DataError):
            break
    return batch


def _or_raise(outcome: T | UserError) -> T | DataError:
    if isinstance(outcome, DataError) or not isinstance(outcome, UserError):
        return outcome
    raise outcome


def _in_threads(function: Callable[[Case], T], cases: Sequence[Case], description: str) -> Generator[T | UserError]:
    def attempt(case: Case) -> T | UserError:
        try:
            return function(case)
        except UserError as error:
            return type(error)(str(error))  # a new one: the old one's traceback keeps the volume in memory

    pool = ThreadPoolExecutor(num_threads())
    try:
        yield from progress(pool.map(attempt, cases), description, total=len(cases), unit="case")
    finally:
        pool.shutdown(cancel_futures=True)


def num_threads() -> int:
    """Cores of this process, when the processes of this machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def usable(cases: Sequence[Case], outcomes: Sequence[object], on_error: OnError) -> list[Case]:
    """The cases whose outcome is no `DataError`, in the same order; with "skip" a line says which were left out.

    Raises:
        DataError: names every damaged case with its reason; with "skip" only if no other is left.
    """
    problems = [str(outcome) for outcome in outcomes if isinstance(outcome, DataError)]
    good = [case for case, outcome in zip(cases, outcomes, strict=True) if not isinstance(outcome, DataError)]
    if problems and (on_error == "fail" or not good):
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        hint = " (data.on_error skip leaves such cases out)" if good else ""
        raise DataError(f"{len(problems)} of {len(cases)} cases cannot be used: {shown}{more}{hint}")
    for problem in problems:
        log(f"warning: left out: {problem}")
    return good
