"""What a run says while it runs: log lines on stderr, as text or as JSON, and progress with time left."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

from ldm3d import distributed
from ldm3d.json_lines import JsonLines

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


def log(message: str, **fields: Any) -> None:
    """Print one line on rank 0, above a progress bar if one is shown.

    Args:
        message: what a person reads; `warning: ` or `notice: ` at its beginning gives its level.
        fields: the same for programs: what stands in the line's JSON object beside the message, under `--log-json`.
    """
    if not distributed.is_main():
        return
    if isinstance(sys.stderr, JsonLines):
        sys.stderr.say(message, **fields)
    else:
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


def shows_bars() -> bool:
    """Whether this process speaks for all, and to a person who watches."""
    return distributed.is_main() and sys.stderr.isatty()


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Go through `items` and show how far it is: a bar in a terminal, now and then a line elsewhere."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not distributed.is_main():
        yield from items
    elif shows_bars():
        yield from tqdm(items, desc=description, total=total, unit=unit, dynamic_ncols=True, leave=False)
    else:
        yield from _progress_lines(items, description, total)


def _progress_lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done:
            last = now
            seconds_left = (now - start) / done * (total - done) if total else None
            left = f", {seconds_left:.0f} s left" if seconds_left is not None else ""
            fields = {"event": "progress", "done": done, "total": total, "seconds_left": seconds_left}
            log(f"{description}: {done}/{total or '?'}{left}", **fields)
        yield item
