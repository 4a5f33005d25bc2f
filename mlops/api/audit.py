"""The audit log: who did what, when, and what came of it; JSON lines, chained by hash (`audit_chain`).

    python -m mlops.api.audit verify [--folder DIR] [--last HASH] [--after HASH]
    python -m mlops.api.audit show [--folder DIR] [--caller ID] [--since TIME]

Lines are only ever appended. They are handed to the operating system at once, so that no kill loses one, but not forced
onto the disk, which would cost milliseconds each: a power cut may lose the last half minute or so.
"""

import argparse
import fcntl
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm3d.errors import ConfigError, DataError, OutputError
from mlops.api.audit_chain import (
    BEGINNING,
    CURRENT,
    LOCK,
    LONGEST_LINE_BYTES,
    START,
    Link,
    damage,
    make_line,
    read_end,
    read_files,
    read_line,
    rotated_files,
    verify,
)
from mlops.api.callers import Caller
from mlops.api.settings import load_settings
from mlops.commands import Parser, run_command

PRIVATE = 0o600
LONGEST_TEXT = 256
# Keys and tokens, wherever a client may have put one by mistake. The id of a key is no secret.
SECRETS = re.compile(r"(ldm3d_[a-z0-9]{8}_)[A-Za-z0-9]{1,43}|()eyJ[\w-]+\.[\w.-]+")


class AuditLog:
    """Appends to the log in a folder. Threads and processes may do so at once.

    Args:
        folder: made if it is missing.
        max_mib: size of a file. One that would become larger is renamed to `audit-<its first entry>.jsonl`, and a new
            one goes on.
    """

    def __init__(self, folder: Path, max_mib: float):
        self._folder, self._path = folder, folder / CURRENT
        self._max_bytes = int(max_mib * 2**20)
        self._mutex = threading.Lock()
        self._pid = self._lock = self._file = -1
        # Inode and size of the file after our last write, and the chain's end there.
        self._state: tuple[int, int] | None = None
        self._link = START
        with self._mutex, self._alone():
            self._catch_up()

    def record(
        self,
        what: str,
        outcome: int | str,
        caller: Caller | None = None,
        job: str | None = None,
        address: str | None = None,
        request_id: str | None = None,
    ) -> None:
        """Append one entry; takes tens of microseconds, in which other processes wait.

        Args:
            what: method and template of the route, `DELETE /v1/jobs/{id}`, or what a worker did.
            outcome: status of the answer, or a word.
            caller: None where nobody has proved who they are.
            job: id of the job.
            address: of the client.
            request_id: as in the answer's header.

        Raises:
            OutputError: the entry cannot be written; what it tells of must not be done then.
            DataError: the log's last line is not as it was written.
        """
        content = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "caller": _text(caller.id if caller else None),
            "role": str(caller.role) if caller else None,
            "what": _text(what),
            "job": _text(job),
            "outcome": _text(outcome) if isinstance(outcome, str) else outcome,
            "address": _text(address),
            "request": _text(request_id),
        }
        with self._mutex, self._alone():
            self._catch_up()
            self._append(content)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process writes. The lock's file stays open: filelock opens it each time, for 60 us."""
        try:
            if self._pid != os.getpid():  # a fork would share the lock with its parent
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
                self._pid, self._state = os.getpid(), None
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def _catch_up(self) -> None:
        """Find the chain's end, if others wrote since; close a line that a kill cut short."""
        with suppress(FileNotFoundError):
            status = self._path.stat()
            if self._state == (status.st_ino, status.st_size):
                return
        self._open()
        torn = b""
        for path in [self._path, *reversed(rotated_files(self._folder))]:
            with path.open("rb") as file:
                line, behind = read_end(file)
            torn = torn or behind
            if line or read_line(torn):
                break
        # Where entries that we know of are gone, the chain goes on behind them, and `verify` finds the gap.
        self._link = max(self._link, self._link_of(path, line), key=lambda link: link.seq)
        if entry := read_line(torn):  # whole but for its newline
            self._write(b"\n", Link(entry["seq"], entry["hash"]))
        elif torn:
            self._append({"what": "interrupted entry", "damaged": damage(torn)}, before=b"\n")

    def _link_of(self, path: Path, line: bytes) -> Link:
        if not line:
            return START
        entry = read_line(line)
        if entry is None:
            raise DataError(
                f"{path}: the last line is not as it was written, and nothing can follow it: keep the folder "
                "elsewhere, look at it with python -m mlops.api.audit verify, and start with an empty one"
            )
        return Link(entry["seq"], entry["hash"])

    def _open(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
        status = os.fstat(self._file)
        self._state = (status.st_ino, status.st_size)

    def _append(self, content: dict[str, Any], before: bytes = b"") -> None:
        line, link = make_line(self._link, content)
        assert self._state is not None and len(line) < LONGEST_LINE_BYTES
        if not before and self._state[1] > 0 and self._state[1] + len(line) > self._max_bytes:
            self._put_aside()
        self._write(before + line, link)

    def _write(self, content: bytes, link: Link) -> None:
        assert self._state is not None
        inode, size = self._state
        self._state = None  # until all is written
        if (written := os.write(self._file, content)) < len(content):
            os.ftruncate(self._file, size)  # the disk is full: leave no half line
            raise OSError(0, f"only {written} of {len(content)} bytes could be written")
        self._state, self._link = (inode, size + len(content)), link

    def _put_aside(self) -> None:
        """Give the full file its final name. It is on the disk before anything follows from it."""
        with self._path.open("rb") as file:
            first = read_line(file.readline().removesuffix(b"\n"))
        if first is None:
            raise DataError(f"{self._path}: the first line is not as it was written")
        target = self._folder / f"audit-{first['seq']:012d}.jsonl"
        if target.exists():
            raise DataError(f"{target}: stands in the way of {self._path}, which is full")
        os.fsync(self._file)
        self._path.rename(target)
        self._open()


def _text(value: str | None) -> str | None:
    """Without secrets, and of bounded length."""
    # Cut before, too: the pattern takes quadratic time.
    return None if value is None else SECRETS.sub(r"\1...", value[: 4 * LONGEST_TEXT])[:LONGEST_TEXT]


def _verify(folder: Path, last: str | None, after: str) -> int:
    found = verify(folder, after)
    for line in [*found.problems, *(f"notice: {notice}" for notice in found.notices)]:
        print(line)
    cut = last is not None and last not in {after, *found.hashes}
    if cut:
        print(f"no entry has the hash {last}: the end was cut off, or everything was written anew")
    print(f"{found.entries} entries in {found.files} files, the last is {found.last.seq}, its hash {found.last.hash}")
    if last is None:
        print("keep that hash elsewhere: only verify --last HASH can tell whether entries at the end are missing")
    return 1 if cut or found.problems else 0


def _show(folder: Path, caller: str | None, since: datetime | None) -> int:
    for _, lines in read_files(folder):
        for entry in filter(None, (read_line(line.removesuffix(b"\n")) for line in lines)):
            new = since is None or ("time" in entry and datetime.fromisoformat(entry["time"]) >= since)
            if new and caller in (None, entry.get("caller")):
                print(json.dumps(entry))
    return 0


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-01-31 or 2026-01-31T12:00:00Z") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def main() -> int:
    parser = Parser(prog="python -m mlops.api.audit", description="the audit log of the service in LDM3D_DATA_DIR")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="is every entry there, as it was written? exits 1 if not")
    check.add_argument("--last", metavar="HASH", help="of an entry, kept elsewhere, that must be there")
    check.add_argument(
        "--after", metavar="HASH", default=BEGINNING, help="of the last entry in files that were removed on purpose"
    )
    show = commands.add_parser("show", help="print entries")
    show.add_argument("--caller", metavar="ID", help="of this caller only")
    show.add_argument("--since", type=_time, metavar="TIME", help="ISO 8601, UTC unless it says otherwise")
    for command in (check, show):
        command.add_argument("--folder", type=Path, metavar="DIR", help="audit/ of the data folder by default")
    args = parser.parse_args()
    folder = args.folder or load_settings().audit_folder
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if args.command == "show":
        return _show(folder, args.caller, args.since)
    return _verify(folder, args.last, args.after)


if __name__ == "__main__":
    run_command(main)
