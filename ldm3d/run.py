"""A training run: how it starts, and what happens between two of its steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm3d import distributed
from ldm3d.checkpoint import Checkpoints
from ldm3d.errors import CheckpointError, ConfigError
from ldm3d.lock import only_writer
from ldm3d.progress import Position
from ldm3d.reference_profile import ReferenceProfile, write_profile
from ldm3d.rendezvous import begun_before, note_beginning
from ldm3d.schema import Config, Environment
from ldm3d.signals import Stopped, StopRequest
from ldm3d.tracking import Tracker


@dataclass
class Run:
    """What a training run stands on: its settings, its device, its tracker, its checkpoints.

    `fingerprint` says what must not differ when the run is resumed, `profile` what its training data are like; the
    script sets both when it knows its data.
    """

    cfg: Config
    env: Environment
    device: torch.device
    tracker: Tracker
    checkpoints: Checkpoints
    resume: bool
    init_from: Path | None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    profile: ReferenceProfile | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, `model_dir` is this run's alone, and a first Ctrl-C or SIGTERM is only noted.

        Raises:
            OutputError: another training is writing there.
        """
        with only_writer(self.env.model_dir), self.stop.noted():
            if not self.resume:
                self.checkpoints.clear()
            if distributed.is_main():
                note_beginning()
            yield

    def save(self, stage: Any, position: Position) -> None:
        self.checkpoints.save(position.state(stage.state_dict(), self.fingerprint))

    def publish_profile(self) -> None:
        """Write what the training data are like beside the weights that were published, from rank 0."""
        if self.profile and distributed.is_main():
            write_profile(self.env.model_dir, self.profile)

    def load(self, stage: Any, steps_per_epoch: int) -> Position:
        """Bring `stage` to where the newest checkpoint stands. Raises `CheckpointError`."""
        state = self.checkpoints.load(self.fingerprint)
        stage.load_state_dict(state["stage"])
        # What is at an epoch's last step and has not counted it will make, and log, its validation again.
        told = state["step"] == state["epoch"] * steps_per_epoch
        self.tracker.resume_at(state["step"] + told)
        return Position(state["epoch"], state["step"], state["best"])

    def pause(self, stage: Any, position: Position) -> None:
        """Between two steps: save where it is due; where any process was asked to stop, save and stop.

        Raises:
            Stopped: on all processes, when the state is on the disk.
        """
        asked, due = distributed.all_max([self.stop.signum, self.checkpoints.due()])
        if asked or due:
            self.save(stage, position)
        if asked:
            raise Stopped(int(asked))

    def begins_with_a_candidate(self, position: Position) -> bool:
        """Whether the weights that the run begins with are yet to be judged: given ones, before the first step.

        A state of step 0 can only be that of a run that was stopped while it judged them.
        """
        return position.step == 0 and (self.resume or self.init_from is not None)

    def going_on(self) -> bool:
        """Whether this process was not asked to stop; for what may be given up in the middle."""
        return not self.stop.signum


def how_to_start(checkpoints: Checkpoints, asked: str | None, init_from: Path | None, overwrite: bool) -> bool:
    """Whether to resume. What torchrun starts again resumes by itself, once the run has begun and has a checkpoint.

    Args:
        checkpoints: of the run's folder.
        asked: "always", "auto" (where there is a checkpoint), or None: do not resume.
        init_from: weights to start with.
        overwrite: what is there may be replaced.

    Raises:
        ConfigError: arguments contradict each other.
        CheckpointError: there is nothing to resume from, or a training that a fresh start would replace.
    """
    if asked == "auto" or begun_before():
        return checkpoints.exist()
    if asked and (init_from or overwrite):
        other = "--init-from" if init_from else "--overwrite"
        raise ConfigError(f"--resume and {other} exclude each other: going on needs no {other}, leave it out")
    if asked and not checkpoints.exist():
        raise CheckpointError(f"{checkpoints.path}: there is no checkpoint to resume from; start without --resume")
    if not asked and not overwrite and checkpoints.exist():
        raise CheckpointError(
            f"{checkpoints.path}: model_dir holds a training; go on with --resume, start anew with --overwrite, "
            "or take another model_dir"
        )
    return asked is not None
