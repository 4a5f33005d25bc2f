"""One training at a time may write to a folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ldm3d import distributed
from ldm3d.errors import OutputError
from ldm3d.files import write_text

# Processes that load data outlive a killed training by some seconds, and with them its lock.
PATIENCE_SECONDS = 10.0


@contextmanager
def only_writer(
    folder: Path, work: str = "writing here", advice: str = "wait for its end, or take another model_dir"
) -> Iterator[None]:
    """Within, no other training writes to `folder`; the whole run, of however many processes, counts as one.

    The system gives the lock back when its owner ends, however it ends: a stale one does not exist. Files that the
    owner before has left half written are removed.

    Args:
        folder: made if it is not there.
        work: what is done in it, for whoever is refused.
        advice: what they can do.

    Raises:
        OutputError: another training is at work there; on every rank.
    """
    lock = FileLock(folder / ".lock")
    owner = folder / ".owner.json"
    refusal = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=PATIENCE_SECONDS)
            for pattern in (".tmp-*.pt", ".tmp-*.safetensors"):
                for leftover in folder.glob(pattern):
                    leftover.unlink()
            me = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            }
            write_text(owner, json.dumps(me))
        except Timeout:
            refusal = f"{folder}: another training{_described(owner)} is {work}; {advice}"
        except OSError as error:
            refusal = f"{folder}: cannot be locked: {error.strerror or error}"
        except OutputError as error:
            refusal = str(error)
    refusal = distributed.broadcast_object(refusal)
    if refusal:
        lock.release()
        raise OutputError(refusal)
    try:
        yield
    finally:
        if distributed.is_main():
            with suppress(OSError):
                owner.unlink()
            lock.release()


def _described(owner: Path) -> str:
    try:
        return " (process {pid} on {host}, since {since})".format(**json.loads(owner.read_text()))
    except (OSError, ValueError, KeyError):
        return ""
