"""A service as the page sees it, without weights and without a queue: what the tests of the page run against.

Jobs advance by themselves over about a second, volumes are phantoms. `State` holds what a test sets to make the
service refuse, fail or hold still.
"""

import asyncio
import gzip
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

from ldm3d.phantom import make_phantom
from mlops.api.observe import PAGE_POLICY
from mlops.api.schemas import Catalogue, Job, JobPage, Me, SampleRequest

STATIC = Path(__file__).parents[1] / "mlops" / "api" / "static"
STEPS, STEP_SECONDS = 5, 0.2
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
SPACING = 3.2


class Refusal(Exception):
    def __init__(self, status: int, detail: str, errors: list[dict[str, str]] | None = None, **headers: str):
        self.status, self.detail, self.errors = status, detail, errors or []
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class State:
    """What the fake service knows and does.

    Attributes:
        keys: roles by key; none for an open service.
        conditions: offered by the model.
        refusal: what POST answers instead of a job.
        failure: why every job fails.
        streams: whether events can be had.
        hold: jobs do not advance while it is set.
        seen: method, path and body of every request.
    """

    keys: dict[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ("demo",)
    conditions: dict[str, list[str]] = field(default_factory=dict)
    refusal: Refusal | None = None
    failure: str | None = None
    streams: bool = True
    hold: bool = False
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    born: dict[str, float] = field(default_factory=dict)
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)


@cache
def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A T1w phantom (X, Y, Z) in 0..1, and its affine."""
    made = make_phantom(seed % 1000, 0)
    image = made.image[1]
    return (image / np.quantile(image, 0.999)).clip(0, 1).astype(np.float32), made.affine


@cache
def volume_files(seed: int) -> tuple[bytes, bytes, bytes]:
    """NIfTI (not compressed), sidecar and preview."""
    image, affine = volume(seed)
    middle = [np.rot90(image.take(n // 2, axis)) for axis, n in enumerate(image.shape)]
    height = max(plane.shape[0] for plane in middle)
    row = np.hstack([np.pad(plane, ((0, height - plane.shape[0]), (0, 0))) for plane in middle])
    picture = io.BytesIO()
    Image.fromarray((row * 255).astype(np.uint8)).save(picture, "PNG")
    return nib.Nifti1Image(image, affine).to_bytes(), json.dumps({"seed": seed}).encode(), picture.getvalue()


def finish(state: State, job: dict[str, Any]) -> None:
    """Give a job its files."""
    request = job["request"]
    for i in range(request["num"]):
        stem = f"synimg_{request['seed']}_{i}"
        nifti, sidecar, preview = volume_files(request["seed"] + i)
        if request["format"] == "nii.gz":
            nifti = gzip.compress(nifti, 1, mtime=0)
        kinds = {
            f"{stem}.{request['format']}": (nifti, "application/gzip"),
            f"{stem}.json": (sidecar, "application/json"),
            f"{stem}.png": (preview, "image/png"),
        }
        for name, (content, media_type) in kinds.items():
            state.files[job["id"], name] = content
            digest = hashlib.sha256(content).hexdigest()
            job["files"].append({"name": name, "bytes": len(content), "media_type": media_type, "sha256": digest})
    job["expires"] = (datetime.now(UTC) + timedelta(hours=24)).isoformat()


def advance(state: State, job: dict[str, Any]) -> str:
    """Bring a job up to the present: its JSON."""
    if job["state"] in ("queued", "running") and not state.hold:
        # The oldest job that is not finished runs, the others wait.
        waiting = [one for one in state.jobs.values() if one["state"] in ("queued", "running")]
        job["place"] = waiting.index(job) or None
        if not job["place"]:
            start = state.born.setdefault(job["id"], time.monotonic())
            share = min((time.monotonic() - start) / (STEPS * STEP_SECONDS), 1.0)
            done = int(share * job["request"]["num"])
            job["state"] = "running"
            left = (1 - share) * STEPS * STEP_SECONDS
            job["progress"] = {"done": done, "total": job["request"]["num"], "share": share, "seconds_left": left}
            if share == 1:
                job["state"], job["error"] = ("failed", state.failure) if state.failure else ("done", None)
                job["finished"] = datetime.now(UTC).isoformat()
                if not state.failure:
                    finish(state, job)
    return Job.model_validate(job).model_dump_json()


def new_job(state: State, asked: SampleRequest) -> dict[str, Any]:
    number, name = len(state.born) + len(state.jobs) + time.time_ns(), ""
    for _ in range(26):
        number, digit = divmod(number, 32)
        name = ALPHABET[digit] + name
    request = asked.model_dump() | {"steps": asked.steps or 10, "scheduler": "ddim", "model": asked.model or "demo"}
    job = {
        "id": name,
        "state": "queued",
        "created": datetime.now(UTC).isoformat(),
        "place": 1,
        "request": request,
        "version": "v1",
        "assigned_by": "only",
        "weights_sha256": {"autoencoder.safetensors": "0" * 64},
        "files": [],
    }
    state.jobs[name] = job
    return job


def catalogue(state: State) -> dict[str, Any]:
    version = {
        "version": "v1",
        "share": 100,
        "shadow": False,
        "weights_sha256": {},
        "shape": [48, 64, 48],
        "spacing_mm": [SPACING] * 3,
        "schedulers": ["ddim", "ddpm"],
        "default_steps": 10,
        "max_steps": 1000,
        "conditions": state.conditions,
        "trained_on": "0" * 64,
        "num_train": 420,
        "loaded": True,
    }
    limits = {
        "max_num": 64,
        "max_steps": 1000,
        "max_voxels": 512**3,
        "max_jobs_per_caller": 20,
        "requests_per_minute": 6000,
        "max_wait_seconds": 120,
        "retention_minutes": 1440,
    }
    return {"models": [{"name": name, "versions": [version]} for name in state.models], "limits": limits}


def make_app(state: State) -> FastAPI:
    app = FastAPI()
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.middleware("http")
    async def headers(request: Request, call_next: Any) -> Response:
        state.seen.append((request.method, request.url.path, await request.body()))
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = PAGE_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        content = {"title": "Refused", "status": refusal.status, "detail": refusal.detail, "errors": refusal.errors}
        media_type = "application/problem+json"
        return JSONResponse(content, refusal.status, headers=refusal.headers, media_type=media_type)

    def role(request: Request) -> str:
        if not state.keys:
            return "admin"
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key not in state.keys:
            raise Refusal(401, "No such key.", WWW_Authenticate="Bearer")
        return state.keys[key]

    def find(request: Request, job_id: str) -> dict[str, Any]:
        role(request)
        if job_id not in state.jobs:
            raise Refusal(404, "No such job.")
        return state.jobs[job_id]

    @app.get("/")
    def page() -> Response:
        return FileResponse(STATIC / "index.html")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/v1/me")
    def me(request: Request) -> Me:
        return Me(id="1", name="Anna" if state.keys else "local", role=role(request))

    @app.get("/v1/models")
    def models(request: Request) -> Catalogue:
        role(request)
        return Catalogue.model_validate(catalogue(state))

    @app.post("/v1/samples")
    def sample(request: Request, asked: SampleRequest) -> Response:
        if role(request) == "viewer":
            raise Refusal(403, "This takes the role operator.")
        assert request.headers["Idempotency-Key"]
        if state.refusal:
            raise state.refusal
        return Response(advance(state, new_job(state, asked)), 202, media_type="application/json")

    @app.get("/v1/jobs")
    def jobs(request: Request, limit: int = 20, before: str = "~") -> JobPage:
        role(request)
        own = sorted(
            (one for one in state.jobs.values() if one["id"] < before), key=lambda one: one["id"], reverse=True
        )
        shown = own[:limit]
        rest = shown[-1]["id"] if len(own) > limit else None
        return JobPage(jobs=[Job.model_validate_json(advance(state, one)) for one in shown], next=rest)

    @app.get("/v1/jobs/{job_id}")
    def job(request: Request, job_id: str) -> Response:
        return Response(advance(state, find(request, job_id)), media_type="application/json")

    @app.get("/v1/jobs/{job_id}/events")
    async def events(request: Request, job_id: str) -> Response:
        one = find(request, job_id)
        if not state.streams:
            raise Refusal(503, "Too many streams.")

        async def changes() -> AsyncIterator[str]:
            last = None
            while one["state"] in ("queued", "running"):
                if (now := advance(state, one)) != last:
                    yield f"event: progress\ndata: {now}\n\n"
                last = now
                await asyncio.sleep(STEP_SECONDS / 2)
            yield f"event: end\ndata: {advance(state, one)}\n\n"

        return StreamingResponse(changes(), media_type="text/event-stream")

    @app.get("/v1/jobs/{job_id}/files/{name}")
    def file(request: Request, job_id: str, name: str) -> Response:
        one = find(request, job_id)
        info = next(info for info in one["files"] if info["name"] == name)
        return Response(state.files[job_id, name], media_type=info["media_type"])

    @app.delete("/v1/jobs/{job_id}", status_code=204)
    def delete(request: Request, job_id: str) -> None:
        if find(request, job_id) and role(request) == "viewer":
            raise Refusal(403, "This takes the role operator.")
        del state.jobs[job_id]

    return app


class Service:
    """The fake service at a port of its own, under `prefix`; it can be stopped and started again there."""

    def __init__(self, prefix: str = ""):
        self.state, self.prefix = State(), prefix
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}/"

    def add_job(self, seed: int) -> None:
        """A job that waits, sent by another program of the same caller."""
        new_job(self.state, SampleRequest(seed=seed))

    def start(self) -> None:
        app = outer = make_app(self.state)
        if self.prefix:
            outer = FastAPI()
            outer.mount(self.prefix, app)
        config = uvicorn.Config(outer, port=self.port, log_level="error", timeout_graceful_shutdown=0, lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 120
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < deadline, "the fake service has not started"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
