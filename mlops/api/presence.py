"""Which workers live, and what they hold: each has a lock for its life, and a file that says what it does."""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from ldm3d.errors import OutputError
from ldm3d.files import write_text

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""A worker that has said nothing for so long hangs, or its machine is gone."""

State = Literal["starting", "idle", "busy", "asleep"]


class Status(BaseModel):
    """What a worker says of itself."""

    name: str
    state: State
    loaded: list[str]
    """Digests of the weights in its memory."""
    device: str
    said: float
    """Unix time in seconds."""


class Presence:
    """A worker's own sign of life.

    The system gives the lock back when the process ends, however it ends.

    Args:
        folder: of all workers.
        device: that it computes on.
        hangs_after: seconds without `stir` after which the process is ended, so that another one takes its jobs.
    """

    def __init__(self, folder: Path, device: str, hangs_after: float):
        self.folder, self.device = folder, device
        self.name = f"{socket.gethostname()[:40]}-{os.getpid()}-{os.urandom(3).hex()}"
        self.state: State = "starting"
        self.loaded: list[str] = []
        self._hangs_after, self._stirred = hangs_after, time.monotonic()
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / f"{self.name}.lock", thread_local=False)
        self._lock.acquire()
        threading.Thread(target=self._beat, daemon=True).start()

    def stir(self) -> None:
        """Tell that the worker does not hang."""
        self._stirred = time.monotonic()

    def say(self, state: State, loaded: list[str]) -> None:
        """Tell what the worker does now."""
        if (state, loaded) != (self.state, self.loaded):
            self.state, self.loaded = state, list(loaded)
            self._write()

    def end(self) -> None:
        self._ended.set()
        (self.folder / f"{self.name}.json").unlink(missing_ok=True)
        self._lock.release()
        (self.folder / f"{self.name}.lock").unlink(missing_ok=True)

    def _beat(self) -> None:
        while True:
            self._write()
            if time.monotonic() - self._stirred > self._hangs_after:
                text = f"warning: this worker has hung for {self._hangs_after:g} s, and ends"
                print(text, file=sys.stderr, flush=True)
                os._exit(1)
            if self._ended.wait(BEAT_SECONDS):
                return

    def _write(self) -> None:
        if self._ended.is_set():
            return
        status = Status(name=self.name, state=self.state, loaded=self.loaded, device=self.device, said=time.time())
        try:
            write_text(self.folder / f"{self.name}.json", status.model_dump_json())
        except OutputError:
            return  # a full disk ends no worker


def is_alive(folder: Path, name: str) -> bool:
    """Whether the worker of this name lives, on whichever machine."""
    path = folder / f"{name}.lock"
    if not path.exists():
        return False
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    for suffix in (".lock", ".json"):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)
    return False


def workers(folder: Path) -> list[Status]:
    """What the workers that live say of themselves."""
    found = []
    for path in folder.glob("[!.]*.json"):
        try:
            status = Status.model_validate(json.loads(path.read_bytes()))
        except (OSError, ValueError, ValidationError):
            continue
        if time.time() - status.said < SILENT_SECONDS:
            found.append(status)
    return found
