"""mlops.deployment: a release that does not work is noticed, and what ran before runs again."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mlops.deployment import roll_out, smoke_test
from mlops.deployment.smoke_test import METRICS, brain_problem

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (12, 16, 12)
KEY = "ldm3d_abcd1234_" + "s" * 43
DIGEST = "sha256:" + "0123456789abcdef" * 4
IMAGE = f"cpu=registry.example/lab/ldm3d@{DIGEST}"
CUDA = IMAGE.replace("cpu=", "cuda=").replace("@sha256:0", "@sha256:f")
MANIFEST = """
kind: Deployment
spec:
  containers:
  - image: ldm3d:0.1.0-cpu
    name: api
  - image: "ldm3d:0.1.0-cpu"
  - name: worker
    image: localhost:5000/lab/ldm3d:0.1.0-cuda
  - image: redis:7.4-alpine
"""


def volume() -> np.ndarray:
    """A ball, which is brain enough."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    return np.clip(1 - np.linalg.norm(grid, axis=0), 0, 1).astype(np.float32)


def nifti(values: np.ndarray, dtype: Any = np.float32) -> bytes:
    image = nib.nifti1.Nifti1Image(values.astype(np.float32), np.eye(4))
    image.set_data_dtype(dtype)
    return gzip.compress(image.to_bytes())


class Faulty(ThreadingHTTPServer):
    """A service that answers as ours does, but for what `answers` says; `{path: (status, content)}`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.brain = nifti(volume())
        self.answers: dict[str, tuple[int, Any]] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, allowed: bool) -> tuple[int, Any]:
        file = {"name": "synimg_1_0.nii.gz", "sha256": hashlib.sha256(self.brain).hexdigest()}
        job = {"id": "j", "state": "done", "error": None, "request": {"model": "demo"}, "version": "1"}
        normal: dict[str, tuple[int, Any]] = {
            "/health": (200, {"status": "alive"}),
            "/ready": (200, {"ready": True}),
            "/openapi.json": (200, {"info": {"version": "0.1.0"}}),
            "/metrics": (200, "# HELP\n" + "".join(f"{name} 1\n" for name in METRICS)),
            "/v1/jobs": (200, []) if allowed else (401, {}),
            "/v1/samples": (202, job | {"state": "queued"}),
            "/v1/jobs/j": (200, job | {"files": [file]}),
            "/v1/jobs/j/files/synimg_1_0.nii.gz": (200, self.brain),
            "/v1/models": (200, {"models": [{"name": "demo", "versions": [{"version": "1", "shape": SHAPE}]}]}),
        }
        return self.answers.get(path, normal[path])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Faulty)
        if size := int(self.headers.get("Content-Length", 0)):
            self.rfile.read(size)
        status, content = self.server.answer(self.path, self.headers.get("Authorization") == f"Bearer {KEY}")
        body = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Faulty]:
    service = Faulty()
    yield service
    service.shutdown()
    service.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke_test, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(roll_out, "WATCH_PAUSE_SECONDS", 0.01)


# The smoke test.


def smoke(url: str, monkeypatch: pytest.MonkeyPatch, *more: str, key: str = KEY) -> int:
    monkeypatch.setattr(sys, "argv", ["smoke_test", url, "--seconds", "1", *more])
    monkeypatch.setenv("SMOKE_TEST_KEY", key)
    return smoke_test.main()


def test_a_service_that_works(
    served: Faulty, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke(served.url + "/", monkeypatch, "--version", "0.1.0") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok: alive",
        "ok: ready",
        "ok: version 0.1.0",
        "ok: metrics",
        "ok: nobody enters without a key",
        "ok: synimg_1_0.nii.gz whole",
        "ok: a brain of 12 x 16 x 12 voxels",
    ]


FAILED_JOB = {"id": "j", "state": "failed", "error": "no memory", "request": {"model": "demo"}, "version": "1"}


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/health", (500, "oh"), "/health: answers 500 instead of 200: oh"),
        ("/health", (200, "<html>"), "/health: answers no JSON"),
        ("/ready", (503, '{"ready": false}'), '/ready: answers 503 instead of 200: {"ready": false}'),
        ("/openapi.json", (200, {"info": {"version": "0.0.9"}}), "version 0.0.9: instead of 0.1.0"),
        ("/metrics", (200, "\nldm3d_workers 1\n"), "metrics: without ldm3d_http_requests_total, ldm3d_queue_jobs"),
        ("/v1/jobs", (200, []), "/v1/jobs: answers 200 instead of 401: []"),
        ("/v1/samples", (429, "full"), "/v1/samples: answers 429 instead of 202: full"),
        ("/v1/jobs/j", (200, FAILED_JOB), "job j: failed: no memory"),
        ("/v1/jobs/j", (200, FAILED_JOB | {"state": "running"}), "job j: still running"),
        ("/v1/jobs/j/files/synimg_1_0.nii.gz", (200, b"x"), "synimg_1_0.nii.gz whole: damaged on its way"),
    ],
)
def test_a_service_that_does_not(
    path: str,
    answer: tuple[int, Any],
    said: str,
    served: Faulty,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served.answers[path] = answer
    assert smoke(served.url, monkeypatch, "--version", "0.1.0") == 1
    assert capsys.readouterr().err == f"failed: {said}\n"


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke("http://127.0.0.1:9", monkeypatch) == 1
    assert "failed: /health: no answer: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        smoke("ftp://x", monkeypatch)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_brain_is_a_brain_however_it_is_stored(dtype: Any) -> None:
    assert brain_problem(nifti(volume(), dtype), SHAPE) == ""


def with_hole(values: np.ndarray) -> np.ndarray:
    values[3, 3, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: nifti(volume()[:-1]), "has 11 x 16 x 12 voxels"),
        (lambda: nifti(np.zeros(SHAPE)), "is empty: spread 0.000, 0% of it brighter than the background"),
        (lambda: nifti(np.full(SHAPE, 0.7)), "is empty"),
        (lambda: nifti(0.9 + 0.1 * volume()), "100% of it brighter"),
        (lambda: nifti(with_hole(volume())), "has intensities beyond 0 and 1"),
        (lambda: nifti(volume() * 2), "has intensities beyond 0 and 1"),
        (lambda: nifti(volume())[:-200], "cannot be read"),
        (lambda: b"<html>", "cannot be read"),
        (lambda: gzip.compress(b"short"), "cannot be read"),
        (lambda: gzip.compress(gzip.decompress(nifti(volume()))[:-40]), f"has {12 * 16 * 12 - 10} values"),
        (lambda: gzip.compress(b"\0" * 4000), "no NIfTI file of this service"),
    ],
)
def test_what_is_no_brain(content: Callable[[], bytes], said: str) -> None:
    assert said in brain_problem(content(), SHAPE)


# A cluster that remembers what it is told.

KUBECTL = f"""#!{sys.executable} -S
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
state = json.loads((here / "state.json").read_text())
words = [word for word in sys.argv[1:] if word not in ("--namespace", "ldm3d")]
with open(here / "calls.txt", "a") as calls:
    print(*words, file=calls)
if " ".join(words).startswith(tuple(state["refused"])):
    sys.exit("error: refused")
if words[:2] == ["get", "deployments"]:
    items = [dict(metadata=dict(name=name, annotations={{"deployment.kubernetes.io/revision": str(revision)}}))
             for name, revision in state["revisions"].items()]
    print(json.dumps(dict(items=items)))
elif words[:2] == ["get", "pods"]:
    statuses = [dict(restartCount=state["restarts"].pop(0) if len(state["restarts"]) > 1 else state["restarts"][0])]
    print(json.dumps(dict(items=[dict(metadata=dict(name="ldm3d-api-0"), status=dict(containerStatuses=statuses))])))
elif words[0] == "exec" and "create" in words:
    print("k3v9x0ab\\n{KEY}")
elif words[0] == "kustomize":
    print(state["manifest"])
elif words[0] == "port-forward":
    print("Forwarding from 127.0.0.1:%d -> 8000" % state["port"], flush=True)
    time.sleep(60)
elif words[:2] == ["rollout", "undo"]:
    state["revisions"][words[2].split("/")[1]] += 1
(here / "state.json").write_text(json.dumps(state))
"""
NOW = {"ldm3d-worker": 4, "ldm3d-monitor": 2, "ldm3d-api": 7, "ldm3d-redis": 1}


class Cluster:
    def __init__(self, folder: Path, port: int):
        self.folder = folder
        self.state: dict[str, Any] = {"revisions": NOW, "restarts": [0], "port": port, "refused": ["-"]}
        self.set(manifest=MANIFEST)
        (folder / "kubectl").write_text(KUBECTL)
        (folder / "kubectl").chmod(0o755)

    def set(self, **changes: Any) -> None:
        self.state |= changes
        (self.folder / "state.json").write_text(json.dumps(self.state))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, served: Faulty, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return Cluster(tmp_path / "bin", served.server_port)


def rolled(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["roll_out", *map(str, words)])
    return roll_out.main()


def test_check_makes_a_key_and_takes_it_away(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert rolled(monkeypatch, "check", "--version", "0.1.0", "--watch", 0.05) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"::add-mask::{KEY}\n") and out.count(KEY) == 1
    assert out.endswith("ok: well for 0.05 s\n")
    keys = "exec deployment/ldm3d-worker -- python -m mlops.api.keys"
    assert cluster.calls[0] == f"{keys} create --name smoke test --role operator --days 1"
    assert cluster.calls[-1] == f"{keys} revoke abcd1234"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"restarts": [0, 0, 1]}, "ldm3d-api-0: started again within 5 s"),
        ({"refused": ["exec"]}, "kubectl exec deployment/ldm3d-worker: error: refused"),
        ({"refused": ["port-forward"]}, "kubectl port-forward service/ldm3d-api: ended"),
        ({"port": 9}, "/health: no answer"),
    ],
)
def test_check_fails(
    fault: dict[str, Any], said: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cluster.set(**fault)
    assert rolled(monkeypatch, "check", "--watch", 5) == 1
    assert f"failed: {said}" in capsys.readouterr().err
    assert "revoke" in cluster.calls[-1] or "refused" in said


def test_check_sees_a_service_that_falls_ill_later(
    cluster: Cluster, served: Faulty, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = roll_out.restarts
    monkeypatch.setattr(roll_out, "restarts", lambda: served.answers.update({"/ready": (503, "ill")}) or real())
    assert rolled(monkeypatch, "check", "--watch", 5) == 1
    assert "failed: /ready: answers 503" in capsys.readouterr().err


def test_back_goes_to_the_revisions_of_before_and_to_no_others(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert rolled(monkeypatch, "remember", tmp_path / "before.json") == 0
    assert rolled(monkeypatch, "back", tmp_path / "before.json") == 0
    assert "nothing to undo" in capsys.readouterr().out
    cluster.set(revisions=NOW | {"ldm3d-worker": 5, "ldm3d-api": 9, "ldm3d-redis": 2})
    assert rolled(monkeypatch, "back", tmp_path / "before.json") == 0
    assert [call for call in cluster.calls if call.startswith("rollout")] == [
        "rollout undo deployment/ldm3d-worker --to-revision=4",
        "rollout undo deployment/ldm3d-api --to-revision=7",
        "rollout status deployment/ldm3d-worker --timeout=15m",
        "rollout status deployment/ldm3d-api --timeout=15m",
    ]


def test_back_where_it_cannot(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "before.json").write_text(json.dumps({"ldm3d-worker": 4}))
    assert rolled(monkeypatch, "back", tmp_path / "before.json") == 1
    assert "ldm3d-monitor, ldm3d-api: there was none before" in capsys.readouterr().err
    (tmp_path / "before.json").write_text(json.dumps(NOW | {"ldm3d-api": 6}))
    cluster.set(refused=["rollout status"])
    assert rolled(monkeypatch, "back", tmp_path / "before.json") == 1
    for text in ("", "[]", '{"a": "b"}'):
        (tmp_path / "before.json").write_text(text)
        with pytest.raises(roll_out.ConfigError, match="nothing that `remember` wrote"):
            rolled(monkeypatch, "back", tmp_path / "before.json")


@pytest.fixture
def applied(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for setup_kubernetes.sh leaves what it was told to apply."""
    (tmp_path / "setup.sh").write_text(f'[[ $1 == apply ]] && cat "$2"/*.yaml >{tmp_path}/applied.yaml\n')
    monkeypatch.setattr(roll_out, "SETUP", tmp_path / "setup.sh")
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay/kustomization.yaml").touch()
    return tmp_path / "applied.yaml"


def test_apply_puts_digests_in_the_place_of_tags(applied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rolled(monkeypatch, "apply", "--overlay", applied.parent / "overlay", "--image", IMAGE, "--image", CUDA) == 0
    images = [line.split("image: ")[1] for line in applied.read_text().splitlines() if "image: " in line]
    assert images == [IMAGE[4:], IMAGE[4:], CUDA[5:], "redis:7.4-alpine"]


def test_apply_where_it_cannot(applied: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    overlay = ("apply", "--overlay", applied.parent / "overlay")
    for image in (IMAGE[:-1], "ldm3d", IMAGE + " --x", IMAGE.replace("cpu", "tpu"), IMAGE):
        with pytest.raises(roll_out.ConfigError, match=r"must be cpu or cuda|and no --image says what that is"):
            rolled(monkeypatch, *overlay, "--image", image)
    with pytest.raises(roll_out.ConfigError, match="no folder with a kustomization"):
        rolled(monkeypatch, "apply", "--overlay", "nowhere", "--image", IMAGE)
    cluster.set(manifest="kind: Namespace")
    with pytest.raises(roll_out.ConfigError, match="has none of our images"):
        rolled(monkeypatch, *overlay, "--image", IMAGE)
    cluster.set(manifest=MANIFEST)
    assert not applied.exists()
    (applied.parent / "setup.sh").write_text("exit 1")
    assert rolled(monkeypatch, *overlay, "--image", IMAGE, "--image", CUDA) == 1
    assert "not everything started" in capsys.readouterr().err


def test_nothing_but_python_is_needed() -> None:
    """Where a deployment's credentials are, nothing is installed: -S leaves out what is."""
    for module in ("smoke_test", "roll_out"):
        line = [sys.executable, "-S", "-m", f"mlops.deployment.{module}", "--help"]
        assert subprocess.run(line, cwd=ROOT, capture_output=True, check=False).returncode == 0
