"""Does a service that was just deployed do its job? Asks it as a caller would, and looks at the brain that it makes.

    SMOKE_TEST_KEY=... python -m mlops.deployment.smoke_test http://127.0.0.1:8000 --version 0.1.0

It waits at most `--seconds` until the service is ready and has made a brain. It needs nothing but Python: where a
deployment's credentials are, nothing is installed.

Exit status: 0 it does, 1 it does not, 2 a mistake in what was asked for.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import struct
import sys
import time
import urllib.error
import urllib.request
import uuid
from array import array
from typing import Any

from mlops.commands import Parser, run_command

METRICS = ("ldm3d_http_requests_total", "ldm3d_queue_jobs", "ldm3d_workers")
TIMEOUT_SECONDS = 60
PAUSE_SECONDS = 0.5
LARGEST_BYTES = 2**30
NIFTI_HEADER_BYTES = 348
STORED = {4: "h", 16: "f"}
"""NIfTI's numbers of the types that are written here, and Python's letters for them."""
LEAST_SPREAD = 0.02
"""Of the intensities, which go from 0 to 1: an image of one grey has none."""
HEAD = (0.02, 0.98)
"""Share of the voxels that are brighter than the background."""


class Failed(Exception):
    """The service does not do its job; the text says what it does instead."""


class Asking:
    """Asks a service; what it answers is checked for its status only."""

    def __init__(self, url: str, key: str):
        self.url, self._key = url.rstrip("/"), key

    def get(self, path: str, expect: int = 200, key: bool = True, sent: object = None) -> bytes:
        """The answer's body. Raises `Failed` for another status than `expect`, or no answer."""
        headers = {"Authorization": f"Bearer {self._key}"} if key and self._key else {}
        body = None
        if sent is not None:
            body = json.dumps(sent).encode()
            headers |= {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                status, text = answer.status, answer.read(LARGEST_BYTES)
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        except OSError as error:
            raise Failed(f"{path}: no answer: {getattr(error, 'reason', error)}") from error
        if status != expect:
            raise Failed(f"{path}: answers {status} instead of {expect}: {text[:300].decode(errors='replace')}")
        return bytes(text)

    def json(self, path: str, expect: int = 200, sent: object = None) -> Any:
        text = self.get(path, expect, sent=sent)
        try:
            return json.loads(text)
        except ValueError as error:
            raise Failed(f"{path}: answers no JSON") from error


def smoke_test(url: str, key: str, version: str, seconds: float) -> None:
    """Ask for everything that a deployment must have right; says what is.

    Args:
        url: of the service.
        key: an operator's; empty for a service without keys.
        version: that must answer; empty for any.
        seconds: within which the service must be ready and the brain made.

    Raises:
        Failed: at the first thing that is wrong.
    """
    asking, until = Asking(url, key), time.monotonic() + seconds
    _say("alive", asking.json("/health")["status"] == "alive")
    _ready(asking, until)
    found = asking.json("/openapi.json")["info"]["version"]
    _say(f"version {found}", not version or found == version, f"instead of {version}")
    text = asking.get("/metrics").decode()
    missing = [name for name in METRICS if f"\n{name}" not in text]
    _say("metrics", not missing, f"without {', '.join(missing)}")
    if key:
        asking.get("/v1/jobs", expect=401, key=False)
        _say("nobody enters without a key", True)
    _brain(asking, until)


def _ready(asking: Asking, until: float) -> None:
    while True:
        try:
            asking.get("/ready")
            break
        except Failed:
            if time.monotonic() > until:
                raise
        time.sleep(PAUSE_SECONDS)
    _say("ready", True)


def _brain(asking: Asking, until: float) -> None:
    job = asking.json("/v1/samples", expect=202, sent={"num": 1, "seed": int(time.time()) % 2**31})
    while job["state"] in ("queued", "running"):
        if time.monotonic() > until:
            raise Failed(f"job {job['id']}: still {job['state']}")
        time.sleep(PAUSE_SECONDS)
        job = asking.json(f"/v1/jobs/{job['id']}")
    if job["state"] != "done":
        raise Failed(f"job {job['id']}: {job['state']}: {job['error']}")
    file = next(file for file in job["files"] if file["name"].endswith(".nii.gz"))
    content = asking.get(f"/v1/jobs/{job['id']}/files/{file['name']}")
    _say(f"{file['name']} whole", hashlib.sha256(content).hexdigest() == file["sha256"], "damaged on its way")
    models = asking.json("/v1/models")["models"]
    shapes = {
        (model["name"], version["version"]): tuple(version["shape"])
        for model in models
        for version in model["versions"]
    }
    shape = shapes[job["request"]["model"], job["version"]]
    problem = brain_problem(content, shape)
    _say(f"a brain of {' x '.join(map(str, shape))} voxels", not problem, problem)


def brain_problem(content: bytes, shape: tuple[int, ...]) -> str:
    """What speaks against a `.nii.gz` being a brain of this shape with intensities from 0 to 1, or nothing."""
    try:
        plain = gzip.decompress(content)
        dim = struct.unpack_from("<8h", plain, 40)
        (kind,) = struct.unpack_from("<h", plain, 70)
        offset, slope, intercept = struct.unpack_from("<3f", plain, 108)
        if struct.unpack_from("<i", plain, 0) != (NIFTI_HEADER_BYTES,) or kind not in STORED:
            return "no NIfTI file of this service"
        if dim[1 : 1 + dim[0]] != shape:
            return f"has {' x '.join(map(str, dim[1 : 1 + dim[0]]))} voxels"
        stored = array(STORED[kind])
        stored.frombytes(plain[int(offset) :])
    except (OSError, EOFError, ValueError, struct.error) as error:
        return f"cannot be read: {error}"
    if sys.byteorder == "big":
        stored.byteswap()
    if len(stored) != math.prod(shape):
        return f"has {len(stored)} values"
    values = [value * slope + intercept for value in stored] if slope not in (0, 1) else list(stored)
    if not all(-0.001 <= value <= 1.001 for value in values):  # NaN neither
        return "has intensities beyond 0 and 1"
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    head = sum(value > 0.05 for value in values) / len(values)
    if spread < LEAST_SPREAD or not HEAD[0] < head < HEAD[1]:
        return f"is empty: spread {spread:.3f}, {head:.0%} of it brighter than the background"
    return ""


def _say(what: str, is_right: bool, otherwise: str = "") -> None:
    if not is_right:
        raise Failed(f"{what}: {otherwise}" if otherwise else f"not {what}")
    print(f"ok: {what}", flush=True)


def main() -> int:
    parser = Parser(
        prog="python -m mlops.deployment.smoke_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="of the service")
    parser.add_argument("--version", default="", help="which must answer; any by default")
    parser.add_argument(
        "--seconds", type=float, default=300, help="until it is ready and has made a brain; %(default)s"
    )
    args = parser.parse_args()
    if not args.url.startswith(("http://", "https://")):
        parser.error(f"{args.url}: no address of a service, such as http://127.0.0.1:8000")
    try:
        smoke_test(args.url, os.environ.get("SMOKE_TEST_KEY", ""), args.version, args.seconds)
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
