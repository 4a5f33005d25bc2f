"""One of two processes that test_distributed.py starts: encodes, until rank 1 is killed in the middle."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from ldm3d import distributed, encoding, latents

NUM_VOLUMES = 6


class Volumes(tiny.Volumes):
    """Says which volume is read to be encoded."""

    def __init__(self, on_read: Callable[[int], Any]):
        super().__init__(tiny.images(NUM_VOLUMES))
        self.on_read = on_read

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.on_read(index)
        return super().__getitem__(index)


def build(root: Path, on_read: Callable[[int], Any] = lambda index: None) -> latents.LatentCache:
    """The cache of all volumes."""
    contents = [f"content {i}" for i in range(NUM_VOLUMES)]
    return latents.build_latent_cache(root, tiny.autoencoder(), "weights", Volumes(on_read), contents, True, tiny.CPU)


def die(index: int) -> None:
    if index == NUM_VOLUMES - 1:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    encoding.SECONDS_BETWEEN_MARKS = 0
    with distributed.process_group("gloo", 60):
        build(Path(sys.argv[1]), die)
