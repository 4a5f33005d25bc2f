"""What can happen to a running script, at a chosen place: signals, a kill, a full disk. See `warm.py`."""

import functools
import importlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any


def signal_at_step(name: str, step: int) -> None:
    """Signal the process group, as Ctrl-C in a terminal does, in the training step of this number, from 0."""
    from ldm3d.autoencoder_stage import AutoencoderStage
    from ldm3d.diffusion_stage import DiffusionStage

    for stage in (AutoencoderStage, DiffusionStage):
        _before(stage, "train_step", lambda _, batch, random, *more: random.step == step and _signal(name))


def lose_data_at_step(folder: str, step: int) -> None:
    """The disk with the data set and its cache goes away before the training step of this number."""
    from ldm3d.autoencoder_stage import AutoencoderStage

    def remove(_: Any, batch: Any, random: Any, *more: Any) -> None:
        if random.step == step:
            time.sleep(1)  # until the processes that load data have nothing left to do: they must miss it later
            shutil.rmtree(folder)

    _before(AutoencoderStage, "train_step", remove)


def validation_says(*losses: float) -> None:
    """Judge each validation by these losses instead of its own."""
    from ldm3d.autoencoder_stage import AutoencoderStage
    from ldm3d.diffusion_stage import DiffusionStage

    told = iter(losses)
    validate_1, validate_2 = AutoencoderStage.validate, DiffusionStage.validate

    def of_stage_1(stage: Any, loader: Any) -> Any:
        measures, shown = validate_1(stage, loader)
        return measures | {"l1": next(told)}, shown

    def of_stage_2(stage: Any, *more: Any) -> Any:
        return validate_2(stage, *more) | {"loss": next(told)}

    AutoencoderStage.validate, DiffusionStage.validate = of_stage_1, of_stage_2  # type: ignore[method-assign]


def kill_while_saving(number: int) -> None:
    """Die with one half of the training state written, at the save of this number, from 1."""
    import torch

    saved: list[Any] = []

    def die(state: Any, file: Any) -> None:
        saved.append(file)
        if len(saved) == number:
            file.write(b"half")
            file.flush()
            _signal("SIGKILL")

    _before(torch, "save", die)


def signal_at_call(name: str, target: str, number: int) -> None:
    """Signal the process group before call `number`, from 1, of `module:Class.method` or `module:function`."""
    _at_call(target, number, before=lambda: _signal(name))


def signal_after_call(name: str, target: str, number: int) -> None:
    """The same, when the call is done."""
    _at_call(target, number, after=lambda: _signal(name))


def die_at_step(step: int) -> None:
    """This process, of several, is killed in the training step of this number."""
    from ldm3d.autoencoder_stage import AutoencoderStage
    from ldm3d.diffusion_stage import DiffusionStage

    for stage in (AutoencoderStage, DiffusionStage):
        _before(
            stage,
            "train_step",
            lambda _, batch, random, *more: random.step == step and os.kill(os.getpid(), signal.SIGKILL),
        )


def hang_at_step(step: int) -> None:
    """This process, of several, stops answering in the training step of this number, and ends when it is told to."""
    from ldm3d.autoencoder_stage import AutoencoderStage

    def hang() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun would wait for half a minute before it kills it
        time.sleep(10_000)

    _before(AutoencoderStage, "train_step", lambda _, batch, random, *more: random.step == step and hang())


def note_each_encoded_volume() -> None:
    """Encoding notes each volume when it is done, not those of half a minute at once."""
    from ldm3d import encoding

    encoding.SECONDS_BETWEEN_MARKS = 0


def note_each_batch() -> None:
    """A shard notes its volumes after each batch, not those of half a minute at once."""
    from mlops.batch import shard

    shard.SECONDS_BETWEEN_RECORDS = 0


def kill_after(seconds: float) -> None:
    """Die so many seconds from now, wherever that may be."""
    timer = threading.Timer(seconds, lambda: _signal("SIGKILL"))
    timer.daemon = True
    timer.start()


def not_finite_at_step(step: int, where: str) -> None:
    """In the training step of this number the batch holds a NaN (`where` is "batch") or a weight is inf ("weight")."""
    import torch

    from ldm3d.autoencoder_stage import AutoencoderStage
    from ldm3d.diffusion_stage import DiffusionStage

    def spoil(stage: Any, batch: Any, random: Any, *more: Any) -> None:
        if random.step != step:
            return
        if where == "batch":
            batch["image" if "image" in batch else "latent"][0, 0, 3, 3, 3] = torch.nan
        else:
            network = stage.autoencoder if hasattr(stage, "autoencoder") else stage.unet
            weight = next(p for name, p in network.named_parameters() if ".conv1.conv.weight" in name)
            with torch.no_grad():
                weight[0] = torch.inf

    for stage in (AutoencoderStage, DiffusionStage):
        _before(stage, "train_step", spoil)


def float16_on_the_cpu(scale: float) -> None:
    """Autocast to float16 with loss scaling, as on a GPU without bfloat16, from this scale on."""
    import torch

    from ldm3d.training import Precision

    def prepare(precision: Any, amp: bool, device: Any) -> None:
        precision.device, precision.enabled, precision.dtype = device, amp, torch.float16
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=amp)

    Precision.__init__ = prepare  # type: ignore[method-assign]


def interrupt_while_preparing() -> None:
    """Ctrl-C while the data set is looked through."""
    from ldm3d import data

    _before(data, "split_cases", lambda *_: _signal("SIGINT"))


def interrupt_while_writing(number: int) -> None:
    """Ctrl-C with one half of a generated volume written, the one of this number, from 1."""
    import nibabel

    written: list[Any] = []

    def interrupt(image: Any, stream: Any) -> None:
        written.append(image)
        if len(written) == number:
            stream.write(image.to_bytes()[:1000])
            _signal("SIGINT")

    _before(nibabel.Nifti1Image, "to_stream", interrupt)


def full_disk(nbytes: int) -> None:
    """No file can grow beyond so many bytes: the system answers as it does where a disk is full."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def full_disk_while_saving(nbytes: int) -> None:
    """`full_disk` from the first time on that training state is saved."""
    import torch

    _before(torch, "save", lambda *_: full_disk(nbytes))


def _at_call(
    target: str, number: int, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    module, names = target.split(":")
    *owners, name = names.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            before()
        result = original(*args, **kwargs)
        if len(calls) == number:
            after()
        return result

    setattr(owner, name, wrapped)


def _signal(name: str) -> None:
    os.killpg(0, getattr(signal, name))


def _before(owner: Any, name: str, action: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
