"""The clients of `benchmarks.soak`: each does what people and programs do, in a random order that its number fixes."""

import hashlib
import itertools
import random
import statistics
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.api_service import Service

FINISHED = ("done", "failed", "cancelled")
JOB_SECONDS = 150.0
"""A job that has not ended by then is lost."""
REMEMBERED = 5000
"""Times kept of each kind of request."""


@dataclass
class Findings:
    """What all clients have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    server_errors: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unannounced: list[str] = field(default_factory=list)
    digests: dict[tuple[Any, ...], str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def answered(self, what: str, answer: httpx.Response, seconds: float) -> None:
        self.counts[f"{what}: {answer.status_code}"] += 1
        if len(self.seconds[what]) < REMEMBERED:
            self.seconds[what].append(seconds)
        else:
            self.seconds[what][random.randrange(REMEMBERED)] = seconds
        # /ready says 503 for as long as no worker lives, which is after the kill.
        if answer.status_code >= 500 and (what, answer.status_code) != ("/ready", 503):
            self.server_errors.append(f"{what}: {answer.status_code} {answer.text[:200]}")
        if answer.status_code == 429 and "retry-after" not in answer.headers:
            self.unannounced.append(what)

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Milliseconds of each kind of request."""
        found = {}
        for what, seconds in sorted(self.seconds.items()):
            if len(seconds) > 1:
                cuts = statistics.quantiles(seconds, n=100, method="inclusive")
                found[what] = {name: round(1000 * cuts[at - 1], 1) for name, at in (("p50", 50), ("p99", 99))}
        return found

    def problems(self) -> list[str]:
        lists = (self.lost, self.failed, self.differing, self.server_errors, self.broken, self.unannounced)
        return [*itertools.chain(*lists)]


class Client(threading.Thread):
    """One caller with a key.

    Args:
        service: that it calls.
        key: of its own.
        number: fixes what it does.
        findings: of all.
        ending: it asks for nothing new from then on.
    """

    def __init__(self, service: Service, key: str, number: int, findings: Findings, ending: threading.Event):
        super().__init__(daemon=True)
        self.http, self.findings, self.ending = service.client(key), findings, ending
        self.random = random.Random(number)
        self.open: dict[str, float] = {}
        self.done: list[str] = []

    def run(self) -> None:
        acts = (self.submit, self.poll, self.poll, self.listen, self.download, self.delete, self.look, self.err)
        while not self.ending.is_set():
            try:
                self.random.choices(acts, (3, 4, 4, 1, 4, 1, 3, 2))[0]()
            except (httpx.HTTPError, LookupError, ValueError) as error:
                self.findings.broken.append(f"{type(error).__name__}: {error}")
            self.ending.wait(self.random.uniform(0, 0.2))
        while self.open:
            self.poll()
            time.sleep(0.2)

    def ask(self, what: str, method: str, path: str, **more: Any) -> httpx.Response:
        began = time.monotonic()
        answer = self.http.request(method, path, **more)
        self.findings.answered(what, answer, time.monotonic() - began)
        return answer

    def submit(self) -> None:
        """Ask for volumes, now and then twice with one key, or waiting for them."""
        asked = {
            "num": self.random.randint(1, 3),
            "seed": self.random.randint(0, 9),
            "steps": self.random.choice((2, 8)),
        }
        headers = {"Idempotency-Key": f"{self.random.getrandbits(64):x}"}
        wait = self.random.choice((0, 0, 0, 5))
        answer = self.ask(
            "submit and wait" if wait else "submit", "POST", f"/v1/samples?wait={wait}", json=asked, headers=headers
        )
        if answer.status_code not in (200, 202):
            return
        job = answer.json()
        self.findings.counts["accepted"] += 1
        self.open[job["id"]] = time.monotonic()
        if self.random.random() < 0.2:
            again = self.ask("submit again", "POST", "/v1/samples", json=asked, headers=headers)
            if again.status_code in (200, 202) and again.json()["id"] != job["id"]:
                self.findings.differing.append(f"{job['id']}: the same key made another job")

    def poll(self) -> None:
        """Look at the oldest job that has not ended."""
        if self.open:
            name = next(iter(self.open))
            answer = self.ask("job", "GET", f"/v1/jobs/{name}")
            self.judge(name, answer.json() if answer.status_code == 200 else None, answer.status_code)

    def judge(self, name: str, job: dict[str, Any] | None, status: int) -> None:
        if job and job["state"] in FINISHED:
            del self.open[name]
            self.done.append(name)
            if job["state"] != "done":
                self.findings.failed.append(f"{name}: {job['state']} {job['error']}")
        elif status == 404 or time.monotonic() - self.open[name] > JOB_SECONDS:
            del self.open[name]
            self.findings.lost.append(f"{name}: {status} {job and job['state']}")

    def listen(self) -> None:
        """Follow a job's events to their end."""
        if not self.open:
            return
        name = self.random.choice([*self.open])
        last = ""
        with self.http.stream("GET", f"/v1/jobs/{name}/events", timeout=JOB_SECONDS) as answer:
            self.findings.counts[f"events: {answer.status_code}"] += 1
            for line in answer.iter_lines():
                last = line.removeprefix("event: ") if line.startswith("event: ") else last
        if answer.status_code == 200 and last != "end":
            self.findings.broken.append(f"{name}: its events ended with {last!r}")

    def download(self) -> None:
        """A volume of a finished job; it must be what the job says, and what the same request gave before."""
        if not self.done:
            return
        name = self.random.choice(self.done[-20:])
        job = self.ask("job", "GET", f"/v1/jobs/{name}")
        if job.status_code == 404:  # expired
            self.done.remove(name)
            return
        volumes = [file for file in job.json()["files"] if file["name"].endswith(".nii.gz")]
        volume = self.random.choice(volumes)
        answer = self.ask("file", "GET", f"/v1/jobs/{name}/files/{volume['name']}")
        if answer.status_code != 200:
            return
        digest = hashlib.sha256(answer.content).hexdigest()
        asked = (volume["name"], job.json()["request"]["steps"])
        if digest != volume["sha256"] or self.findings.digests.setdefault(asked, digest) != digest:
            self.findings.differing.append(f"{name}: {asked} is {digest[:12]}")

    def delete(self) -> None:
        """Remove a job, whether it has ended or not."""
        names = [*self.open, *self.done[-20:]]
        if names:
            name = self.random.choice(names)
            if self.ask("delete", "DELETE", f"/v1/jobs/{name}").status_code in (204, 404):
                self.open.pop(name, None)
                self.done = [other for other in self.done if other != name]

    def look(self) -> None:
        path = self.random.choice(("/v1/jobs", "/v1/models", "/v1/me", "/health", "/ready", "/metrics", "/"))
        self.ask(path, "GET", path)

    def err(self) -> None:
        """What a service must refuse, each time."""
        wrong: list[tuple[int, str, str, dict[str, Any]]] = [
            (422, "POST", "/v1/samples", {"json": {"num": 0}}),
            (422, "POST", "/v1/samples", {"json": {"number": 1}}),
            (422, "POST", "/v1/samples", {"content": "{", "headers": {"Content-Type": "application/json"}}),
            (413, "POST", "/v1/samples", {"json": {"model": "a" * 100_000}}),
            (404, "GET", "/v1/jobs/00000000000000000000000000", {}),
            (404, "GET", "/v1/jobs/..%2Fkeys.json", {}),
            (403, "POST", "/v1/admin/reload", {}),
            (404, "GET", "/v1/nothing", {}),
            (405, "PUT", "/v1/samples", {}),
        ]
        expected, method, path, more = self.random.choice(wrong)
        answer = self.ask("wrong request", method, path, **more)
        if answer.status_code not in (expected, 429):
            self.findings.differing.append(f"{method} {path}: {answer.status_code}, not {expected}")
