"""ldm3d.mlflow_tracking against a real MLflow server; skipped where MLflow is not installed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scripts import STEPS_PER_EPOCH, Desk, Result
from test_scripts import SECTION, STAGE_1, STAGE_2, both_stages, card, events, give_autoencoder, require_same_training

from ldm3d import distributed
from ldm3d.errors import ConfigError
from ldm3d.files import sha256
from ldm3d.mlflow_tracking import ALIAS, MlflowRun
from ldm3d.schema import Config

mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow")
from mlflow import MlflowClient  # noqa: E402

Run = Callable[..., Result]
EXPERIMENT = "--set=tracking.mlflow_experiment="


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server with sqlite and a folder for artifacts."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'store.db'}",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port), *store]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # nothing of it is to be kept, and it takes its time to stop
        process.wait(30)


def wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture
def client(server: str) -> Any:
    return MlflowClient(server, server)


class Line:
    """A way to the server that can be cut: at once, or after so many pieces of requests have gone along it."""

    def __init__(self, server: str):
        self.target = int(server.rpartition(":")[2])
        self.up, self.allowed, self.asked = True, 10**6, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self.listener.accept()
            self.asked += 1
            if not self.up or self.allowed < 1:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            for one, other, cost in ((near, far, 1), (far, near, 0)):
                threading.Thread(target=self._copy, args=(one, other, cost), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket, cost: int) -> None:
        try:
            while (data := one.recv(65536)) and self.up and self.allowed >= cost:
                self.allowed -= cost
                other.sendall(data)
        except OSError:
            pass
        finally:
            for end in (one, other):
                end.close()


@pytest.fixture
def line(server: str) -> Line:
    return Line(server)


def config(uri: str, **tracking: Any) -> Config:
    return tiny.config(tracking={"mlflow_uri": uri, **tracking})


def begun(cfg: Config, folder: Path, resume: bool = False) -> MlflowRun:
    run = MlflowRun.begin(cfg, folder, "diffusion", resume, dry_run=False)
    assert run
    return run


def history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


# ---------------------------------------------------------------- trainings


@both_stages
def test_a_training_stands_on_the_server(
    script: str, server: str, client: Any, trained: Desk, desk: Desk, run: Run, tmp_path: Path
) -> None:
    give_autoencoder(desk, trained, script)
    stage = script.removeprefix("train_").removesuffix(".py")
    desk.write_config(tracking={"mlflow_uri": server, "mlflow_experiment": stage, "mlflow_model": "brains"})
    done = run(script)
    assert done.code == 0 and f"MLflow model 'brains-{stage}', version 1, is its {ALIAS} now" in done.stderr, (
        done.stderr
    )
    require_same_training(desk, trained, script)

    (found,) = client.search_runs([client.get_experiment_by_name(stage).experiment_id])
    run_id = found.info.run_id
    assert (found.info.status, found.data.tags["stage"]) == ("FINISHED", stage)
    params = found.data.params
    assert (params[f"{SECTION[script]}.lr"], params["spacing"], params["NoiseScheduler.type"]) == (
        *("0.001", "[6.0, 6.0, 6.0]", "rflow"),
    )
    for folder in (desk.runs / stage, desk.runs / stage / "by_volumes"):
        shown = events(folder)
        for name in shown.Tags()["scalars"]:
            in_tensorboard = [(event.step, event.value) for event in shown.Scalars(name)]
            np.testing.assert_allclose(history(client, run_id, name), in_tensorboard, rtol=1e-6, err_msg=name)
    assert "by_volumes/train_loss" in found.data.metrics and "performance/peak_gib" in found.data.metrics

    pictures = [path.path for path in client.list_artifacts(run_id, "images") if path.path.endswith(".png")]
    assert len(pictures) == (4 if script == STAGE_1 else 2)
    files = {STAGE_1: ("autoencoder", "discriminator"), STAGE_2: ("autoencoder", "diffusion_unet")}[script]
    version = client.get_model_version_by_alias(f"brains-{stage}", ALIAS)
    assert version.run_id == run_id
    mlflow.set_tracking_uri(server)
    folder = tmp_path / "downloaded"
    mlflow.artifacts.download_artifacts(f"models:/brains-{stage}@{ALIAS}", dst_path=str(folder))
    assert {path.name for path in folder.iterdir()} == {f"{name}.safetensors" for name in files}
    for path in folder.iterdir():
        assert path.read_bytes() == (desk.model / path.name).read_bytes()
    published = desk.model / ("autoencoder.safetensors" if script == STAGE_1 else "diffusion_unet.safetensors")
    assert version.tags["sha256"] == sha256(published) and version.tags["step"] == str(card(published)["step"])


def test_interrupted_and_resumed_is_one_run_and_one_version(
    server: str, client: Any, desk: Desk, trained: Desk, run: Run
) -> None:
    give_autoencoder(desk, trained, STAGE_2)
    desk.write_config(tracking={"mlflow_uri": server, "mlflow_experiment": "resumed", "mlflow_model": "resumed"})
    assert run(STAGE_2, faults=[("signal_at_step", "SIGINT", STEPS_PER_EPOCH + 1)]).code == 130
    experiment = client.get_experiment_by_name("resumed").experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.status == "KILLED" and not client.search_registered_models("name = 'resumed-diffusion'")
    for _ in range(2):  # the second time there is nothing left to do
        done = run(STAGE_2, "--resume", "--log-json")
        assert done.code == 0, done.stderr
        assert all(json.loads(line) for line in done.stderr.splitlines())
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED"
    steps = [step for step, _ in history(client, found.info.run_id, "train/loss")]
    assert steps == [STEPS_PER_EPOCH * epoch for epoch in range(1, 5)]
    assert len(client.search_model_versions("name = 'resumed-diffusion'")) == 1
    require_same_training(desk, trained, STAGE_2)


def test_a_server_that_goes_away_ends_no_training(line: Line, desk: Desk, trained: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, STAGE_2)
    desk.write_config(tracking={"mlflow_uri": line.uri, "mlflow_experiment": "cut"})
    line.allowed = 12  # a run is begun with fewer pieces, the values of four epochs need more
    done = run(STAGE_2)
    assert done.code == 0 and line.allowed == 0, done.stderr
    warnings = [said for said in done.stderr.splitlines() if said.startswith("warning:")]
    assert len(warnings) == 3 and "does not take what it is sent" in warnings[0], done.stderr
    assert "the weights did not reach MLflow" in warnings[1]
    assert re.search(r"[1-9]\d* values and [1-9]\d* pictures did not reach MLflow", warnings[2])
    require_same_training(desk, trained, STAGE_2)


def test_a_server_that_is_not_there_is_said_before_the_work(desk: Desk, trained: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, STAGE_2)
    done = run(STAGE_2, f"--set=tracking.mlflow_uri=http://127.0.0.1:{free_port()}")
    assert done.code == 2, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: tracking.mlflow_uri http://127.0.0.1") and "tracking.mlflow_uri=null" in said
    assert {path.name for path in desk.model.iterdir()} == {"autoencoder.safetensors", "split.json"}


def test_a_dry_run_leaves_no_run(server: str, client: Any, desk: Desk, trained: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, STAGE_2)
    done = run(STAGE_2, "--dry-run", f"--set=tracking.mlflow_uri={server}", "--set=tracking.mlflow_experiment=dry")
    assert done.code == 0 and "dry run" in done.stderr, done.stderr
    assert client.get_experiment_by_name("dry") is None


# ---------------------------------------------------------------- one run


def test_metrics_wait_until_the_server_answers_again(
    line: Line, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldm3d.mlflow_tracking.SECONDS_BEFORE_RETRY", 0.0)
    monkeypatch.setattr("ldm3d.mlflow_tracking.LARGEST_SHARE", float("inf"))
    run = begun(config(line.uri, mlflow_experiment="waiting"), tmp_path)
    run.metrics([({"train/loss": 4.0}, 1)])
    line.up = False
    run.metrics([({"train/loss": 3.0}, 2)])
    run.metrics([({"train/loss": 2.0}, 3)])
    run.image("picture", np.zeros((1, 8, 8), np.float32), 3)
    line.up = True
    run.metrics([({"train/loss": 1.0}, 4)])
    run.close(None)
    assert history(client, run.run_id, "train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in said[1:]] == [
        f"warning: MLflow at {line.uri} does not take what it is sent",
        f"MLflow at {line.uri} answers again",
        f"warning: 0 values and 1 pictures did not reach MLflow at {line.uri}; TensorBoard's files have them",
    ]


def test_a_server_that_is_away_is_not_asked_all_the_time(line: Line, tmp_path: Path) -> None:
    run = begun(config(line.uri, mlflow_experiment="asked"), tmp_path)
    line.up = False
    run.metrics([({"train/loss": 4.0}, 1)])
    before = line.asked
    for step in range(100):
        run.metrics([({"train/loss": 4.0}, step)])
    assert line.asked == before > 0


def test_a_resumed_training_begins_without_its_server(line: Line, client: Any, tmp_path: Path) -> None:
    cfg = config(line.uri, mlflow_experiment="later")
    first = begun(cfg, tmp_path)
    first.close(KeyboardInterrupt)
    line.up = False
    run = begun(cfg, tmp_path, resume=True)
    run.metrics([({"train/loss": 4.0}, 1)])
    line.up = True
    run.close(ValueError)
    assert run.run_id == first.run_id and history(client, run.run_id, "train/loss") == [(1, 4.0)]
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_a_server_that_does_not_know_the_run_gets_a_new_one(server: str, client: Any, tmp_path: Path) -> None:
    (tmp_path / "diffusion_mlflow_run.txt").write_text("0" * 32)
    run = begun(config(server, mlflow_experiment="moved"), tmp_path, resume=True)
    run.metrics([({"train/loss": 4.0}, 1)])
    assert (tmp_path / "diffusion_mlflow_run.txt").read_text() == f"{run.run_id}\n" != "0" * 32
    assert history(client, run.run_id, "train/loss") == [(1, 4.0)]


def test_more_metrics_than_one_request_takes(server: str, client: Any, tmp_path: Path) -> None:
    run = begun(config(server, mlflow_experiment="many"), tmp_path)
    run.metrics([({"train/loss": float(step)}, step) for step in range(1500)])
    assert len(client.get_metric_history(run.run_id, "train/loss")) == 1500


@pytest.mark.parametrize("model", ["published", None])
def test_each_new_weights_are_a_version(
    model: str | None, server: str, client: Any, tmp_path: Path, trained: Desk
) -> None:
    shutil.copytree(trained.model, tmp_path, dirs_exist_ok=True)
    run = begun(config(server, mlflow_experiment="published", mlflow_model=model), tmp_path)
    run.publish()
    (tmp_path / "diffusion_unet.safetensors").unlink()
    shutil.copy(tmp_path / "autoencoder.safetensors", tmp_path / "diffusion_unet.safetensors")
    run.publish()
    assert len(client.list_artifacts(run.run_id, "weights")) == 2
    assert len(client.search_model_versions(f"run_id = '{run.run_id}'")) == (2 if model else 0)
    if model:
        assert client.get_model_version_by_alias("published-diffusion", ALIAS).version == "2"


def test_other_ranks_have_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    cfg = config(f"http://127.0.0.1:{free_port()}")
    assert MlflowRun.begin(cfg, tmp_path, "diffusion", resume=False, dry_run=False) is None


def test_an_error_of_rank_0_ends_the_others_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda mine: ConfigError("rank 0 cannot begin"))
    with pytest.raises(ConfigError, match="rank 0 cannot begin"):
        MlflowRun.begin(config("http://127.0.0.1:1"), tmp_path, "diffusion", resume=False, dry_run=False)
