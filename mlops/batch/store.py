"""Where a batch's files go: a local folder, or what fsspec reaches by an address such as s3://bucket/prefix."""

import hashlib
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.utils import get_protocol

from ldm3d.console import log
from ldm3d.errors import OutputError
from ldm3d.files import atomic_path, require_writable, sha256
from mlops.remote import patiently, reach

RETRY_SECONDS = (1.0, 4.0, 15.0)
"""How long to wait before each further try of something that a remote file system did not do."""
LEFTOVER_SECONDS = 3600.0
"""Nothing takes that long to write: an older temporary file is that of a killed process."""
VOLUME_SUFFIX = ".nii.gz"

T = TypeVar("T")


class Store(ABC):
    """A place with files, whose names may have folders in them.

    Attributes:
        name: of the place, for people.
    """

    name: str

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Files at the top of the place, and their bytes, as they are now."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file."""

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """Digest of a file's content; None if there is no such file."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a small file, or replace it."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> None:
        """Write a small file unless it is there: of several processes that try, one does it."""

    @abstractmethod
    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local folder; a volume and its sidecar that are written whole in it are in the place at the end.

        The volume comes last, so there is none without its sidecar.
        """


def open_store(output: str) -> Store:
    """The place that a command line names: a folder, or an address of fsspec.

    Raises:
        ConfigError: nobody knows this kind of address, or its package is not installed.
        OutputError: the folder cannot be written to.
    """
    protocol = get_protocol(output)
    if protocol in ("file", "local"):
        return LocalStore(Path(output.removeprefix(f"{protocol}://")))
    filesystem, root = reach(output)
    return RemoteStore(filesystem, root, output)


class LocalStore(Store):
    """A folder; it may be one that several machines share."""

    def __init__(self, folder: Path):
        require_writable(folder)
        self.folder, self.name = folder, str(folder)
        self._sweep()

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for path in self.folder.glob("*"):
            with suppress(FileNotFoundError):  # another shard's temporary file
                if path.is_file():
                    sizes[path.name] = path.stat().st_size
        return sizes

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{self.folder / name}: cannot be read: {error.strerror or error}") from error

    def sha256(self, name: str) -> str | None:
        try:
            return sha256(self.folder / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{self.folder / name}: cannot be read: {error.strerror or error}") from error

    def write(self, name: str, content: bytes) -> None:
        with atomic_path(self.folder / name) as temporary:
            temporary.write_bytes(content)

    def create(self, name: str, content: bytes) -> None:
        # A link, unlike a rename, fails where the name is taken; and what it names is whole.
        target = self.folder / name
        whole = target.with_name(f".tmp-{os.getpid()}-{time.monotonic_ns()}-{target.name}")
        self.write(str(whole.relative_to(self.folder)), content)
        try:
            os.link(whole, target)
        except FileExistsError:
            pass
        except OSError:  # no links here, as on some network drives: nearly as good
            if not target.exists():
                self.write(name, content)
        finally:
            whole.unlink()

    @contextmanager
    def staged(self) -> Iterator[Path]:
        yield self.folder  # where each file appears whole by itself

    def _sweep(self) -> None:
        """Remove what killed processes have left half written; what others may be writing now stays."""
        for leftover in (*self.folder.glob(".tmp-*"), *self.folder.glob("manifest/.tmp-*")):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                    leftover.unlink()


class RemoteStore(Store):
    """A place on a file system of fsspec's. What fails is tried again a few times.

    Object stores show a file when it is whole. Of others nothing is trusted but what `sizes` and `sha256` say.
    """

    def __init__(self, filesystem: Any, root: str, address: str):
        self.filesystem, self._root, self.name = filesystem, root.rstrip("/"), address.rstrip("/")

    def sizes(self) -> dict[str, int]:
        self.filesystem.invalidate_cache()
        try:
            entries = self._patiently(self.name, lambda: self.filesystem.ls(self._root, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries if entry["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        try:
            return self._patiently(name, lambda: bytes(self.filesystem.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str | None:
        try:
            return self._patiently(name, lambda: self._digest(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._put(name, lambda: self.filesystem.pipe_file(self._path(name), content))

    def create(self, name: str, content: bytes) -> None:
        with suppress(FileExistsError):
            self._put(name, lambda: self.filesystem.pipe_file(self._path(name), content, mode="create"))

    @contextmanager
    def staged(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ldm3d-batch-") as folder:
            yield Path(folder)
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name.endswith(VOLUME_SUFFIX)):
                self._put(path.name, partial(self.filesystem.put_file, str(path), self._path(path.name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _digest(self, path: str) -> str:
        with self.filesystem.open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**22):
                digest.update(block)
        return digest.hexdigest()

    def _put(self, name: str, action: Callable[[], Any]) -> None:
        try:
            self._patiently(name, action)
        except FileNotFoundError as error:
            raise OutputError(f"{self.name}: cannot be written: there is no such bucket or folder") from error

    def _patiently(self, name: str, action: Callable[[], T]) -> T:
        """Do something; where it fails otherwise than for good, again.

        Raises:
            FileNotFoundError: said by the file system.
            FileExistsError: said by the file system.
            OutputError: all else.
        """
        return patiently(f"{self.name}: {name}", action, RETRY_SECONDS, log)
