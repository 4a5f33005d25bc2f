"""Where backups lie: a folder, or what fsspec reaches by an address such as abfs://container/prefix.

    <name>/<sha256>        content, named by its digest
    <name>/manifest.json   written last, removed first

Backups share nothing, so that no damage and no removal touches two of them.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ldm3d.errors import ConfigError, DataError, OutputError
from ldm3d.files import write_text
from mlops.backup.manifest import LARGEST_BYTES, MANIFEST, NAME, Content, read_manifest, write_manifest
from mlops.backup.snapshot import CHUNK_BYTES, OpenFile
from mlops.remote import patiently, reach

UNFINISHED = timedelta(days=1)
"""No backup takes so long: what has no manifest then was begun by a process that has ended."""
TIME = "%Y%m%dT%H%M%S.%fZ"


def new_name(now: datetime) -> str:
    return f"{now:{TIME}}-{secrets.token_hex(2)}"


def time_of(name: str) -> datetime:
    return datetime.strptime(name.partition("-")[0], TIME).replace(tzinfo=UTC)


class Vault:
    """A place with backups.

    Raises:
        ConfigError: the address cannot be used, or there is no such folder.
    """

    def __init__(self, address: str):
        self.filesystem, root = reach(address)
        self.address, self._root = address.rstrip("/"), root.rstrip("/")
        self._local = "file" in self.filesystem.protocol
        if self._local and not Path(self._root).is_dir():
            # Where a drive is not mounted, its folder is missing, and making it would fill the disk below.
            raise ConfigError(f"{self.address}: no such folder; make it first")

    def names(self) -> list[str]:
        """Backups that are whole, oldest first."""
        return sorted(name for name, files in self._listed().items() if MANIFEST in files)

    def newest(self) -> str:
        """Raises `ConfigError` where there is none."""
        names = self.names()
        if not names:
            raise ConfigError(f"{self.address}: there is no backup")
        return names[-1]

    def put(self, name: str, file: OpenFile, digest: str) -> None:
        """Store a file's content, unless the same is there already.

        Raises:
            DataError: it is no longer what its digest says.
            OutputError: it cannot be written.
        """
        self._do(name, partial(self._put, self._path(name, digest), file, digest))

    def finish(self, name: str, content: Content) -> None:
        """Read back what was stored, and declare the backup whole.

        Raises:
            DataError: what was read is not what was stored.
            OutputError: it cannot be written.
        """
        if problems := self.problems(name, content):
            raise DataError(f"{self.address}/{name}: {problems[0]}; the backup was not finished")
        text = write_manifest(content)
        if self._local:
            write_text(self._path(name, MANIFEST), text.decode(), mode=0o600)
        else:
            self._do(name, lambda: self.filesystem.pipe_file(self._path(name, MANIFEST), text))

    def content(self, name: str) -> Content:
        """What a backup holds.

        Raises:
            ConfigError: there is no such backup.
            DataError: its manifest is damaged.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name}: no name of a backup, such as 20260131T020000.000000Z-1a2b")
        path = self._path(name, MANIFEST)
        try:
            text = self._do(name, lambda: b"".join(self._read(path, LARGEST_BYTES)))
        except FileNotFoundError as error:
            raise ConfigError(f"{self.address}: has no backup {name}; list shows which there are") from error
        return read_manifest(text, f"{self.address}/{name}/{MANIFEST}")

    def get(self, name: str, digest: str, size: int, target: BinaryIO | None = None) -> None:
        """Read a file's content, and write it to `target`, which is right only when this returns.

        Raises:
            DataError: it is missing or damaged.
            OutputError: it cannot be read, or `target` not written to.
        """
        path = self._path(name, digest)
        try:
            self._do(path, partial(self._get, path, digest, size, target))
        except FileNotFoundError as error:
            raise DataError(f"{path}: is missing") from error

    def problems(self, name: str, content: Content) -> list[str]:
        """Read everything; what of it is missing or not as it was stored."""
        problems = []
        for digest, size in content.objects.items():
            try:
                self.get(name, digest, size)
            except DataError as error:
                problems.append(str(error))
        return problems

    def prune(self, keep: int, keep_days: float, now: datetime) -> list[str]:
        """Remove old backups, and what was never finished.

        Backups of other sources do not count: hourly ones of the audit log must not push out the weights. Damaged ones
        are counted by themselves.

        Args:
            keep: so many of the newest of the same sources stay, however old.
            keep_days: so do those that are younger.
            now: the time.

        Returns:
            Names of what was removed.
        """
        listed = self._listed()
        whole = sorted(name for name in listed if MANIFEST in listed[name])
        alike: dict[frozenset[str], list[str]] = {}
        for name in whole:
            alike.setdefault(self._saved(name), []).append(name)
        more = [name for names in alike.values() for name in names[: max(0, len(names) - keep)]]
        old = [name for name in more if time_of(name) < now - timedelta(days=keep_days)]
        left = [name for name in listed if name not in whole and time_of(name) < now - UNFINISHED]
        for name in sorted(old + left):
            for file in sorted(
                listed[name], key=lambda file: file != MANIFEST
            ):  # out of the list before it is in pieces
                with suppress(FileNotFoundError):
                    self._do(name, partial(self.filesystem.rm_file, self._path(name, file)))
            if self._local:
                with suppress(OSError):
                    Path(self._root, name).rmdir()
        return sorted(old + left)

    def _saved(self, name: str) -> frozenset[str]:
        """Names of a backup's sources; none where its manifest is damaged."""
        try:
            return frozenset(source.name for source in self.content(name).sources)
        except (ConfigError, DataError):
            return frozenset()

    def _listed(self) -> dict[str, set[str]]:
        """Files by the backup that they are in."""
        self.filesystem.invalidate_cache()
        try:
            paths = self._do("list", lambda: self.filesystem.find(self._root, maxdepth=2))
        except FileNotFoundError:
            return {}
        listed: dict[str, set[str]] = {}
        for path in paths:
            folder, _, file = path.rpartition("/")
            name = folder.rpartition("/")[2]
            if NAME.fullmatch(name):
                listed.setdefault(name, set()).add(file)
        return listed

    def _path(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"

    def _put(self, path: str, file: OpenFile, digest: str) -> None:
        if self._local:
            Path(path).parent.mkdir(mode=0o700, exist_ok=True)
        found = hashlib.sha256()
        with self.filesystem.open(path, "wb") as out:
            for chunk in file.chunks():
                found.update(chunk)
                out.write(chunk)
            if self._local:
                out.flush()
                os.fsync(out.fileno())
        if found.hexdigest() != digest:
            raise DataError(f"{file.place}: was changed while it was read; try again when it is finished")

    def _read(self, path: str, most: int) -> Iterator[bytes]:
        if self._local and Path(path).is_symlink():
            raise DataError(f"{path}: is a symbolic link, and is not followed")
        with self.filesystem.open(path, "rb") as file:
            left = most + 1  # one byte too much is enough to know
            while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk
        if left <= 0:
            raise DataError(f"{path}: is larger than it should be")

    def _get(self, path: str, digest: str, size: int, target: BinaryIO | None) -> None:
        if target:
            target.seek(0)
            target.truncate()
        found, count = hashlib.sha256(), 0
        for chunk in self._read(path, size):
            found.update(chunk)
            count += len(chunk)
            if target:
                _write(target, chunk)
        if count != size or found.hexdigest() != digest:
            raise DataError(f"{path}: is damaged")

    def _do(self, what: str, action: Any) -> Any:
        return patiently(f"{self.address}: {what}", action)


def _write(target: BinaryIO, chunk: bytes) -> None:
    try:
        target.write(chunk)
    except OSError as error:  # not the place's fault
        raise OutputError(f"{target.name}: cannot be written: {error.strerror}") from error
