"""The curves of a whole training, from TensorBoard's event files to a small file that lies beside the pictures."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm3d.console import log
from ldm3d.errors import DataError
from ldm3d.files import write_text

STAGES = ("autoencoder", "diffusion")
GROUPS = ("train/", "validation/")
DIGITS = 6


def renew(run: Path, extract: Path) -> None:
    """Write the extract of a run, if there is one and it is whole; else leave the extract that is there."""
    if not all((run / stage).is_dir() for stage in STAGES):
        return
    curves = {stage: read(run / stage) for stage in STAGES}
    unfinished = [stage for stage in STAGES if num_epochs(curves[stage]) < curves[stage]["epochs"]]
    if unfinished:
        log(f"{run / unfinished[0]}: has not ended; the curves stay those of {extract.name}")
        return
    write_text(extract, as_text(curves))


def read(folder: Path) -> dict[str, Any]:
    """Settings and scalars of one stage.

    Returns:
        `run`: its folder; `began`, `ended`: times of the first and last event; `epochs`, `batch_size`,
        `max_grad_norm`, `steps_per_epoch`; `scalars`: name -> `steps` and `values`. Steps count from the stage's start.

    Raises:
        DataError: there are no events of a training.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 1})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag.startswith(GROUPS)}
    if "train/loss" not in scalars or "config/text_summary" not in events.Tags()["tensors"]:
        raise DataError(f"{folder}: has no events of a training; make some: make demo-scratch")
    config = config_of(events)
    train = config[f"{folder.name}_train"]
    times = [event.wall_time for curve in scalars.values() for event in curve]
    return {
        "run": f"runs/{folder.parent.name}",
        "began": _date(events.FirstEventTimestamp()),
        "ended": _date(max(times)),
        "epochs": train["max_epochs"],
        "batch_size": train["batch_size"] * train["accumulate_steps"],
        "max_grad_norm": train["max_grad_norm"],
        "steps_per_epoch": scalars["train/loss"][0].step,
        "scalars": {
            tag: {"steps": [e.step for e in curve], "values": [float(f"{e.value:.{DIGITS}g}") for e in curve]}
            for tag, curve in sorted(scalars.items())
        },
    }


def config_of(events: EventAccumulator) -> dict[str, Any]:
    """The configuration that the run has noted as text."""
    (text,) = events.Tensors("config/text_summary")[-1].tensor_proto.string_val
    config: dict[str, Any] = json.loads(text.decode().removeprefix("```json").removesuffix("```"))
    return config


def num_epochs(stage: dict[str, Any]) -> int:
    return len(stage["scalars"]["train/loss"]["steps"])


def as_text(curves: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    return re.sub(r"\[[^][]*\]", lambda found: json.dumps(json.loads(found[0])), json.dumps(curves, indent=1)) + "\n"


def _date(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")
