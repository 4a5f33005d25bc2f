"""What the service costs: requests that do not generate, what generating costs more than the script, memory, overload.

    python -m benchmarks.api

Needs `wrk` (Debian's package), two cores that do nothing else, and 6 minutes. The long run is `benchmarks.soak`.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks import api_memory, api_overhead, api_overload
from benchmarks.api_load import CONNECTIONS, Asked, require_wrk, saturate
from benchmarks.api_service import Service, generate, running
from benchmarks.measure import arguments, table, write_result

PER_SECOND, P99_MS = 1000.0, 50.0
"""Goals of routes that do not generate."""


def main() -> None:
    args = arguments(__doc__).parse_args()
    require_wrk()
    parts: dict[str, Callable[[Service, bool], dict[str, Any]]] = {
        "memory": api_memory.measure,  # first, in processes that have done nothing yet
        "routes": routes,
        "overhead": api_overhead.measure,
        "overload": api_overload.measure,
    }
    result: dict[str, Any] = {"connections": CONNECTIONS}
    with running() as service:
        for name, part in parts.items():
            began = time.monotonic()
            result[name] = part(service, args.tiny)
            held = "reached" if result[name]["held"] else "missed"
            print(
                f"== {name}, {time.monotonic() - began:.0f} s, goal {held}\n{table(result[name]['rows'])}\n", flush=True
            )
    write_result(args.output, result)
    args.output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def routes(service: Service, tiny: bool) -> dict[str, Any]:
    """Each route that does not generate, with an API key, asked for by fifty connections."""
    rows = []
    with service.client() as client:
        wanted = asked_for(generate(client), len(client.get("/v1/jobs").json()["jobs"]))
    for name, asked in wanted.items():
        if not tiny:
            saturate(service.url, service.key, asked, 1)
        found = saturate(service.url, service.key, asked, 1 if tiny else 10)
        held = found["requests/s"] >= PER_SECOND and found["p99 ms"] < P99_MS
        rows.append({"route": name, **found, "goal": "reached" if held else "missed"})
    goal = f"at least {PER_SECOND:g} requests/s, p99 below {P99_MS:g} ms"
    return {"goal": goal, "held": all(row["goal"] == "reached" for row in rows), "rows": rows}


def asked_for(job: dict[str, Any], jobs: int) -> dict[str, Asked]:
    volume = next(file for file in job["files"] if file["name"].endswith(".nii.gz"))
    return {
        "GET /health": Asked("/health"),
        "GET /v1/me": Asked("/v1/me"),
        "GET /v1/models": Asked("/v1/models"),
        "GET /v1/jobs/{id}, finished": Asked(f"/v1/jobs/{job['id']}"),
        f"GET /v1/jobs, a page of {jobs}": Asked("/v1/jobs"),
        f"GET a file of {volume['bytes'] / 1000:.0f} kB": Asked(f"/v1/jobs/{job['id']}/files/{volume['name']}"),
        "POST /v1/samples, refused (422)": Asked("/v1/samples", "POST", '{"num": 0}', 422),
    }


def markdown(result: dict[str, Any]) -> str:
    """All tables, for the docs."""
    titles = {
        "routes": f"Routes that do not generate, {CONNECTIONS} connections, with an API key",
        "overhead": "A request for 8 volumes against inference.py",
        "memory": "Memory",
        "overload": "Ten times the load that can be sustained",
    }
    parts = [
        f"**{title}** (goal: {result[name]['goal']})\n\n{table(result[name]['rows'])}" for name, title in titles.items()
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
