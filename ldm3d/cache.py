"""Prepared volumes on disk: made once, shared by all ranks and runs, read as memory maps.

    CACHE/files.json           SHA-256 of each source file, remembered by path, size and time of change
    CACHE/volumes/KEY.volume   one prepared volume: a header of 4096 bytes (JSON), then its voxels as 16-bit integers

KEY is a digest of the contents of image and label and of every setting that changes the result. An entry is made only
of a case that passed `ldm3d.checks`, so where the entry is there, the case need not be checked again. Old entries are
never removed; the folder may be deleted at any time.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm3d import distributed
from ldm3d.cases import Case
from ldm3d.checks import OnError, require_files, share_out, usable, warn_of_guessed_orientation
from ldm3d.console import log
from ldm3d.errors import DataError, OutputError
from ldm3d.files import atomic_path, sha256, write_text
from ldm3d.nifti import says_orientation
from ldm3d.volumes import PERCENTILES, PREPARATION, load_prepared

ONE = 65535
"""What 1.0 is stored as: steps of 1/65535 are finer than any scanner's."""
HEADER_BYTES = 4096
# At most the digests of so many seconds' work are lost to a kill: with them, prepared volumes are found by their key
# without reading their sources again.
SECONDS_BETWEEN_SAVES = 60.0
_DTYPE = np.dtype("<u2")
_Identity = tuple[int, int, str]  # size, time of change in ns, SHA-256


class _Ensured(NamedTuple):
    key: str
    files: dict[str, _Identity]
    made: bool
    oriented: bool  # as far as is known: entries of earlier versions do not say


class _Unusable(Exception):
    """An entry that is missing, damaged, or not what its name says."""


class VolumeCache:
    """Prepared volumes of one voxel size.

    Args:
        folder: where entries are kept; made when the first one is written.
        spacing: voxel size in mm (3).
    """

    def __init__(self, folder: Path, spacing: Sequence[float]):
        self.folder, self.spacing = folder, tuple(map(float, spacing))
        self._keys: dict[str, str] = {}
        self._files: dict[str, _Identity] = {}
        self._new_files: dict[str, _Identity] = {}
        self._saved_at = 0.0
        self._verified: set[str] = set()

    def build(self, cases: Sequence[Case], on_error: OnError = "fail") -> list[Case]:
        """Check and prepare every case that is not in the cache yet, each rank its share, on all cores.

        All ranks must call this; when it returns, every rank can read every volume.

        Returns:
            The usable cases, in the same order, the same on every rank.

        Raises:
            DataError: as `ldm3d.checks.usable` does; on every rank.
            OutputError: the folder cannot be written to, or the disk is full.
        """
        self._files, self._saved_at = _read_index(self._index), time.monotonic()
        outcomes = share_out(self._ensure, cases, "preparing volumes", self._note_files)
        self._remember()
        self._files = {}  # of no further use, and as large as all that is kept of the cases
        ensured = {case.name: o for case, o in zip(cases, outcomes, strict=True) if not isinstance(o, DataError)}
        self._keys |= {name: outcome.key for name, outcome in ensured.items()}
        guessed = [name for name, outcome in ensured.items() if not outcome.oriented]
        warn_of_guessed_orientation(guessed, len(cases))
        made = sum(outcome.made for outcome in ensured.values())
        if made:
            log(f"{self.folder}: {made} volumes prepared, {len(ensured) - made} were there")
        return usable(cases, outcomes, on_error)

    def get(self, case: Case) -> np.ndarray:
        """(X, Y, Z) prepared volume as a read-only memory map of 16-bit integers, in which `ONE` stands for 1.0.

        An entry that is damaged or gone is made anew.
        """
        key = self.key(case)
        try:
            if key not in self._verified:
                self._verify(key)
                self._verified.add(key)
            return self._map(key)
        except _Unusable:
            self._keys[case.name] = self._ensure(case, thorough=True).key
            return self._map(self._keys[case.name])

    def load(self, case: Case) -> np.ndarray:
        """(X, Y, Z) prepared volume, float32 in [0, 1]."""
        return to_float(self.get(case))

    def key(self, case: Case) -> str:
        """Digest of what the prepared volume is made of; another content or setting gives another one."""
        if case.name not in self._keys:
            self._keys[case.name] = self._ensure(case).key
        return self._keys[case.name]

    @property
    def _index(self) -> Path:
        return self.folder / "files.json"

    def _path(self, key: str) -> Path:
        return self.folder / "volumes" / f"{key}.volume"

    def _ensure(self, case: Case, thorough: bool = False) -> _Ensured:
        """Make the case's entry unless it is there; `thorough` compares its checksum, not its length alone."""
        require_files(case)
        sources = [path for path in (case.image, case.label) if path is not None]
        files = {str(path.absolute()): self._identify(path) for path in sources}
        key = self._digest(case, [digest for _, _, digest in files.values()])
        try:
            header = self._verify(key) if thorough else self._header(key)
            return _Ensured(key, files, made=False, oriented=header.get("oriented", True))
        except _Unusable as reason:
            if thorough or self._path(key).exists():
                log(f"{self._path(key)}: {reason}; made anew from {case.name}")
        volume, oriented = load_prepared(case, self.spacing), says_orientation(case.image)
        self._write(key, case, volume, oriented)
        return _Ensured(key, files, made=True, oriented=oriented)

    def _identify(self, path: Path) -> _Identity:
        try:
            status = path.stat()
            known = self._files.get(str(path.absolute()))
            if known and known[:2] == (status.st_size, status.st_mtime_ns):
                return known
            return status.st_size, status.st_mtime_ns, sha256(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error

    def _digest(self, case: Case, contents: Sequence[str]) -> str:
        made_of = {
            "preparation": PREPARATION,
            "contents": contents,
            "channel": case.channel,
            "spacing": self.spacing,
            "percentiles": PERCENTILES,
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def _write(self, key: str, case: Case, volume: np.ndarray, oriented: bool) -> None:
        voxels = np.ascontiguousarray(np.rint(volume * ONE), dtype=_DTYPE)
        header = {
            "key": key,
            "case": case.name,
            "shape": voxels.shape,
            "spacing": self.spacing,
            "one": ONE,
            "oriented": oriented,
            "crc32": zlib.crc32(voxels.data),
        }
        try:
            with atomic_path(self._path(key)) as path, open(path, "wb") as file:
                file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
                file.write(voxels.data)
        except OutputError as error:
            raise OutputError(f"{error}; data.cache_dir says where prepared volumes are kept") from error

    def _header(self, key: str) -> dict[str, Any]:
        """Header of an entry that has its full length. Raises `_Unusable`."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                header: dict[str, Any] = json.loads(file.read(HEADER_BYTES))
                size = file.seek(0, 2)
            expected = HEADER_BYTES + int(np.prod(header["shape"])) * _DTYPE.itemsize
        except FileNotFoundError:
            raise _Unusable("is gone") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Unusable("has a damaged header") from error
        if header.get("key") != key or size != expected:
            raise _Unusable(f"has {size} bytes of {expected}" if size != expected else "is another entry")
        return header

    def _map(self, key: str) -> np.ndarray:
        # Opened anew each time: a map kept for each of thousands of volumes would use up the open files.
        shape = tuple(self._header(key)["shape"])
        return np.memmap(self._path(key), dtype=_DTYPE, mode="r", offset=HEADER_BYTES, shape=shape)

    def _verify(self, key: str) -> dict[str, Any]:
        """Compare the voxels' checksum; done once for each entry and process. Gives its header. Raises `_Unusable`."""
        header = self._header(key)
        if zlib.crc32(self._map(key).data) != header.get("crc32"):
            raise _Unusable("has damaged voxels")
        return header

    def _note_files(self, outcomes: Sequence[_Ensured | DataError]) -> None:
        """Note what was identified; store it now and then, as preparing many volumes takes hours."""
        for outcome in outcomes:
            if not isinstance(outcome, DataError):
                self._new_files |= {p: i for p, i in outcome.files.items() if self._files.get(p) != i}
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self._remember()

    def _remember(self) -> None:
        self._files |= self._new_files
        if self._new_files and distributed.is_main():
            try:
                write_text(self._index, json.dumps(self._files, indent=0))
            except OutputError as error:
                # Only a later start becomes slower by this: it has to read the files again to know their digests.
                log(f"warning: {error}")
        self._new_files, self._saved_at = {}, time.monotonic()


def to_float(voxels: np.ndarray) -> np.ndarray:
    """Stored voxels as float32 in [0, 1]."""
    volume: np.ndarray = np.divide(voxels, ONE, dtype=np.float32)
    return volume


def _read_index(path: Path) -> dict[str, _Identity]:
    try:
        return {name: (int(size), int(time), str(digest)) for name, (size, time, digest) in _json_items(path)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        log(f"{path}: is damaged; the files are read again")
        return {}


def _json_items(path: Path) -> list[tuple[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8")).items())
