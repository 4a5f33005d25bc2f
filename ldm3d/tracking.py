"""TensorBoard, written from rank 0 only."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ldm3d import distributed


class Tracker:
    """Scalars and pictures of one run.

    Args:
        folder: of the event files.
        first_step: of a resumed run; what an interrupted run wrote after it is hidden.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        self.folder, self.first_step = folder, first_step
        self._writer: SummaryWriter | None = None

    @property
    def writer(self) -> SummaryWriter | None:
        """Of rank 0; made when there is something to write, so that a run which is refused leaves no file."""
        if self._writer is None and distributed.is_main():
            self._writer = SummaryWriter(str(self.folder), purge_step=self.first_step or None)
        return self._writer

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if self.writer:
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """`picture` is (1, H, W) in [0, 1]."""
        if self.writer:
            self.writer.add_image(name, picture, step)

    def text(self, name: str, text: str) -> None:
        if self.writer:
            self.writer.add_text(name, text)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._writer:
            self._writer.close()
