"""What a backup says of itself. It is written last: a backup without manifest is none.

Nothing in it is trusted. Names are checked before they become paths, and content is taken by its digest only.
"""

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ldm3d.definitions import Strict
from ldm3d.errors import DataError

MANIFEST = "manifest.json"
LARGEST_BYTES = 64 * 2**20
"""Far above what a manifest has: one that is larger is not read into memory."""
NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{4}")
"""A backup's: when it was begun (UTC), and four digits: no two processes choose the same. Sorted by age."""
PART = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")
"""Of a path."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def checked_path(path: str) -> str:
    """A path that leads from a folder to something below it, whoever wrote it.

    Raises:
        ValueError: it is absolute, or could lead elsewhere.
    """
    parts = path.split("/")
    if len(path) > 1024 or any(part.startswith(".") or not PART.fullmatch(part) for part in parts):
        raise ValueError(f"{path!r} is no path below a folder")
    return path


class SavedFile(Strict):
    """One file."""

    path: str
    """Below its source's folder."""
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256
    private: bool
    """Nobody but its owner may read it."""

    _path = field_validator("path")(checked_path)


class AuditEnd(Strict):
    """What an audit log was found to be when it was saved: a hash of its last entry that is kept elsewhere."""

    folder: str
    """Below its source's folder; `.` for that folder."""
    after: Sha256
    """Hash of the entry before its first one: zeros, unless its oldest files were removed."""
    entries: Annotated[int, Field(ge=0)]
    last_hash: Sha256
    problems: Annotated[int, Field(ge=0)]
    """Places where the chain is broken."""

    @field_validator("folder")
    @classmethod
    def _below(cls, folder: str) -> str:
        return folder if folder == "." else checked_path(folder)


class Source(Strict):
    """A folder or a file that was saved."""

    name: str
    origin: str
    """Where it was, for people."""
    files: tuple[SavedFile, ...]
    audit_logs: tuple[AuditEnd, ...]

    @field_validator("name")
    @classmethod
    def _one_part(cls, name: str) -> str:
        if "/" in checked_path(name):
            raise ValueError(f"{name!r} is no name")
        return name

    @model_validator(mode="after")
    def _one_tree(self) -> Self:
        paths = {file.path for file in self.files}
        folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
        if len(paths) < len(self.files) or paths & folders:
            raise ValueError(f"{self.name}: a path stands for two things")
        return self

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class Content(Strict):
    """What a backup holds."""

    format: Literal[1] = 1
    made: str
    """When it was begun."""
    version: str
    """Of the code."""
    sources: tuple[Source, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("two sources have the same name")
        return self

    @property
    def size(self) -> int:
        """Bytes of all files, each counted as often as it is there."""
        return sum(source.size for source in self.sources)

    @property
    def objects(self) -> dict[str, int]:
        """Bytes by digest of what must be in the place; files with the same content share one."""
        return {file.sha256: file.size for source in self.sources for file in source.files}


class Manifest(Strict):
    """The file: the content and its digest, which shows damage; it is no signature."""

    sha256: Sha256
    content: Content


def write_manifest(content: Content) -> bytes:
    digest = hashlib.sha256(content.model_dump_json().encode()).hexdigest()
    return Manifest(sha256=digest, content=content).model_dump_json(indent=1).encode() + b"\n"


def read_manifest(text: bytes, name: str) -> Content:
    """The content of a manifest.

    Args:
        text: the file.
        name: for people.

    Raises:
        DataError: it is damaged, or was made to harm.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{name}: no manifest of a backup, or a damaged one: {error.errors()[0]['msg']}") from error
    if hashlib.sha256(manifest.content.model_dump_json().encode()).hexdigest() != manifest.sha256:
        raise DataError(f"{name}: is not as it was written")
    return manifest.content
