"""score.py behind Azure ML's own inference server, in a network namespace of its own: it binds every address."""

import base64
import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import PYTHON, ROOT, need, run

SERVER = ROOT / ".venv-azure/bin/azmlinfsrv"
PORT = 5001
"""In a namespace of its own every port is free."""
SECONDS_TO_START = 180

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not SERVER.exists(), reason="no .venv-azure: make .venv-azure/run"),
]


class Endpoint:
    """The server, and requests to it from within its namespace.

    Args:
        folder: for its log.
        model: AZUREML_MODEL_DIR.
    """

    def __init__(self, folder: Path, model: Path, **environment: str):
        need("unshare", "ip", "nsenter", "curl")
        if os.geteuid():
            pytest.skip("a network namespace needs root")
        self.log = folder / "log"
        server = f"ip link set lo up && exec {SERVER} --entry_script mlops/deployment/score.py --model_dir {model}"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "-n", "sh", "-c", server],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def curl(self, *arguments: str, body: str = "") -> tuple[int, str]:
        """Status and body of an answer; 0 where nobody answers."""
        within = ["nsenter", "-t", str(self.process.pid), "-n", "curl", "-s", "-w", "\n%{http_code}", *arguments]
        said = run(*within, input=body)
        text, _, status = said.stdout.rpartition("\n")
        return int(status or 0), text

    def post(self, body: object) -> tuple[int, Any]:
        text = body if isinstance(body, str) else json.dumps(body)
        kind = "Content-Type: application/json"
        status, answer = self.curl("-H", kind, "--data-binary", "@-", f"http://127.0.0.1:{PORT}/score", body=text)
        return status, json.loads(answer)

    def wait(self) -> "Endpoint":
        """Until it is ready."""
        for _ in range(2 * SECONDS_TO_START):
            assert self.process.poll() is None, self.log.read_text()
            if self.curl(f"http://127.0.0.1:{PORT}/")[0] == 200:
                return self
            time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    # Azure ML puts the registered folder into another one.
    folder = tmp_path_factory.mktemp("score")
    shutil.copytree(ROOT / "checkpoints/demo", folder / "model/weights")
    served = Endpoint(folder, folder / "model", LDM3D_MAX_NUM="2")
    try:
        yield served.wait()
    finally:
        served.stop()


def test_a_brain_comes_out_as_inference_py_makes_it(endpoint: Endpoint, tmp_path: Path) -> None:
    status, answer = endpoint.post({"num": 2, "seed": 11, "steps": 3})
    assert status == 200, answer
    assert [volume["name"] for volume in answer["volumes"]] == ["synimg_11_0.nii.gz", "synimg_11_1.nii.gz"]
    command = [PYTHON, "inference.py", "-c", "config/config_demo.json", "-e", "config/environment_sample.json"]
    options = ["--num", "2", "--seed", "11", "--steps", "3", "--output", tmp_path]
    done = run(*command, *options, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for volume in answer["volumes"]:
        written = (tmp_path / volume["name"]).read_bytes()
        assert base64.b64decode(volume["data"]) == written
        beside = json.loads((tmp_path / volume["name"].replace(".nii.gz", ".json")).read_text())
        assert {**volume["sidecar"], "time": ""} == {**beside, "time": ""}
    assert len(gzip.decompress(written)) == 352 + 4 * 48 * 64 * 48


def test_the_whole_body_may_be_left_open(endpoint: Endpoint) -> None:
    status, answer = endpoint.post({"steps": 1, "dtype": "int16"})
    assert status == 200 and answer["volumes"][0]["name"] == "synimg_0_0.nii.gz"
    assert answer["volumes"][0]["sidecar"]["weights_sha256"]["diffusion_unet.safetensors"] == answer["model_sha256"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", 400, "Invalid JSON"),
        ("{", 400, "Invalid JSON"),
        ("[1]", 400, "should be an object"),
        ("null", 400, "should be an object"),
        ({"num": 0}, 400, "num: "),
        ({"num": 3}, 400, "num 3: at most 2"),
        ({"num": "2"}, 400, "num: "),
        ({"num": True}, 400, "num: "),
        ({"num": 1.5}, 400, "num: "),
        ({"seed": -1}, 400, "seed: "),
        ({"seed": 2**63}, 400, "seed: "),
        ('{"seed": NaN}', 400, ""),
        ({"steps": 0}, 400, "steps: "),
        ({"steps": 101}, 400, "steps 101: at most 100"),
        ({"steps": 10**30}, 400, "steps"),
        ({"scheduler": "ddim"}, 400, "sampled with rflow"),
        ({"scheduler": "magic"}, 400, "scheduler: "),
        ({"dtype": "float64"}, 400, "dtype: "),
        ({"Seed": 1}, 400, "Seed: "),
        ('{"seed": ' + "[" * 3000 + "}", 400, ""),
        (" " * 5000, 413, "at most 4096"),
    ],
)
def test_what_cannot_be_granted_is_refused_in_one_line(endpoint: Endpoint, body: object, status: int, message: str):
    found, answer = endpoint.post(body)
    assert found == status and message in answer["error"]
    assert "Traceback" not in answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 300


def test_a_model_that_is_not_there_fails_at_the_start(tmp_path: Path) -> None:
    served = Endpoint(tmp_path, tmp_path)
    try:
        assert served.process.wait(SECONDS_TO_START) != 0
        assert "holds 0 files diffusion_unet.safetensors" in served.log.read_text()
    finally:
        served.stop()
