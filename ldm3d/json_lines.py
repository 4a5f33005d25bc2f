"""stderr as JSON: one object on each line, whoever writes it, for programs that collect logs."""

import io
import json
import logging
import math
import sys
import traceback
import warnings
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

LEVELS = {"error": "error", "warning": "warning", "notice": "warning"}
"""What the first word of a line, before its colon, says of the line."""
ENDS = ("interrupted", "terminated")
"""First words of the line with which a stopped run ends."""


class JsonLines(io.TextIOBase):
    """Stands for stderr. What Python code prints there becomes objects with `time`, `level`, `event` and `message`.

    What is no text of Python's, as the complaints of a C library or of `torchrun` itself, does not come this way.

    Args:
        stream: the stderr that it stands for.
    """

    def __init__(self, stream: TextIO):
        self.stream, self._begun = stream, ""

    def say(self, message: str, **fields: Any) -> None:
        """Write one object; what is not said of `level` and `event` follows from the message's first word."""
        word, _, rest = message.partition(": ")
        level = LEVELS.get(word, "info")
        event = "error" if level == "error" else next((end for end in ENDS if message.startswith(end)), "log")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "level": level, "event": event, "message": rest if word in LEVELS else message} | fields
        # In one piece, so that the lines of several processes do not mix.
        self.stream.write(json.dumps(_finite(entry), default=str, ensure_ascii=False) + "\n")
        self.stream.flush()

    def write(self, text: str) -> int:
        self._begun += text
        if self._begun.endswith("\n"):
            whole, self._begun = self._begun.strip(), ""
            if whole:
                self.say(whole)
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def use_json_lines() -> None:
    """From now on stderr carries JSON lines: those of `log`, errors with their traceback, warnings, other loggers'."""
    plain, lines = sys.stderr, JsonLines(sys.stderr)
    sys.stderr = lines
    sys.excepthook = _say_exception
    warnings.showwarning = _say_warning
    logging.lastResort = _Records(logging.WARNING)
    for logger in map(logging.getLogger, (None, *logging.root.manager.loggerDict)):
        told = [h for h in logger.handlers if isinstance(h, logging.StreamHandler) and h.stream is plain]
        logger.handlers = [_Records(h.level) if h in told else h for h in logger.handlers]


class _Records(logging.Handler):
    """What libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        _stderr().say(record.getMessage(), level=record.levelname.lower(), logger=record.name)


def _say_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    lines = traceback.format_exception(kind, error, trace)
    _stderr().say(f"error: {lines[-1].strip()}", traceback="".join(lines))


def _say_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    _stderr().say(str(message), level="warning", category=category.__name__, place=f"{filename}:{lineno}")


def _stderr() -> JsonLines:
    return sys.stderr if isinstance(sys.stderr, JsonLines) else JsonLines(sys.stderr)


def _finite(value: Any) -> Any:
    """JSON has no words for infinity and NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
