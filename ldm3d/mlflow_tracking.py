"""A training on an MLflow server: parameters, metrics, pictures, and the published weights as a model version."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ldm3d import __version__, distributed
from ldm3d.cards import AUTOENCODER, DISCRIMINATOR, UNET
from ldm3d.checkpoint import flat
from ldm3d.console import log
from ldm3d.errors import ConfigError
from ldm3d.files import sha256, write_text
from ldm3d.schema import Config

# A model version is all that its use needs: what stage 2 publishes samples by itself.
WEIGHTS = {"autoencoder": (AUTOENCODER, DISCRIMINATOR), "diffusion": (UNET, AUTOENCODER)}
"""Published files of each stage; the first one gives the version's digest and description."""
NOTES = {"autoencoder": "autoencoder_mlflow_run.txt", "diffusion": "diffusion_mlflow_run.txt"}
"""Where in `model_dir` each stage keeps its run's id."""
ALIAS = "candidate"
"""Moves to each new version. Not MLflow's `champion`: losses on latents of two autoencoders do not compare, so that a
version is best is for an evaluation or a person to say. `latest` is a word that MLflow keeps for itself."""

# MLflow's own patience, minutes for each call, would stop the training.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set where the environment does not say otherwise."""
SECONDS_BEFORE_RETRY, LARGEST_SHARE = 30.0, 0.05
"""A server that does not answer is asked again after this time, and takes at most this share of the training's."""
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000
"""Limits of MLflow for one request."""

Series = Sequence[tuple[Mapping[str, float], int]]


class MlflowRun:
    """One training's run, on rank 0. Once it has begun, nothing that happens to the server ends the training.

    Metrics that could not be sent wait until the server answers again; pictures do not.

    Args:
        client: `mlflow.MlflowClient`.
        cfg: gives the parameters, and names the experiment and the model.
        model_dir: with the published weights; keeps the run's id, for a resumed training.
        stage: "autoencoder" or "diffusion".
    """

    def __init__(self, client: Any, cfg: Config, model_dir: Path, stage: str):
        self.client, self.cfg, self.model_dir, self.stage = client, cfg, model_dir, stage
        self.uri, self.run_id = cfg.tracking.mlflow_uri, ""
        self.note = model_dir / NOTES[stage]
        self._unsent: list[Any] = []
        self._lost_pictures, self._next_attempt, self._away = 0, 0.0, False

    @classmethod
    def begin(cls, cfg: Config, model_dir: Path, stage: str, resume: bool, dry_run: bool) -> "MlflowRun | None":
        """Begin a run, or go on with that of a resumed training; None on other ranks and in a dry run.

        Raises:
            ConfigError: MLflow is not installed, or a new run cannot be begun. A resumed training begins nevertheless.
        """
        client, error, run = _client(cfg), None, None
        if distributed.is_main():
            try:
                run = cls(client, cfg, model_dir, stage)
                if dry_run:
                    client.search_experiments(max_results=1)
                elif not resume:
                    run._open()
                elif run.note.is_file():
                    run._attempt(lambda: None)
            except Exception as problem:  # each kind of server and store raises its own
                error = ConfigError(
                    f"tracking.mlflow_uri {cfg.tracking.mlflow_uri}: no run can be begun there "
                    f"({_reason(problem)}); start the server, or go without: --set tracking.mlflow_uri=null"
                )
        error = distributed.broadcast_object(error)
        if error:
            raise error
        return None if dry_run else run

    def metrics(self, series: Series) -> None:
        """Values by name, with the step (or what else the axis counts) of each."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._unsent += [
            Metric(name, float(value), now, step) for values, step in series for name, value in values.items()
        ]
        self._attempt(self._send_metrics)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """`picture` is (1, H, W) in [0, 1]."""
        grey = (255 * picture[0]).round().astype(np.uint8)
        if not self._attempt(lambda: self.client.log_image(self.run_id, grey, key=name, step=step)):
            self._lost_pictures += 1

    def publish(self) -> None:
        """At the end of a training: the published weights as artifacts, and as a new version of the model."""
        files = [path for name in WEIGHTS[self.stage] if (path := self.model_dir / name).is_file()]
        if files and not self._attempt(lambda: self._register(files), at_once=True):
            log(
                f"warning: the weights did not reach MLflow at {self.uri}; they are in {self.model_dir}, and the same "
                "command with --resume tries again"
            )

    def close(self, ended_by: type[BaseException] | None) -> None:
        """Send what waits, say what is lost, and tell the server how the training ended."""
        stopped = ended_by and issubclass(ended_by, KeyboardInterrupt | SystemExit)
        status = "KILLED" if stopped else "FAILED" if ended_by else "FINISHED"
        sent = self._attempt(self._send_metrics, at_once=True)
        if not (sent and self._attempt(lambda: self.client.set_terminated(self.run_id, status))) or self._lost_pictures:
            log(
                f"warning: {len(self._unsent)} values and {self._lost_pictures} pictures did not reach MLflow at "
                f"{self.uri}; TensorBoard's files have them"
            )

    def _attempt(self, send: Callable[[], object], at_once: bool = False) -> bool:
        """Whether `send` succeeded; it is not even tried for a while after the server did not answer."""
        start = time.monotonic()
        if start < self._next_attempt and not at_once:
            return False
        try:
            if not self.run_id:
                self._go_on()
            send()
        except Exception as problem:  # whatever it is, the training is worth more
            took = time.monotonic() - start
            self._next_attempt = start + took + max(SECONDS_BEFORE_RETRY, took / LARGEST_SHARE)
            if not self._away:
                log(
                    f"warning: MLflow at {self.uri} does not take what it is sent ({_reason(problem)}); training goes "
                    "on, metrics wait, pictures are left out"
                )
            self._away = True
            return False
        if self._away:
            log(f"MLflow at {self.uri} answers again")
        self._away, self._next_attempt = False, 0.0
        return True

    def _go_on(self) -> None:
        """Find the resumed training's run, or open one where the server has none."""
        from mlflow.exceptions import MlflowException

        run_id = self.note.read_text().strip() if self.note.is_file() else ""
        try:
            if run_id:
                self.client.update_run(run_id, status="RUNNING")
                self.run_id = run_id
                log(f"going on with MLflow run {run_id} at {self.uri}")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        if not self.run_id:
            self._open()

    def _open(self) -> None:
        from mlflow.entities import Param

        name = self.cfg.tracking.mlflow_experiment
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        title = f"{self.stage} {datetime.now(UTC):%Y-%m-%d %H:%M}"
        tags = {"stage": self.stage, "code_version": __version__}
        run_id = self.client.create_run(experiment, tags=tags, run_name=title).info.run_id
        settings = flat(self.cfg.model_dump(mode="json", by_alias=True))
        params = [Param(key, str(value)) for key, value in settings.items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=params[first : first + PARAMS_AT_ONCE])
        write_text(self.note, f"{run_id}\n")
        self.run_id = run_id
        log(f"MLflow run {title!r} ({run_id}) in experiment {name!r} at {self.uri}")

    def _send_metrics(self) -> None:
        while self._unsent:
            self.client.log_batch(self.run_id, metrics=self._unsent[:METRICS_AT_ONCE])
            del self._unsent[:METRICS_AT_ONCE]

    def _register(self, files: Sequence[Path]) -> None:
        """Upload; make a version of the model, unless the newest one already is this."""
        model, digest = self.cfg.tracking.mlflow_model, sha256(files[0])
        name = f"{model}-{self.stage}"
        if model and self._newest_digest(name) == digest:
            return
        for path in files:
            self.client.log_artifact(self.run_id, str(path), "weights")
        if not model:
            return
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(self.run_id).info.artifact_uri}/weights"
        tags = {"sha256": digest, **_described(files[0])}
        made = self.client.create_model_version(name, source, self.run_id, tags=tags, await_creation_for=0)
        version = made.version
        self.client.set_registered_model_alias(name, ALIAS, version)
        log(f"MLflow model {name!r}, version {version}, is its {ALIAS} now", event="registered", version=version)

    def _newest_digest(self, name: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            tags: dict[str, str] = self.client.get_model_version_by_alias(name, ALIAS).tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return tags.get("sha256")


def _client(cfg: Config) -> Any:
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError("tracking.mlflow_uri is set, but MLflow is not installed: pip install mlflow") from error
    return MlflowClient(cfg.tracking.mlflow_uri, cfg.tracking.mlflow_uri)


def _described(path: Path) -> dict[str, str]:
    """What the weights say of themselves and a search should find."""
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["ldm3d"])
    measures = {f"validation.{name}": f"{value:.6g}" for name, value in card["validation"].items()}
    return {name: str(card[name]) for name in ("step", "trained_on", "num_train")} | measures


def _reason(error: Exception) -> str:
    """The first line of what may be a page."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
