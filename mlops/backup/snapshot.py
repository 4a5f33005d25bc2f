"""Files as they stood at one moment, while trainings and the service go on writing.

All files are opened before any is read. Whoever replaces one meanwhile, as the project does, by renaming another over
it, does not disturb what is open; and if nothing was replaced between the first opening and a look at all of them
afterwards, they belong together. An audit log, which is appended to, is opened between two entries and read as far as
it went then.
"""

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ldm3d.errors import ConfigError, DataError, OutputError
from mlops.api.audit_chain import BEGINNING, CURRENT, ROTATED, Findings, between_entries, follow, read_line
from mlops.backup.manifest import checked_path

CHUNK_BYTES = 2**20
TRIES = 20
PAUSE_SECONDS = 0.25
DATA_FOLDER = ("active.json", "models/*/*.safetensors", "audit/**/audit*.jsonl")
"""What is kept of the service's folder. Volumes can be made again from their seeds; the rest is of the moment."""
SECRETS = ("keys.json", "*.key", "*.pem")


@dataclass(frozen=True)
class OpenFile:
    """A file that stays as it is now.

    Args:
        path: below its source's folder.
        place: where it is on this machine.
        file: open for reading.
        status: when it was opened.
        appended: to the end of it only; its beginning stays.
    """

    path: str
    place: Path
    file: BinaryIO
    status: os.stat_result
    appended: bool

    @property
    def size(self) -> int:
        return self.status.st_size

    def chunks(self) -> Iterator[bytes]:
        """Content as of `status`.

        Raises:
            DataError: somebody writes into the file instead of replacing it.
        """
        self.file.seek(0)
        left = self.size
        while left and (chunk := self.file.read(min(CHUNK_BYTES, left))):
            left -= len(chunk)
            yield chunk
        if left or not (self.appended or _same(os.fstat(self.file.fileno()), self.status)):
            raise DataError(f"{self.place}: was changed while it was read; try again when it is finished")

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


@contextmanager
def snapshot(source: Path, with_keys: bool) -> Iterator[list[OpenFile]]:
    """Open what is to be saved of a folder, or a single file.

    Raises:
        ConfigError: there is nothing to save.
        DataError: there is a symbolic link, which may lead anywhere.
        OutputError: the files are replaced all the time.
    """
    for _ in range(TRIES):
        with ExitStack() as stack:
            try:
                found = _open_all(source, with_keys, stack)
                still = all(file.appended or _same(file.place.stat(), file.status) for file in found)
            except FileNotFoundError:  # renamed or removed meanwhile
                still = False
            except OSError as error:
                raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
            if still:
                if not found:
                    raise ConfigError(f"{source}: holds nothing to save")
                yield found
                return
        time.sleep(PAUSE_SECONDS)
    raise OutputError(f"{source}: its files were replaced {TRIES} times while they were opened; try again later")


def audit_logs(files: list[OpenFile]) -> dict[str, tuple[str, Findings]]:
    """The audit logs among the files, by folder (`.` is the source's): the hash that each begins after, and findings.

    The oldest files of a log may have been removed by rule, so it may begin anywhere.
    """
    logs = {}
    for folder in sorted({_folder(file) for file in files if file.appended}):
        log = [file for file in files if file.appended and _folder(file) == folder]
        log.sort(key=lambda file: (file.place.name == CURRENT, file.place.name))
        lines = [(file.path, list(BytesIO(b"".join(file.chunks())))) for file in log]
        first = next((read_line(content[0].removesuffix(b"\n")) for _, content in lines if content), None)
        after = str(first["previous"]) if first else BEGINNING
        logs[folder] = after, follow(lines, after)
    return logs


def secrets_in(source: Path) -> list[str]:
    """Files that are left out unless they are asked for."""
    return [path.name for path in _wanted(source, with_keys=True) if _is_secret(path.name)]


def is_audit_log(name: str) -> bool:
    return name == CURRENT or bool(ROTATED.fullmatch(name))


def _open_all(source: Path, with_keys: bool, stack: ExitStack) -> list[OpenFile]:
    if not source.exists():
        raise ConfigError(f"{source}: no such folder or file")
    folder = source if source.is_dir() else source.parent
    wanted = _wanted(source, with_keys)
    logs = {path.parent for path in wanted if is_audit_log(path.name)}
    with ExitStack() as still:
        for log in logs:
            still.enter_context(between_entries(log))
        wanted = _wanted(source, with_keys) if logs else wanted  # a log may have begun a new file
        return [_open(path, folder, stack) for path in wanted]


def _wanted(source: Path, with_keys: bool) -> list[Path]:
    if not source.is_dir():
        return [source]
    served = (source / "jobs").is_dir() and (source / "callers").is_dir()
    patterns = (*DATA_FOLDER, "keys.json") if served else ("**/*",)
    found = sorted({path for pattern in patterns for path in source.glob(pattern)})
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    for path in shown:
        below = [path, *path.parents][: len(path.relative_to(source).parts)]
        if link := next((step for step in below if step.is_symlink()), None):
            raise DataError(f"{link}: is a symbolic link, and is not followed: put there what it leads to")
    return [path for path in shown if path.is_file() and (with_keys or not _is_secret(path.name))]


def _is_secret(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SECRETS)


def _folder(file: OpenFile) -> str:
    return file.path.rpartition("/")[0] or "."


def _open(path: Path, folder: Path, stack: ExitStack) -> OpenFile:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    file = stack.enter_context(os.fdopen(handle, "rb"))
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is no regular file")
    try:
        name = checked_path(path.relative_to(folder).as_posix())
    except ValueError as error:
        raise DataError(f"{path}: no name that can be restored: {error}") from error
    return OpenFile(name, path, file, status, is_audit_log(path.name))


def _same(now: os.stat_result, before: os.stat_result) -> bool:
    return (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
