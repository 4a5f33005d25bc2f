"""A step that met NaN or infinity: kept on disk, and made again where one can see where it began."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm3d import distributed
from ldm3d.checkpoint import read_state, write_state
from ldm3d.console import log
from ldm3d.errors import CheckpointError, NonFiniteLoss, OutputError
from ldm3d.randomness import StepRandom
from ldm3d.training import value_range

Batch = dict[str, Any]


@contextmanager
def kept_for_replay(folder: Path, stage: Any, batch: Batch, random: StepRandom, *more: Any) -> Iterator[None]:
    """Within, make one training step; if it meets `NonFiniteLoss`, keep what is needed to make it again.

    Of several processes those write a file whose own loss is not finite, and rank 0.

    Args:
        folder: where the file goes, `<stage>_step<N>_rank<R>.replay.pt`.
        stage: an `AutoencoderStage` or a `DiffusionStage`.
        batch: of the step.
        random: of the step.
        more: what else `train_step` is given.
    """
    try:
        yield
    except NonFiniteLoss as error:
        if distributed.is_main() or not torch.isfinite(torch.tensor(error.loss)):
            path = folder / f"{stage.name}_step{random.step}_rank{random.rank}.replay.pt"
            numbers = {"seed": random.seed, "step": random.step, "rank": random.rank}
            kept = {"stage": stage.state_dict(), "batch": batch, "random": numbers, "more": list(more)}
            try:
                write_state(path, {"fingerprint": {"stage": stage.name}, **kept})
                error.replay = str(path)
            except OutputError as full:
                log(f"warning: {full}; the step cannot be replayed")
        raise


def replay(path: Path, stage: Any) -> None:
    """Make the step again under torch's anomaly detection, and say where the first bad number appears.

    Args:
        path: a file that `kept_for_replay` has written.
        stage: a fresh one of the same configuration.

    Raises:
        CheckpointError: the file is missing, damaged, or of another stage or another network.
    """
    if not path.is_file():
        raise CheckpointError(f"--replay {path}: no such file")
    kept = read_state(path)
    if kept["fingerprint"] != {"stage": stage.name} or "random" not in kept:
        raise CheckpointError(f"--replay {path}: is not a step of {stage.name} training")
    try:
        stage.load_state_dict(kept["stage"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"--replay {path}: is of another network than the configuration describes") from error
    random = StepRandom(count=len(kept["batch"]["case"]), device=stage.device, **kept["random"])
    log(f"replaying step {random.step} on cases {', '.join(kept['batch']['case'])}")
    log(f"weights: {_state_of_weights(stage)}")
    with _first_bad_output(stage) as found, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                terms = stage.train_step(kept["batch"], random, *kept["more"])
            values = ", ".join(f"{name} = {float(value):g}" for name, value in terms.items())
            outcome = f"the step is finite here: {values}"
        except NonFiniteLoss as error:
            outcome = str(error)
        except RuntimeError as error:
            outcome = f"in the backward pass: {str(error).splitlines()[0]}"
            outcome += "".join(f"\n  {line}" for line in _forward_call(seen))
    log(f"forward pass: {found[0] if found else 'every output is finite'}")
    log(outcome)


def _state_of_weights(stage: Any) -> str:
    """Which are not finite; else how large the largest is, which tells a network that has diverged."""
    largest = {
        f"{network}.{name}": weight.detach().abs().max().item()
        for network, module in _networks(stage)
        for name, weight in module.named_parameters()
    }
    bad = [name for name, value in largest.items() if not math.isfinite(value)]
    if bad:
        return f"not finite in {', '.join(bad[:5])}"
    worst = max(largest, key=lambda name: largest[name])
    return f"all finite, the largest {largest[worst]:.4g} in {worst}"


@contextmanager
def _first_bad_output(stage: Any) -> Iterator[list[str]]:
    """Within, note the module whose output was the first one that is not finite, and whether its input was."""
    found: list[str] = []

    def look(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if not found and not all(_finite(value) for value in outputs):
            entered = "finite input" if all(_finite(value) for value in inputs) else "input that was not finite"
            found.append(f"{name} made the first output that is not finite, of {entered} ({value_range(inputs[0])})")

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=f"{network}.{name}": look(name, inputs, output))
        for network, whole in _networks(stage)
        for name, module in whole.named_modules()
        if not list(module.children())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _networks(stage: Any) -> list[tuple[str, nn.Module]]:
    return [(name, value) for name, value in vars(stage).items() if name in ("autoencoder", "discriminator", "unet")]


def _forward_call(seen: list[warnings.WarningMessage]) -> list[str]:
    """The lines, torch's own left out, that led to the operation whose gradient went bad."""
    text = "".join(str(warning.message) for warning in seen if "Traceback of forward call" in str(warning.message))
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    inside = str(Path(torch.__file__).parent)
    return [line for line in lines if inside not in line][-4:]
