"""Unpack an archive from elsewhere: only into its own folder, and all of it or nothing."""

import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ldm3d.console import progress
from ldm3d.errors import DataError, OutputError
from ldm3d.transfer import require_space

DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


def unpack(archive: Path, folder: Path, name: str, check: Callable[[Path], None]) -> None:
    """Unpack the folder `name` of a tar archive to `folder/name`.

    It is unpacked beside its place and moved there when whole, so that an interrupted call leaves nothing behind.
    Attributes of the files (owner, mode, time) are not taken over.

    Args:
        archive: tar, plain or compressed.
        folder: existing folder.
        name: the one folder that the archive holds.
        check: called with the unpacked folder before it is moved; may refuse it by raising.

    Raises:
        DataError: the archive is damaged, or holds a link, a device or a path that leads out of `name`.
        OutputError: it cannot be written, or there is too little room.
    """
    beginning = f".tmp-{name}-"
    for left_by_killed_call in folder.glob(f"{beginning}*"):
        shutil.rmtree(left_by_killed_call, ignore_errors=True)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=beginning, dir=folder))
        _extract_all(archive, temporary, name)
        check(temporary / name)
        (temporary / name).rename(folder / name)
    except DAMAGED as error:
        raise DataError(f"{archive}: is damaged or not a tar archive: {error}") from error
    except OSError as error:
        raise OutputError(f"{folder}: {archive.name} cannot be unpacked: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _extract_all(archive: Path, target: Path, name: str) -> None:
    with tarfile.open(archive) as tar:
        # macOS puts a `._` file of attributes beside every file; the Decathlon's archives were made there.
        members = [member for member in tar.getmembers() if not PurePosixPath(member.name).name.startswith("._")]
        for member in members:
            _require_safe(member, archive, name)
        require_space(target, sum(member.size for member in members))
        for member in progress(members, "unpacking", unit="file"):
            _extract(tar, member, target)


def _require_safe(member: tarfile.TarInfo, archive: Path, name: str) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        problem = "leads out of its folder"
    elif not member.isfile() and not member.isdir():
        problem = "is a link or a device"
    elif path.parts and path.parts[0] != name:
        problem = f"is not in the folder {name}"
    else:
        return
    raise DataError(f"{archive}: is not safe to unpack: {member.name!r} {problem}; nothing was unpacked")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    path = target / member.name
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None, "a regular file has content"
    with source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, 2**20)
        file.flush()
        os.fsync(file.fileno())
