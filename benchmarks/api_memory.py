"""Memory of the service's processes after many requests and jobs."""

import asyncio
from typing import Any

import httpx

from benchmarks.api_load import Asked, Connections
from benchmarks.api_service import Service, generate, until

REQUESTS, JOBS, POINTS = 10_000, 200, 10
CLIENTS = 10
ALLOWED_MIB = {"web MiB": 5.0, "worker MiB": 20.0}
GOAL = "from the middle to the end less than {web MiB:g} MiB (web) and {worker MiB:g} MiB (worker)"
"""From the middle of the run to its end."""


def measure(service: Service, tiny: bool) -> dict[str, Any]:
    """10,000 requests and 200 jobs in ten parts; what both processes hold after each."""
    requests, jobs, points = (60, 6, 3) if tiny else (REQUESTS, JOBS, POINTS)
    rows: list[dict[str, Any]] = [{"requests": 0, "jobs": 0, **service.resident_mib()}]
    with service.client() as client:
        finished = generate(client, steps=1)
        for point in range(1, points + 1):
            some_jobs(client, jobs // points, point)
            asyncio.run(some_requests(service, finished, requests // points))
            done = {"requests": point * (requests // points), "jobs": point * (jobs // points)}
            rows.append(done | service.resident_mib())
    middle, last = rows[len(rows) // 2], rows[-1]
    growth = {name: round(float(last[name]) - float(middle[name]), 1) for name in ALLOWED_MIB}
    return {
        "goal": GOAL.format(**ALLOWED_MIB),
        "held": all(growth[name] < most for name, most in ALLOWED_MIB.items()),
        "growth MiB": growth,
        "rows": rows,
    }


def some_jobs(client: httpx.Client, count: int, seed: int) -> None:
    """Jobs of different sizes, waited for together."""
    asked = [
        client.post("/v1/samples", json={"num": 1 + n % 2, "seed": seed, "steps": 1 + n % 3}) for n in range(count)
    ]
    for answer in asked:
        path = f"/v1/jobs/{answer.raise_for_status().json()['id']}"
        until(lambda path=path: client.get(path).json()["state"] == "done", path)  # type: ignore[misc]


async def some_requests(service: Service, job: dict[str, Any], count: int) -> None:
    """What clients ask for, right and wrong, by ten connections.

    Raises:
        RuntimeError: an answer was not as it should be.
    """
    path = f"/v1/jobs/{job['id']}"
    kinds = [Asked(path), Asked("/v1/jobs"), Asked("/v1/me"), Asked("/v1/models"), Asked("/metrics"), Asked("/health")]
    kinds += [Asked(f"{path}/files/{file['name']}") for file in job["files"]]
    kinds += [Asked("/v1/samples", "POST", '{"num": 0}', 422), Asked(f"{path}/files/none", status=404)]
    raw = [kind.raw(service.url.removeprefix("http://"), service.key) for kind in kinds]
    connections, numbers = Connections(service.url), iter(range(count))

    async def one_client() -> None:
        for number in numbers:
            status, _, body = await connections.ask(raw[number % len(raw)])
            if status != kinds[number % len(raw)].status:
                raise RuntimeError(f"{kinds[number % len(raw)]}: {status} {body[:200]!r}")

    await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    connections.close()
