"""What a run says while it runs: log lines on stderr, and progress with time left."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

from ldm3d import distributed

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


def log(message: str) -> None:
    """Print one line on rank 0, above a progress bar if one is shown."""
    if distributed.is_main():
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Go through `items` and show how far it is: a bar in a terminal, now and then a line elsewhere."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not distributed.is_main():
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=description, total=total, unit=unit, dynamic_ncols=True, leave=False)
    else:
        yield from _progress_lines(items, description, total)


def _progress_lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done:
            last = now
            left = f", {(now - start) / done * (total - done):.0f} s left" if total else ""
            log(f"{description}: {done}/{total or '?'}{left}")
        yield item
