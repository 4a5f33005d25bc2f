"""The service under mixed load for a long time: jobs, polling, progress, downloads, deletions and wrong requests.

    python -m benchmarks.soak --minutes 15
    python -m benchmarks.soak --minutes 1440

After a third of the time the worker is killed with SIGKILL. In the end: no accepted job was lost or failed, the same
request has always given the same bytes, no answer was a 5xx, none took longer than its limit, memory and open files
have not grown. Exit status 1 where one of these does not hold.
"""

import os
import signal
import statistics
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.api_service import Service, running, until
from benchmarks.measure import arguments, table, write_result
from benchmarks.soak_clients import Client, Findings

CLIENTS = 4
GROWTH = 0.05
"""From the median of the second quarter after the kill to that of the last one."""
SLACK = {"web MiB": 8.0, "worker MiB": 16.0, "open files": 20.0}
"""Growth below this is that of caches and pools, which are bounded."""
READINGS = 120
RETENTION_MINUTES = 3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="how long")
    args = parser.parse_args()
    minutes = 0.15 if args.tiny else args.minutes
    with running(retention_minutes=RETENTION_MINUTES) as service:
        result = soak(service, 60 * minutes)
    print(table(result["readings"][:: max(1, len(result["readings"]) // 12)]))
    print("\n".join(f"{'ok  ' if held else 'MISS'} {name}" for name, held in result["held"].items()))
    write_result(args.output, result)
    if not all(result["held"].values()) and not args.tiny:
        sys.exit(1)


def soak(service: Service, seconds: float) -> dict[str, Any]:
    """Load the service for so long, and judge what was seen."""
    findings, ending = Findings(), threading.Event()
    clients = [Client(service, service.make_key(f"client {n}"), n, findings, ending) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    began = time.monotonic()
    readings: list[dict[str, Any]] = []
    killed: float | None = None
    while (now := time.monotonic() - began) < seconds:
        if killed is None and now > seconds / 3:
            os.kill(service.workers()[0], signal.SIGKILL)
            killed = now
        readings.append({"minute": round(now / 60, 2), "jobs": findings.counts["accepted"], **held_by(service)})
        time.sleep(max(0.5, seconds / READINGS))
    ending.set()
    for client in clients:
        client.join(300)
    with suppress(TimeoutError):
        until(lambda: not unfinished(service), "no job waits any more", 300)
    after = [reading for reading in readings if killed is not None and 60 * reading["minute"] > killed + 20]
    grown = {name: growth([reading[name] for reading in after]) for name in SLACK}
    held = {
        "no job was lost": not findings.lost and not unfinished(service),
        "no job failed": not findings.failed,
        "the same request gave the same bytes": not findings.differing,
        "no answer was a 5xx, but /ready after the kill": not findings.server_errors,
        "no request timed out, no connection broke": not findings.broken,
        "the audit log is whole": service.command("mlops.api.audit", "verify").returncode == 0,
        "every 429 said when to come again": not findings.unannounced,
        **{f"{name}: no growth": is_small(grown[name], SLACK[name]) for name in SLACK},
    }
    return {
        "minutes": seconds / 60,
        "clients": CLIENTS,
        "killed the worker after minutes": killed and round(killed / 60, 2),
        "held": held,
        "growth, second quarter to last": grown,
        "criterion": f"below {GROWTH:.0%} of what was held, or below {SLACK}",
        "answers": dict(sorted(findings.counts.items())),
        "milliseconds": findings.percentiles(),
        "problems": findings.problems()[:50],
        "readings": readings,
    }


def held_by(service: Service) -> dict[str, float]:
    """What the processes hold now."""
    files = sum(_open_files(process) for process in (service.process.pid, *service.workers()))
    jobs = list((service.data / "jobs").iterdir())
    return {**service.resident_mib(), "open files": files, "kept jobs": len(jobs)}


def unfinished(service: Service) -> list[Path]:
    return [*(service.data / "unfinished").iterdir()]


def _open_files(process: int) -> int:
    try:
        return len([*Path(f"/proc/{process}/fd").iterdir()])
    except OSError:  # it was killed
        return 0


def growth(values: list[float]) -> dict[str, float] | None:
    """Medians of the second and the last quarter; None where there are too few."""
    quarter = len(values) // 4
    if not quarter:
        return None
    before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
    return {"before": before, "after": after, "growth": round(after - before, 2)}


def is_small(grown: dict[str, float] | None, slack: float) -> bool:
    return grown is not None and grown["growth"] <= max(GROWTH * grown["before"], slack)


if __name__ == "__main__":
    main()
