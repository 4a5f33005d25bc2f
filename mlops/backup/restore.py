"""From a backup back to a folder: everything is there and is right before anything takes its place."""

import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from ldm3d.errors import ConfigError, DataError, OutputError
from mlops.api.audit_chain import verify
from mlops.api.records import flush_folder
from mlops.backup.manifest import SavedFile, Source
from mlops.backup.vault import Vault

STAGING, LOCK = ".restoring-", ".restore.lock"


def restore(vault: Vault, name: str, source: Source, target: Path, overwrite: bool) -> None:
    """Put a source's files into a folder.

    They are brought into a hidden folder inside it first, checked, and then renamed into place one by one. Killed
    before that, it leaves the folder as it was; killed within, a folder that is refused without `overwrite`.

    Args:
        vault: where the backup is.
        name: of the backup.
        source: of its sources.
        target: an empty folder, which is made if it is missing.
        overwrite: it need not be empty; files of the same name are replaced, others stay.

    Raises:
        ConfigError: the folder is not empty.
        DataError: the backup is damaged.
        OutputError: it cannot be read, or the folder not written to.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / LOCK, timeout=0):
            for leftover in target.glob(f"{STAGING}*"):
                shutil.rmtree(leftover)
            _require_room(source, target, overwrite)
            with tempfile.TemporaryDirectory(prefix=STAGING, dir=target) as staging:
                for file in source.files:
                    _fetch(vault, name, file, Path(staging))
                _require_same_audit_logs(source, Path(staging))
                _require_inside([target / file.path for file in source.files], target)
                for file in source.files:
                    _move(Path(staging) / file.path, target / file.path)
                for folder in {(target / file.path).parent for file in source.files}:
                    flush_folder(folder)
        (target / LOCK).unlink(missing_ok=True)
    except Timeout as error:
        raise OutputError(f"{target}: another restore is at work there; wait for its end") from error
    except OSError as error:
        raise OutputError(f"{error.filename or target}: cannot be written: {error.strerror or error}") from error


def choose(sources: tuple[Source, ...], wanted: str | None) -> Source:
    """The source of that name, or the only one.

    Raises:
        ConfigError: there is none, or there are several to choose from.
    """
    names = ", ".join(source.name for source in sources)
    if wanted is None and len(sources) == 1:
        return sources[0]
    if wanted is None:
        raise ConfigError(f"the backup holds {names}: say which with --source")
    for source in sources:
        if source.name == wanted:
            return source
    raise ConfigError(f"--source {wanted}: the backup holds {names}")


def _require_room(source: Source, target: Path, overwrite: bool) -> None:
    if not overwrite and any(path.name != LOCK for path in target.iterdir()):
        raise ConfigError(
            f"{target}: is not empty; take another folder, or --overwrite to replace files of the same name"
        )
    free = shutil.disk_usage(target).free
    if source.size > free:
        raise OutputError(f"{target}: {source.size / 2**20:.0f} MiB are needed, {free / 2**20:.0f} are free")


def _fetch(vault: Vault, name: str, file: SavedFile, staging: Path) -> None:
    path = staging / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if file.private else 0o644)
    with open(handle, "wb") as out:
        vault.get(name, file.sha256, file.size, out)
        out.flush()
        os.fsync(out.fileno())


def _require_same_audit_logs(source: Source, staging: Path) -> None:
    """A log that was damaged when it was saved comes back damaged: it is evidence."""
    for end in source.audit_logs:
        found = verify(staging / end.folder, end.after)
        if (found.entries, found.last.hash, len(found.problems)) != (end.entries, end.last_hash, end.problems):
            raise DataError(f"the audit log {end.folder} is not the one that was saved: its chain ends elsewhere")


def _require_inside(paths: list[Path], target: Path) -> None:
    """No symbolic link that stands in the folder leads out of it."""
    for path in paths:
        if not path.parent.resolve().is_relative_to(target.resolve()) or path.is_dir():
            raise OutputError(f"{path}: what stands there is in the way of the backup's file")


def _move(path: Path, target: Path) -> None:
    private = path.stat().st_mode & 0o077 == 0
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    path.replace(target)
