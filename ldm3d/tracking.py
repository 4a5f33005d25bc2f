"""TensorBoard, written from rank 0 only."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from ldm3d import distributed
from ldm3d.errors import OutputError

EVENT_VERSION = "brain.Event:2"


class Tracker:
    """Scalars and pictures of one run, in a file that is made when there is something to write.

    Every event is in the file when the call returns: what a killed run has said is not lost, and a full disk is an
    error of the call. (torch's `SummaryWriter` writes from a thread, which keeps events for minutes and dies with a
    traceback.)

    Args:
        folder: of the event files.

    Attributes:
        first_step: of a resumed run, to be set before it writes; what was written after it before is hidden.
    """

    def __init__(self, folder: Path):
        self.folder, self.first_step = folder, 0
        self._file: BinaryIO | None = None

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._add(summary.scalar(f"{group}/{name}", value), step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """`picture` is (1, H, W) in [0, 1]."""
        self._add(summary.image(name, picture, dataformats="CHW"), step)

    def text(self, name: str, text: str) -> None:
        self._add(summary.text(name, text))

    def _add(self, content: Any, step: int = 0) -> None:
        if not distributed.is_main():
            return
        try:
            if self._file is None:
                self._file = self._opened()
            self._write(Event(summary=content, step=step))
        except OSError as error:
            raise OutputError(f"{self.folder}: events cannot be written: {error.strerror or error}") from error

    def _opened(self) -> BinaryIO:
        """A new file, with a name that TensorBoard sorts by time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(self.folder / name, "ab")  # noqa: SIM115 (closed with the run)
        self._write(Event(file_version=EVENT_VERSION))
        if self.first_step:
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=self.first_step))
        return self._file

    def _write(self, event: Event) -> None:
        assert self._file is not None
        event.wall_time = time.time()
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file:
            with suppress(OSError):  # already reported, by the call that could not write
                self._file.close()
