"""Files that are either whole or not there: atomic writes, and digests of what was written."""

import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm3d.errors import OutputError


@contextmanager
def atomic_path(target: str | Path, mode: int | None = None) -> Iterator[Path]:
    """Give a temporary path beside `target`; on success flush it to disk and rename it to `target`.

    The temporary name ends with the target's own name, so that writers which look at the suffix
    (`.nii.gz`, `.png`) see the right one. If the block raises, the temporary file is removed and an
    existing `target` stays as it was. `mode` is the file's, 0o600 for secrets; None leaves it to the umask.

    Raises:
        OutputError: the folder cannot be written to, or the disk is full.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
        # The system applies the umask. To ask for it is to change it, which other threads would feel.
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
        wanted = stat.S_IMODE(os.fstat(handle).st_mode) if mode is None else mode
        os.close(handle)
        yield temporary
        _flush(temporary)
        # A writer may have put a file of its own in this place: that of safetensors is closed to others.
        if stat.S_IMODE(temporary.stat().st_mode) != wanted:
            temporary.chmod(wanted)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                temporary.unlink()


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_text(target: str | Path, text: str, mode: int | None = None) -> None:
    """Write UTF-8 text atomically. `mode` and `OutputError` are as in `atomic_path`."""
    with atomic_path(target, mode) as path:
        path.write_text(text, encoding="utf-8")


def require_writable(folder: str | Path) -> None:
    """Try a file in `folder`, or where it would be made, so that a run fails before its work, not after it.

    Nothing is left behind: a run that is refused for another reason makes no folders.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to: {error.strerror or error}") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
