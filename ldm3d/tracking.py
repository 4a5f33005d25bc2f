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
        purge = first_step if first_step else None
        self.writer = SummaryWriter(str(folder), purge_step=purge) if distributed.is_main() else None

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
        if self.writer:
            self.writer.close()
