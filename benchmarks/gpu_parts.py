"""What the parts of `benchmarks.gpu` share: the card, the time that is left, rows, a step of ours on the device."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import steps
from benchmarks.measure import Timing, Work, interleaved, peak_on_gpu, table, write_result
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentStatistics
from ldm3d.randomness import StepRandom
from ldm3d.schema import Config

Rows = list[dict[str, Any]]


class Bench:
    """What all parts need, and the rows that they have given so far."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.networks = "tiny" if args.tiny else "32g"
        self.tiny: bool = args.tiny
        self.output = args.output
        self.deadline = time.monotonic() + 60 * args.minutes
        self.content: dict[str, Any] = {}

    def part(self, name: str, measure: Callable[["Bench"], Rows]) -> None:
        """Measure one part unless time is up; keep its rows, or why there are none."""
        start = time.monotonic()
        if start > self.deadline:
            rows: Rows = [{"skipped": "no time left"}]
        else:
            rows = guarded(lambda: measure(self))
        self.content[name] = rows
        self.content.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        print(f"\n{name} ({time.monotonic() - start:.0f} s)\n{table(rows)}", flush=True)
        write_result(self.output, self.content)
        free(self.device)

    def timings(self, works: dict[str, Work]) -> dict[str, Timing]:
        return interleaved(works, self.device, *((1, 0, 1) if self.tiny else (3, 3, 3)))


def guarded(measure: Callable[[], Rows]) -> Rows:
    """Rows, or one that says what went wrong: a card's time is too dear to lose the other parts."""
    try:
        return measure()
    except Exception as error:  # whatever a driver, a compiler or a lack of memory raises
        return [{"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}]


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def flags(tf32: bool | None = None, benchmark: bool | None = None) -> Iterator[None]:
    """torch's switches of TF32 and of cuDNN's search for the fastest kernel; None leaves one as it is."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    if tf32 is not None:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = tf32
    if benchmark is not None:
        backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before


def memory(bench: Bench, works: dict[str, Work]) -> dict[str, float]:
    if bench.device.type != "cuda":
        return {}
    return {f"{name} GiB": peak_on_gpu(work, bench.device) for name, work in works.items()}


def as_shipped(stage: Any) -> None:
    """Nothing is changed."""


def stepped(name: str, cfg: Config, device: torch.device, change: Callable[[Any], None]) -> Work:
    """A training step of ours on data that are on the device already."""
    if name == "autoencoder step":
        stage = AutoencoderStage(cfg, device, steps.TOTAL_STEPS)
        change(stage)
        train = cfg.autoencoder_train
        image = steps.volumes(train.batch_size, train.patch_size).to(device)
        batch = {"image": image, "case": [""]}
        return lambda: stage.train_step(batch, StepRandom(0, 0, len(image), device), stage.has_discriminator)
    diffusion = DiffusionStage(cfg, device, steps.TOTAL_STEPS, LatentStatistics(torch.zeros(1, 1, 1, 1), 1.0))
    change(diffusion)
    latents = torch.randn(cfg.diffusion_train.batch_size, *cfg.latent_shape, device=device)
    batch = {"latent": latents, "case": [""]}
    return lambda: diffusion.train_step(batch, StepRandom(0, 0, len(latents), device))
