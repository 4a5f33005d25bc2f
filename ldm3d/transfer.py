"""Fetch a large file over a network that breaks: resumed, never glued from two versions, never filling the disk."""

import http.client
import json
import math
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm3d.console import log, progress
from ldm3d.errors import ConfigError, DataError, OutputError

SCHEMES = ("http", "https", "file")
# Seconds before each further try; the count starts again whenever a try brought the file further.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
TIMEOUT_SECONDS = 60.0
CHUNK = 2**20
GIB = 2**30
BUSY = (408, 425, 429, 500, 502, 503, 504)
_sleep = time.sleep


class TransferError(DataError):
    """A file that could not be fetched."""


class _Broken(Exception):
    """One try failed. `again`: another may succeed. `reached`: the server was there."""

    def __init__(self, reason: str, again: bool = True, reached: bool = True):
        super().__init__(reason)
        self.again, self.reached = again, reached


def download(url: str, part: Path, space_factor: float = 0.0, waits: Sequence[float] = WAITS) -> None:
    """Fetch `url` into `part`, going on where an earlier call stopped if the server's file is still the same.

    What tells one version of the file from another (ETag or Last-Modified) is kept in `<part>.json`.

    Args:
        url: http, https or file.
        part: where the bytes go; whole when the call returns, kept when it raises.
        space_factor: room that must be left on the disk for later, in sizes of the file.
        waits: seconds before each further try.

    Raises:
        ConfigError: `url` is no address.
        TransferError: the file could not be fetched; naming the address and the reason.
        OutputError: it cannot be written, or there is too little room for it.
    """
    _check_address(url)
    log(f"downloading {url}")
    failures, furthest, reached = 0, 0, False
    while True:
        try:
            return _try(url, part, space_factor)
        except _Broken as broken:
            reached |= broken.reached
            if _size(part) > furthest:
                failures, furthest = 0, _size(part)
            # A server that was never reached will not be there in a few seconds: no network, or a typing error.
            if not broken.again or not reached or failures == len(waits):
                raise TransferError(f"{url}: {broken}") from broken
            log(f"{url}: {broken}; trying again in {waits[failures]:g} s")
            _sleep(waits[failures])
            failures += 1
        except OSError as error:
            raise OutputError(f"{part}: cannot be written: {error.strerror or error}") from error


def require_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutputError: fewer than `needed` bytes are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"{folder}: needs {needed / GIB:.1f} GiB of free disk space, {free / GIB:.1f} GiB are free")


def forget(part: Path) -> None:
    """Remove a partial file and what is known about it."""
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def _check_address(url: str) -> None:
    try:
        address = urlsplit(url)
        usable = address.scheme in SCHEMES and bool(address.netloc or address.scheme == "file")
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{url}: must be an address that starts with {', '.join(f'{s}://' for s in SCHEMES)}")


def _try(url: str, part: Path, space_factor: float) -> None:
    validator = _known_validator(url, part)
    if validator is None:
        forget(part)
    start = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "ldm3d"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", str(validator))
    with closing(_open(request)) as response:
        if getattr(response, "status", None) == 416:
            _judge_out_of_range(part, start, response.headers)
        else:
            _receive(response, url, part, space_factor)


def _open(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        raise _Broken(f"the server answers {error.code} {error.reason}", again=error.code in BUSY) from error
    except urllib.error.URLError as error:
        raise _Broken(str(getattr(error.reason, "strerror", None) or error.reason), reached=False) from error
    except ValueError as error:
        raise _Broken(str(error), again=False) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _judge_out_of_range(part: Path, start: int, headers: Any) -> None:
    """The server has nothing after `start`: either all is here, or its file is another."""
    total = str(headers.get("Content-Range", "")).rpartition("/")[2]
    if total != str(start):
        forget(part)
        raise _Broken("the file on the server has changed, starting over")


def _receive(response: Any, url: str, part: Path, space_factor: float) -> None:
    validator = _validator(response.headers)
    start = _size(part)
    resumed = getattr(response, "status", None) == 206
    if resumed:
        sent_from = str(response.headers.get("Content-Range", "")).removeprefix("bytes ").partition("-")[0]
        # Some servers ignore If-Range; then the answer itself tells that it belongs to another version.
        if sent_from != str(start) or validator != _known_validator(url, part):
            forget(part)
            raise _Broken("the file on the server has changed, starting over")
        log(f"going on after {start / CHUNK:,.0f} MiB")
    elif start:
        log("the server sends the file from its beginning: it has changed, or the server cannot resume")
        start = 0
    length = response.headers.get("Content-Length")
    left = int(length) if length is not None else None
    if left is not None:
        kept = 0 if resumed else _size(part)
        require_space(part.parent, left - kept + int(space_factor * (start + left)))
    if not resumed:
        forget(part)
        _state_path(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
    with open(part, "ab") as file:
        steps = None if left is None else math.ceil(left / CHUNK)
        for chunk in progress(_chunks(response), "downloading", total=steps, unit="MiB"):
            file.write(chunk)
    if left is not None and _size(part) < start + left:
        raise _Broken(f"the connection broke after {_size(part)} of {start + left} bytes")


def _chunks(response: Any) -> Iterator[bytes]:
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke: {error or type(error).__name__}") from error


def _validator(headers: Any) -> str | None:
    """What names this version of the file; a weak ETag promises too little (RFC 9110, section 13.1.5)."""
    etag: str | None = headers.get("ETag")
    changed: str | None = headers.get("Last-Modified")
    return etag if etag and not etag.startswith("W/") else changed


def _known_validator(url: str, part: Path) -> str | None:
    """The version of `url` that `part` holds the beginning of; None if that cannot be told."""
    try:
        state = json.loads(_state_path(part).read_text(encoding="utf-8"))
        return state["validator"] if state["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
