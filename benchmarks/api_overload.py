"""Ten times as many jobs as the worker can do: what is refused, and what those who are accepted notice of it."""

import asyncio
import itertools
import json
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from benchmarks.api_load import Answer, Asked, at_rate, percentiles
from benchmarks.api_service import Service, until

CALLERS = 10
LOOKS_PER_SECOND = 50.0
P99_MS = 50.0
TIMES = {"nobody generates": 0.0, "0.8 times": 0.8, "10 times": 10.0}
"""The load with jobs, as a multiple of what the worker can do."""


def measure(service: Service, tiny: bool) -> dict[str, Any]:
    """Jobs and, beside them, looks at a finished one: at rest, at a load that can be sustained, at ten times that."""
    steps, seconds, first = (1, 1.0, 4) if tiny else (10, 15.0, 20)
    keys = [service.make_key(f"caller {number}") for number in range(2 if tiny else CALLERS)]
    rate = sustainable(service, steps, first)
    rows: list[dict[str, Any]] = []
    unfinished: list[str] = []
    for name, times in TIMES.items():
        posts, looks = asyncio.run(load(service, keys, steps, times * rate, seconds))
        accepted = [answer for answer in posts if answer.status == 202]
        names = [json.loads(answer.body)["id"] for answer in accepted]
        began = time.monotonic()
        unfinished += [job for job in names if not finishes(service, job)]
        rows.append(row_of(name, times * rate, posts, looks, accepted, time.monotonic() - began))
    return {
        "goal": f"429 with Retry-After, nothing else refused, all accepted jobs done; p99 below {P99_MS:g} ms, or at "
        "most twice that at 0.8 times the load",
        "held": all(row["other answers"] == 0 for row in rows) and not unfinished and unharmed(rows),
        "jobs/s that can be sustained": rate,
        "accepted jobs that were not done": unfinished,
        "rows": rows,
    }


def sustainable(service: Service, steps: int, jobs: int) -> float:
    """Jobs a second that the worker does where there is always one to do."""
    with service.client() as client:
        began = time.monotonic()
        asked = [client.post("/v1/samples", json={"seed": seed, "steps": steps}) for seed in range(jobs)]
        for answer in asked:
            answer.raise_for_status()
        until(lambda: client.get(f"/v1/jobs/{asked[-1].json()['id']}").json()["state"] == "done", "all jobs are done")
        return jobs / (time.monotonic() - began)


async def load(
    service: Service, keys: list[str], steps: int, rate: float, seconds: float
) -> tuple[list[Answer], list[Answer]]:
    """Jobs of several callers at a rate, and looks at a finished one."""
    host = service.url.removeprefix("http://")
    with service.client() as client:
        finished = next(job["id"] for job in client.get("/v1/jobs").json()["jobs"] if job["state"] == "done")
    seeds = itertools.count()

    def job(number: int) -> bytes:
        body = json.dumps({"seed": next(seeds), "steps": steps})
        return Asked("/v1/samples", "POST", body).raw(host, keys[number % len(keys)])

    look = Asked(f"/v1/jobs/{finished}").raw(host, service.key)
    looking = at_rate(service.url, lambda number: look, LOOKS_PER_SECOND, seconds)
    if not rate:
        return [], await looking
    posts, looks = await asyncio.gather(at_rate(service.url, job, rate, seconds), looking)
    return posts, looks


def row_of(
    name: str, rate: float, posts: list[Answer], looks: list[Answer], accepted: list[Answer], seconds: float
) -> dict[str, Any]:
    refused = [answer for answer in posts if answer.status == 429 and "\r\nretry-after:" in answer.head]
    others = Counter(answer.status for answer in looks if answer.status != 200)
    others += Counter(answer.status for answer in posts) - Counter({202: len(accepted), 429: len(refused)})
    row: dict[str, Any] = {"load": name, "jobs/s asked for": rate, "accepted": len(accepted), "429": len(refused)}
    row["other answers"] = sum(others.values())
    for what, answers in (("accepted", accepted), ("429", refused), ("look", looks)):
        found = percentiles([answer.seconds for answer in answers]) if answers else {}
        row |= {f"{what} {percentile} ms": found.get(f"{percentile} ms") for percentile in ("p50", "p99")}
    return row | {"all done after s": seconds if accepted else None}


def unharmed(rows: list[dict[str, Any]]) -> bool:
    usual, heavy = rows[-2:]
    names = ("accepted p99 ms", "look p99 ms")
    return all(heavy[name] is not None and heavy[name] < max(P99_MS, 2 * (usual[name] or 0)) for name in names)


def finishes(service: Service, job: str) -> bool:
    """Whether an accepted job is done in the end. Looked up on the disk: each belongs to another caller."""
    outcome = service.data / "jobs" / job / "outcome.json"
    with suppress(TimeoutError):
        return bool(until(lambda: outcome.exists() and json.loads(outcome.read_bytes())["state"] == "done", job))
    return False
