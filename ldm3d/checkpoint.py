"""Training state for exact resume: everything that the next step depends on, in one file, written atomically.

MODEL_DIR/autoencoder_last.pt        the newest state of stage 1 (diffusion_last.pt: of stage 2)
MODEL_DIR/autoencoder_last.1.pt      the one before it, used where the newest is damaged; and so on
"""

import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ldm3d import distributed
from ldm3d.console import log
from ldm3d.errors import CheckpointError, WeightsError
from ldm3d.files import atomic_path
from ldm3d.weights import read_pickled

State = dict[str, Any]
LAST = {"autoencoder": "autoencoder_last.pt", "diffusion": "diffusion_last.pt"}
"""Where in `model_dir` each stage keeps what it needs to be resumed."""


class Checkpoints:
    """The states of one training, the newest `keep_last` of them.

    Args:
        path: of the newest state.
        keep_last: how many are kept.
        every_minutes: time between two of them.
    """

    def __init__(self, path: Path, keep_last: int, every_minutes: float):
        self.path, self.every_seconds = path, 60 * every_minutes
        self.paths = [path, *(path.with_suffix(f".{age}{path.suffix}") for age in range(1, keep_last))]
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save, by this process's clock."""
        return time.monotonic() - self.saved_at >= self.every_seconds

    def exist(self) -> bool:
        return bool(self._found())

    def save(self, state: State) -> None:
        """Write `state` from rank 0, all ranks wait; whatever happens, the states before it stay whole.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        if distributed.is_main():
            write_state(self.path, state, self._make_room)
        distributed.barrier()
        self.saved_at = time.monotonic()

    def load(self, fingerprint: State) -> State:
        """The newest state that is whole, for the very same training.

        Args:
            fingerprint: what must not differ between the run that is resumed and this one.

        Raises:
            CheckpointError: there is nothing to resume from, all states are damaged, or they are of another training.
        """
        outcome: tuple[Path, State] | CheckpointError
        try:
            outcome = self._newest_whole()
        except CheckpointError as error:
            outcome = error
        # Heard from all, so that no process waits for one that has given up, nor goes on from another state.
        heard = distributed.gather_objects(outcome if isinstance(outcome, CheckpointError) else outcome[1]["step"])
        for failure in heard:
            if isinstance(failure, CheckpointError):
                raise failure
        if len(set(heard)) > 1:
            raise CheckpointError(
                f"{self.path}: the processes see states of different steps {heard}; model_dir must be a folder that "
                "all machines share"
            )
        assert not isinstance(outcome, CheckpointError)
        path, state = outcome
        _require_same(path, state["fingerprint"], fingerprint)
        log(f"resuming from {path}: epoch {state['epoch']}, step {state['step']}")
        return state

    def _newest_whole(self) -> tuple[Path, State]:
        found = self._found()
        if not found:
            raise CheckpointError(f"{self.path}: there is no checkpoint to resume from; start without --resume")
        if found[0] != self.path:
            log(f"warning: {self.path} is gone; the state before it is used")
        for path in found[:-1]:
            try:
                return path, read_state(path)
            except CheckpointError as error:
                log(f"warning: {error}; the state before it is used")
        return found[-1], read_state(found[-1])

    def clear(self) -> None:
        """Remove every state, on rank 0; all ranks wait."""
        if distributed.is_main():
            for path in self._found():
                path.unlink()
        distributed.barrier()

    def _found(self) -> list[Path]:
        """States that are there, the newest first; also those that a larger `keep_last` has left."""
        ages = {path: path.suffixes[-2][1:] for path in self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")}
        older = sorted((path for path, age in ages.items() if age.isdigit()), key=lambda path: int(ages[path]))
        return [path for path in (self.path, *older) if path.is_file()]

    def _make_room(self) -> None:
        """Number the states one older; what falls off the end is removed. Called when the new one is on the disk."""
        for path in self._found():
            if path not in self.paths[:-1]:
                path.unlink()
        for older, newer in zip(self.paths[:0:-1], self.paths[-2::-1], strict=True):
            with suppress(FileNotFoundError):
                newer.replace(older)


def write_state(path: Path, state: State, before: Callable[[], None] = lambda: None) -> None:
    """Write `state`, tensors, numbers and text in dictionaries and lists; the previous file stays until it is whole.

    Args:
        path: where to.
        state: what to write.
        before: called when the new file is whole, before it gets its name.

    Raises:
        OutputError: the disk is full or the folder cannot be written; the previous file is intact.
    """
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # torch's archive writer complains of what a full disk, the reason beneath, has left of its archive.
                reason = error.__context__
                raise reason if isinstance(reason, OSError) else OSError(str(error).splitlines()[0]) from error
        before()


def read_state(path: Path) -> State:
    """What `write_state` wrote, if it is whole. Raises `CheckpointError`."""
    try:
        state = read_pickled(path)
        # torch reads tensors without looking at their checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (WeightsError, zipfile.BadZipFile) as error:
        raise CheckpointError(str(error)) from error
    if damaged:
        raise CheckpointError(f"{path}: is damaged: the checksum of {damaged} is wrong")
    if not isinstance(state, dict) or "fingerprint" not in state:
        raise CheckpointError(f"{path}: is not a training state")
    return state


def _require_same(path: Path, was: State, now: State) -> None:
    was, now = flat(was), flat(now)
    different = [key for key, value in now.items() if was.get(key) != value]
    if different:
        shown = "; ".join(f"{key} was {was.get(key)!r}, is {now[key]!r}" for key in different)
        raise CheckpointError(f"{path}: belongs to another training: {shown}")


def flat(values: State, place: str = "") -> State:
    """Nested settings `{"a": {"b": 1}}` as `{"a.b": 1}`, by their very keys."""
    found: State = {}
    for key, value in values.items():
        found |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return found
