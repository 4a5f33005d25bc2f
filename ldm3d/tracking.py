"""What a training leaves for its curves and pictures: TensorBoard's event files and, if asked for, MLflow's server."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from ldm3d import distributed
from ldm3d.errors import ConfigError, OutputError
from ldm3d.mlflow_tracking import MlflowRun
from ldm3d.profiling import StepProfiler
from ldm3d.schema import Config, Environment
from ldm3d.sections import Optimization

EVENT_VERSION = "brain.Event:2"
BY_VOLUMES = "by_volumes"
"""A run of its own in TensorBoard, whose axis counts volumes: the steps of two batch sizes do not compare."""


class EventFile:
    """TensorBoard's events of one run, in a file that is made when there is something to write.

    Every event is in the file when the call returns: what a killed run has said is not lost, and a full disk is an
    error of the call. (torch's `SummaryWriter` writes from a thread, which keeps events for minutes and dies with a
    traceback.)

    Args:
        folder: of the event files.

    Attributes:
        first_step: of a resumed run, to be set before it writes; what was written after it before is hidden.
    """

    def __init__(self, folder: Path):
        self.folder, self.first_step = folder, 0
        self._file: BinaryIO | None = None

    def add(self, content: Any, step: int = 0) -> None:
        """Write one summary. Raises `OutputError` where that cannot be."""
        try:
            if self._file is None:
                self._file = self._opened()
            self._write(Event(summary=content, step=step))
        except OSError as error:
            raise OutputError(f"{self.folder}: events cannot be written: {error.strerror or error}") from error

    def _opened(self) -> BinaryIO:
        """A new file, with a name that TensorBoard sorts by time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(self.folder / name, "ab")  # noqa: SIM115 (closed with the run)
        self._write(Event(file_version=EVENT_VERSION))
        if self.first_step:
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=self.first_step))
        return self._file

    def _write(self, event: Event) -> None:
        assert self._file is not None
        event.wall_time = time.time()
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # already reported, by the call that could not write
                self._file.close()


class Tracker:
    """Scalars, pictures and texts of one run, written by rank 0.

    Args:
        folder: of TensorBoard's event files; scalars by volumes seen go to the run `by_volumes` in it.
        volumes_per_step: on all processes together.
        profiler: of the training's steps.
        mlflow: gets the same, if given.
    """

    def __init__(self, folder: Path, volumes_per_step: int, profiler: StepProfiler, mlflow: MlflowRun | None = None):
        self.volumes_per_step, self.profiler, self.mlflow = volumes_per_step, profiler, mlflow
        self._by_step, self._by_volumes = EventFile(folder), EventFile(folder / BY_VOLUMES)

    def resume_at(self, step: int) -> None:
        """The next step has this number; what was written of it and later ones before is hidden."""
        self._by_step.first_step = step
        # Not `step * volumes_per_step`: a scalar's volumes are those of the steps before it, of which one is new.
        self._by_volumes.first_step = (step - 1) * self.volumes_per_step + 1

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Values by name at the end of `step` steps, as `group/name`. Raises `OutputError` on a full disk."""
        if not distributed.is_main():
            return
        volumes = step * self.volumes_per_step
        for name, value in values.items():
            self._by_step.add(summary.scalar(f"{group}/{name}", value), step)
            # Names of their own: TensorBoard would draw two axes into one chart.
            self._by_volumes.add(summary.scalar(f"{BY_VOLUMES}/{group}_{name}", value), volumes)
        if self.mlflow:
            by_step = {f"{group}/{name}": value for name, value in values.items()}
            by_volumes = {f"{BY_VOLUMES}/{group}_{name}": value for name, value in values.items()}
            self.mlflow.metrics([(by_step, step), (by_volumes, volumes)])

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """`picture` is (1, H, W) in [0, 1]."""
        if distributed.is_main():
            self._by_step.add(summary.image(name, picture, dataformats="CHW"), step)
            if self.mlflow:
                self.mlflow.image(name, picture, step)

    def text(self, name: str, text: str) -> None:
        if distributed.is_main():
            self._by_step.add(summary.text(name, text))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: BaseException | TracebackType | None) -> None:
        self._by_step.close()
        self._by_volumes.close()
        if self.mlflow:
            self.mlflow.close(kind)


@contextmanager
def open_tracker(
    cfg: Config,
    env: Environment,
    stage: str,
    device: torch.device,
    resume: bool = False,
    dry_run: bool = False,
    profile: int | None = None,
) -> Iterator[Tracker]:
    """The tracker of a training stage, with MLflow where `tracking.mlflow_uri` says so; at the end weights go there.

    Raises:
        ConfigError: MLflow is not installed, a new run cannot be begun on its server, or there are no steps to profile.
    """
    if dry_run and profile is not None:
        raise ConfigError("--profile excludes --dry-run and --replay, which make one step only")
    folder = env.tfevent_path / stage
    profiler = StepProfiler(profile, folder / "profile", device)
    train: Optimization = cfg.autoencoder_train if stage == "autoencoder" else cfg.diffusion_train
    mlflow = MlflowRun.begin(cfg, env.model_dir, stage, resume, dry_run) if cfg.tracking.mlflow_uri else None
    with Tracker(
        folder, train.batch_size * train.accumulate_steps * distributed.world_size(), profiler, mlflow
    ) as tracker:
        yield tracker
        if mlflow:
            mlflow.publish()
