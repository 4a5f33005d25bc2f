"""Load on the service: as much as fifty connections can ask for, by `wrk`, and requests at fixed times."""

import asyncio
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

CONNECTIONS = 50
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
# wrk prints 50, 75, 90 and 99 % itself, but not 95 %. Its times are in microseconds.
REPORT = """
done = function(summary, latency)
  io.write(string.format("%d %d %d %d %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max, summary.errors.connect,
    summary.errors.read + summary.errors.write, summary.errors.timeout, summary.errors.status))
end
"""


@dataclass(frozen=True)
class Asked:
    """A request that is repeated, and the status that is right."""

    path: str
    method: str = "GET"
    body: str = ""
    status: int = 200

    def raw(self, host: str, key: str) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {key}"]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n" + self.body).encode()


def require_wrk() -> None:
    """Raises `SystemExit` where the load generator is missing."""
    if shutil.which("wrk") is None:
        raise SystemExit("error: wrk is missing; it is Debian's and Ubuntu's package wrk: apt-get install wrk")


def saturate(url: str, key: str, asked: Asked, seconds: float) -> dict[str, float]:
    """Fifty connections, each asking again as soon as it is answered.

    Returns:
        Requests a second, and percentiles of their time in ms.

    Raises:
        RuntimeError: connections broke, or an answer was not the one that is right.
    """
    script = REPORT
    if asked.method != "GET":
        script += f"wrk.method = '{asked.method}'\nwrk.body = [[{asked.body}]]\n"
        script += "wrk.headers['Content-Type'] = 'application/json'\n"
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "-s", file.name]
        command += ["-H", f"Authorization: Bearer {key}", url + asked.path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = list(map(int, text.splitlines()[-1].split()))
    requests, duration, p50, p95, p99, longest, connect, broken, late, refused = figures
    right = refused == (requests if asked.status >= 400 else 0)
    if connect or broken or late or not right or not requests:
        raise RuntimeError(f"{asked}: {text}")
    times = {"p50 ms": p50, "p95 ms": p95, "p99 ms": p99, "max ms": longest}
    return {"requests/s": requests / duration * 1e6, **{name: time / 1000 for name, time in times.items()}}


@dataclass
class Answer:
    """When a request was due and answered, in seconds of one clock, and with what."""

    due: float
    end: float
    status: int
    head: str
    body: bytes

    @property
    def seconds(self) -> float:
        """From when it was due: a client that had to wait for a connection waited as well."""
        return self.end - self.due


class Connections:
    """Connections that are kept; one more is opened where all are busy."""

    def __init__(self, url: str):
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, raw: bytes) -> tuple[int, str, bytes]:
        """Status, head and body. Raises `OSError` where the connection breaks."""
        pair = self._free.pop() if self._free else await asyncio.open_connection(self.host, self.port)
        reader, writer = pair
        writer.write(raw)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = re.search(r"content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("closed before the answer was whole") from error
        if "connection: close" in head:
            writer.close()
        else:
            self._free.append(pair)
        return int(head.split()[1]), head, body

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


async def at_rate(
    url: str, raw: Callable[[int], bytes], per_second: float, seconds: float, timeout: float = 30
) -> list[Answer]:
    """Ask at fixed times, whether or not the last request was answered.

    Args:
        url: of the service.
        raw: bytes of the n-th request.
        per_second: requests.
        seconds: how long.
        timeout: of a request; one that takes longer, or whose connection breaks, has status 0.
    """
    connections = Connections(url)
    began = time.perf_counter()

    async def one(number: int) -> Answer:
        due = began + number / per_second
        await asyncio.sleep(max(0, due - time.perf_counter()))
        try:
            async with asyncio.timeout(timeout):
                status, head, body = await connections.ask(raw(number))
        except (OSError, TimeoutError) as error:
            status, head, body = 0, repr(error), b""
        return Answer(due, time.perf_counter(), status, head, body)

    answers = await asyncio.gather(*map(one, range(max(1, round(per_second * seconds)))))
    connections.close()
    return answers


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles([*seconds, *seconds[:1]], n=100, method="inclusive")
    return {
        "p50 ms": 1000 * cuts[49],
        "p95 ms": 1000 * cuts[94],
        "p99 ms": 1000 * cuts[98],
        "max ms": 1000 * max(seconds),
    }
