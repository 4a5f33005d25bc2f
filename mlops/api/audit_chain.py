"""The audit log's lines, and whether they are as they were written.

A line is a JSON object that ends with its `hash`: SHA-256 of the line up to there. `previous` is the hash of the line
before, so that each hash depends on everything above it. The hashes use no key: who may write the files may compute all
of them anew, and cut lines off the end. Only a hash that was kept elsewhere shows that (`verify --last`).
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ldm3d.errors import DataError

CURRENT, LOCK = "audit.jsonl", ".audit.lock"
ROTATED = re.compile(r"audit-(\d{12})\.jsonl")
BEGINNING = "0" * 64
TAIL = re.compile(rb',"hash":"([0-9a-f]{64})"\}')
TAIL_BYTES = len(b',"hash":""}') + 64
# Far above what a line can have; the last line is looked for in so much of the file's end.
LONGEST_LINE_BYTES = 1 << 16


class Link(NamedTuple):
    """Where the chain stands: number and hash of its last entry."""

    seq: int
    hash: str


START = Link(0, BEGINNING)


def make_line(after: Link, content: dict[str, Any]) -> tuple[bytes, Link]:
    """The line that follows, with its newline, and the link that it makes.

    Only ASCII without control characters is written, whatever the content: everything else is escaped.
    """
    entry = {"seq": after.seq + 1, **content, "previous": after.hash}
    body = json.dumps(entry, separators=(",", ":")).encode("ascii")[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + b',"hash":"' + digest.encode() + b'"}\n', Link(after.seq + 1, digest)


def read_line(line: bytes) -> dict[str, Any] | None:
    """The entry of a line without its newline; None if it is not as it was written."""
    body, tail = line[:-TAIL_BYTES], TAIL.fullmatch(line[-TAIL_BYTES:])
    if not tail or hashlib.sha256(body).hexdigest().encode() != tail[1]:
        return None
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["seq"], int) and isinstance(entry["previous"], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def rotated_files(folder: Path) -> list[Path]:
    """Files that are full, oldest first."""
    return sorted(path for path in folder.glob("audit-*.jsonl") if ROTATED.fullmatch(path.name))


class End(NamedTuple):
    """The end of a file: the last whole line without newline, and what stands behind it of one that was cut short."""

    line: bytes
    torn: bytes


def read_end(file: BinaryIO) -> End:
    """Look at a file's last lines."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 2 * LONGEST_LINE_BYTES))
    whole, newline, torn = file.read().rpartition(b"\n")
    return End(whole.rpartition(b"\n")[2], torn) if newline else End(b"", whole + torn)


def damage(torn: bytes) -> dict[str, Any]:
    """What the record that closes a torn line says of it."""
    return {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}


@dataclass
class Findings:
    """What `verify` found.

    Args:
        entries: number of good lines.
        files: number of files.
        last: where the chain ends.
        problems: what is missing, changed, inserted or moved, one line of text each.
        notices: lines that a kill or a power cut left unfinished; no reason for suspicion.
    """

    entries: int = 0
    files: int = 0
    last: Link = START
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    hashes: set[str] = field(default_factory=set)


def read_files(folder: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Names of the log's files and their lines with newlines, oldest first, as they stand between two entries.

    Raises:
        DataError: there is no log, or it cannot be read.
    """
    try:
        with between_entries(folder):
            full, current = rotated_files(folder), folder / CURRENT
            newest = current.read_bytes() if current.exists() else None
        if not full and newest is None:
            raise DataError(f"{folder}: no audit log")
        for path in full:
            yield path.name, list(BytesIO(path.read_bytes()))
        if newest is not None:
            yield CURRENT, list(BytesIO(newest))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


@contextmanager
def between_entries(folder: Path) -> Iterator[None]:
    """While nobody writes; a copy of a log, without its lock, is read as it is."""
    lock = folder / LOCK
    with lock.open("rb") if lock.exists() else nullcontext() as file:
        if file:
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def verify(folder: Path, after: str = BEGINNING) -> Findings:
    """Go through all files from the first line to the last.

    Args:
        folder: of the log.
        after: hash of the entry before the first one here, where old files have been removed on purpose.

    Raises:
        DataError: there is no log, or it cannot be read.
    """
    return follow(read_files(folder), after)


def follow(files: Iterable[tuple[str, list[bytes]]], after: str = BEGINNING) -> Findings:
    """The same for files that were read already: names and lines with newlines, oldest first."""
    walk = _Walk(after)
    for name, lines in files:
        for number, (line, following) in enumerate(pairwise([*lines, b""]), 1):
            walk.step(f"{name} line {number}", line, following)
        walk.found.files += 1
    return walk.found


class _Walk:
    """Follows the chain, and finds it again behind a break."""

    def __init__(self, after: str):
        self.found = Findings()
        self._hash = after
        self._seq = 0 if after == BEGINNING else None  # None: whatever the first line says
        self._unreadable = 0  # lines since the last good one, which stand for as many entries, or were inserted

    def step(self, place: str, line: bytes, following: bytes) -> None:
        entry = read_line(line.removesuffix(b"\n"))
        if entry is None:
            self._broken(place, line, following)
            return
        seq, problems = entry["seq"], self.found.problems
        before = seq - 1 if self._seq is None else self._seq
        follows = seq == before + 1 and entry["previous"] == self._hash
        expected = before + 1 if follows else before + 1 + self._unreadable
        if seq < expected:
            problems.append(f"{place}: entry {seq} does not belong here: inserted or moved")
            return
        if seq > expected:
            which = f"entry {expected} is" if seq == expected + 1 else f"entries {expected} to {seq - 1} are"
            problems.append(f"{place}: {which} missing before it")
        elif not follows and not self._unreadable:
            problems.append(f"{place}: entry {seq} does not follow from the one before: one of them was replaced")
        self._seq, self._hash, self._unreadable = seq, entry["hash"], 0
        self.found.entries += 1
        self.found.last = Link(seq, entry["hash"])
        self.found.hashes.add(entry["hash"])

    def _broken(self, place: str, line: bytes, following: bytes) -> None:
        torn = line.removesuffix(b"\n")
        closing = read_line(following.removesuffix(b"\n"))
        if not line.endswith(b"\n") or (closing and closing.get("damaged") == damage(torn)):
            self.found.notices.append(f"{place}: {len(torn)} bytes of an entry whose writing was interrupted")
            return
        self.found.problems.append(f"{place}: changed or inserted")
        self._unreadable += 1
