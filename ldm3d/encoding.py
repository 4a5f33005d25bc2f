"""A latent cache while it is filled: its file, and which volumes are in it, so that a killed run goes on there."""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm3d.errors import OutputError
from ldm3d.files import write_text

# At most so much encoding is lost to a kill; also how long processes wait for each other meanwhile.
SECONDS_BETWEEN_MARKS = 30.0


class EncodedVolumes:
    """A text file: the cache's key, then a line of JSON for each time that volumes were added. For one process alone.

    Adding appends, as rewriting the file at each of thousands of times would grow with the square of their number.

    Args:
        path: of the file.
        key: digest of all that the encoded volumes depend on.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.cases: dict[int, str] = {}
        """Names of the encoded volumes by number."""

    def resume(self) -> bool:
        """Read what an earlier run has left; False where there is nothing, or nothing of this key."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        if not lines or lines[0] != self.key:
            return False
        for line in lines[1:]:
            try:
                self.cases |= {int(i): str(name) for i, name in json.loads(line).items()}
            except ValueError:  # cut short when the run was killed
                break
        self.begin()  # whole again, for what is appended
        return True

    def begin(self) -> None:
        """Write the key, and what is known to be encoded. Raises `OutputError`."""
        write_text(self.path, "\n".join([self.key, json.dumps(self.cases), ""]))

    def add(self, cases: Mapping[int, str]) -> None:
        """Note volumes whose data are on the disk; when it returns, so is the note. Raises `OutputError`."""
        self.cases |= cases
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cases) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def begin(path: Path, journal: EncodedVolumes, shape: tuple[int, ...]) -> None:
    """Go on with what a run of the same key has left, if it is of this shape; else make an empty file for all.

    Args:
        path: of the posteriors.
        journal: of the volumes in them; afterwards it knows those that need not be encoded again.
        shape: (N, V, 2, C, X, Y, Z).

    Raises:
        OutputError: the file cannot be written, or there is no room for it.
    """
    try:
        if _shape_of(path) == shape and journal.resume():
            return
        journal.path.unlink(missing_ok=True)
        _require_room(path.parent, math.prod(shape) * 2)
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
        journal.begin()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _shape_of(path: Path) -> tuple[int, ...] | None:
    """Shape of a file of posteriors that has its full length."""
    try:
        posteriors: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return posteriors.shape


def encode_in_rounds(
    path: Path, share: Iterator[int], encode: Callable[[int], tuple[np.ndarray, str]]
) -> Iterator[dict[int, str]]:
    """Encode this process's share; give, every `SECONDS_BETWEEN_MARKS`, the names of what is on the disk by then.

    Never ends: once all is done, it gives nothing, again and again, until the others have done theirs.

    Args:
        path: of the posteriors, made by `begin`.
        share: volumes of this process, by number.
        encode: a volume's number -> its posterior (V, 2, C, X, Y, Z) and its name.

    Raises:
        OutputError: the disk is full.
    """
    store = np.load(path, mmap_mode="r")
    with open(path, "rb+") as file:
        while True:
            encoded, start = {}, time.monotonic()
            for i in share:
                posterior, encoded[i] = encode(i)
                assert posterior.shape == store.shape[1:]
                # Not through the map: a page may hold the end of another process's volume, and file systems that
                # several machines share write back whole pages.
                _write_at(file, store.offset + i * posterior.nbytes, posterior.tobytes())
                if time.monotonic() - start >= SECONDS_BETWEEN_MARKS:
                    break
            os.fsync(file.fileno())
            yield encoded


def _write_at(file: BinaryIO, place: int, content: bytes) -> None:
    try:
        file.seek(place)
        file.write(content)
        file.flush()
    except OSError as error:
        raise OutputError(f"{file.name}: cannot be written: {error.strerror}") from error


def _require_room(folder: Path, nbytes: int) -> None:
    """A disk that is too small is known before hours of work. Raises `OSError`.

    Room is not reserved: where a file system cannot do that, the C library does it by writing to every block.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
