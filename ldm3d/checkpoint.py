"""Training state for exact resume: everything that the next step depends on, in one file, written atomically."""

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


def save_state(path: Path, state: State) -> None:
    """Write `state` from rank 0; the previous file stays whole until the new one is.

    Raises:
        OutputError: the disk is full or the folder cannot be written; the previous file is intact.
    """
    if distributed.is_main():
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # torch's archive writer complains of what a full disk, the reason beneath, has left of its archive.
                reason = error.__context__
                raise reason if isinstance(reason, OSError) else OSError(str(error).splitlines()[0]) from error
    distributed.barrier()


def require_state(path: Path) -> None:
    """Refuse to resume from nothing. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no checkpoint to resume from; start without --resume")


def load_state(path: Path, fingerprint: State) -> State:
    """Read what `save_state` wrote, for the very same training.

    Args:
        path: the state file.
        fingerprint: what must not differ between the run that is resumed and this one.

    Raises:
        CheckpointError: there is nothing to resume from, it is damaged, or it is of another training.
    """
    require_state(path)
    try:
        state = read_pickled(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(state, dict) or "fingerprint" not in state:
        raise CheckpointError(f"{path}: is not a training state")
    was, now = _flat(state["fingerprint"]), _flat(fingerprint)
    different = [key for key, value in now.items() if was.get(key) != value]
    if different:
        shown = "; ".join(f"{key} was {was.get(key)!r}, is {now[key]!r}" for key in different)
        raise CheckpointError(f"{path}: belongs to another training: {shown}")
    log(f"resuming from {path}: epoch {state['epoch']}, step {state['step']}")
    return state


def _flat(values: State, place: str = "") -> State:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, so that a message names the very key."""
    flat: State = {}
    for key, value in values.items():
        flat |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return flat
