"""Ctrl-C and SIGTERM: the first one asks a run to stop where nothing is lost, a later one stops it at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# torchrun and shells hand on what their whole process group has got already: that is no second request.
SAME_REQUEST_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """A run has stopped as it was asked to, and saved what it needs to go on.

    Args:
        signum: of the signal that asked.
    """

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signum)


class StopRequest:
    """Whether the run was asked to stop, and by which signal: 0 as long as it was not."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, the first SIGINT (Ctrl-C) or SIGTERM (what clusters send) is noted only."""
        previous: dict[int, Any] = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
