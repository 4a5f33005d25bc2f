"""Settings that could make a GPU faster, one at a time, each timed in turn with ours as shipped."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_parts import Bench, Rows, as_shipped, flags, free, guarded, memory, stepped
from benchmarks.measure import Work, interleaved, synchronize
from benchmarks.sampling import sampler_of
from benchmarks.settings import settings
from ldm3d.networks import compile_blocks
from ldm3d.sampling import Sampler


def channels_last(stage: Any) -> None:
    for name in ("autoencoder", "discriminator", "unet"):
        if hasattr(stage, name):
            getattr(stage, name).to(memory_format=torch.channels_last_3d)


def compile_fixed(stage: Any) -> None:
    """As `compile_blocks`, but a graph for each shape instead of one for all."""
    for name in ("autoencoder", "unet"):
        if hasattr(stage, name) and stage.device.type == "cuda":
            compile_blocks(getattr(stage, name), dynamic=False)


Setting = tuple[list[str], Callable[[Any], None], dict[str, bool]]
COMMON: dict[str, Setting] = {
    "float32, no TF32": (["amp=false"], as_shipped, {"tf32": False}),
    "float32, TF32": (["amp=false"], as_shipped, {"tf32": True}),
    "cuDNN search off": ([], as_shipped, {"benchmark": False}),
    "channels_last_3d": ([], channels_last, {}),
    "compiled blocks": (["compile=true"], as_shipped, {}),
    "compiled blocks, channels_last_3d": (["compile=true"], channels_last, {}),
    "compiled blocks, fixed shapes": (["compile=false"], compile_fixed, {}),
    "not compiled": (["compile=false"], as_shipped, {}),
    "checkpointing": (["use_checkpointing=true", "compile=false"], as_shipped, {}),
}
AUTOENCODER_SETTINGS: dict[str, Setting] = COMMON
DIFFUSION_SETTINGS: dict[str, Setting] = COMMON | {
    "plain attention": (["diffusion_def.use_flash_attention=false"], as_shipped, {}),
    "twice the batch": (["diffusion_train.batch_size=6"], as_shipped, {}),
}


def one_by_one(bench: Bench, name: str, candidates: dict[str, Setting]) -> Rows:
    """Each setting by itself, in turn with ours as shipped; compiling is timed as the first step's extra."""
    shipped = settings(bench.networks)
    ours = stepped(name, shipped, bench.device, as_shipped)
    rows = []
    for label, candidate in candidates.items():
        if time.monotonic() > bench.deadline:
            rows.append({"setting": label, "skipped": "no time left"})
            continue
        (row,) = guarded(lambda c=candidate: [measured(bench, name, ours, c)])
        rows.append({"setting": label, **row})
        free(bench.device)
    return rows


def measured(bench: Bench, name: str, ours: Work, candidate: Setting) -> dict[str, Any]:
    overrides, change, switches = candidate
    with flags(**switches):
        work = stepped(name, settings(bench.networks, *overrides), bench.device, change)
        synchronize(bench.device)
        start = time.perf_counter()
        work()
        synchronize(bench.device)
        first = time.perf_counter() - start

    def switched() -> None:
        with flags(**switches):
            work()

    timings = bench.timings({"ours": ours, "changed": switched})
    row = {
        "s": timings["changed"].median,
        "shipped s": timings["ours"].median,
        "times as fast as shipped": timings["ours"].median / timings["changed"].median,
        "first step s": first,
    }
    return row | memory(bench, {"peak": switched})


def sampling_settings(bench: Bench) -> Rows:
    """Ten steps: each setting by itself."""
    cfg = settings(bench.networks)
    num = 2 if bench.tiny else 10
    shipped = sampler_of(cfg, bench.device)
    candidates: dict[str, Callable[[], Work]] = {
        "shipped": lambda: lambda: shipped.sample(0, [0], steps=num),
        "CUDA graph": lambda: graphed(sampler_of(cfg, bench.device), num),
        "channels_last_3d": lambda: last(sampler_of(cfg, bench.device), num),
        "compiled blocks": lambda: compiled(sampler_of(cfg, bench.device), num),
        "cuDNN search off": lambda: unsearched(shipped, num),
        "batch of 2": lambda: lambda: shipped.sample(0, range(2), steps=num),
        "batch of 4": lambda: lambda: shipped.sample(0, range(4), steps=num),
    }
    rows = []
    for name, build in candidates.items():
        count = int(name.removeprefix("batch of ")) if name.startswith("batch") else 1
        (row,) = guarded(lambda b=build, c=count: [sampled(bench, b(), c)])
        rows.append({"setting": name, **row})
        free(bench.device)
    return rows


def sampled(bench: Bench, work: Work, count: int) -> dict[str, Any]:
    synchronize(bench.device)
    start = time.perf_counter()
    work()
    synchronize(bench.device)
    first = time.perf_counter() - start
    timing = interleaved({"work": work}, bench.device, *((1, 0) if bench.tiny else (5, 1)))["work"]
    return {"s a volume": timing.median / count, "first s": first} | memory(bench, {"peak": work})


def last(sampler: Sampler, num: int) -> Work:
    for network in (sampler.unet, sampler.autoencoder):
        network.to(memory_format=torch.channels_last_3d)
    return lambda: sampler.sample(0, [0], steps=num)


def compiled(sampler: Sampler, num: int) -> Work:
    if sampler.device.type == "cuda":
        compile_blocks(sampler.unet)
        compile_blocks(sampler.autoencoder)
    return lambda: sampler.sample(0, [0], steps=num)


def unsearched(sampler: Sampler, num: int) -> Work:
    def work() -> None:
        with flags(benchmark=False):
            sampler.sample(0, [0], steps=num)

    return work


def graphed(sampler: Sampler, num: int) -> Work:
    """The network's evaluation captured once and replayed: no launch of a kernel by the CPU."""
    if sampler.device.type == "cuda":
        sampler.unet = Graphed(sampler.unet, sampler)
    return lambda: sampler.sample(0, [0], steps=num)


class Graphed(nn.Module):
    """A U-Net whose evaluation of one latent is a CUDA graph."""

    def __init__(self, unet: nn.Module, sampler: Sampler):
        super().__init__()
        self.latent = torch.randn(1, *sampler.card.latent_shape, device=sampler.device)
        self.timesteps = torch.full((1,), 500.0, device=sampler.device)

        def evaluate() -> Tensor:
            with torch.inference_mode(), sampler.precision.autocast():
                return unet(self.latent, timesteps=self.timesteps).float()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                evaluate()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = evaluate()

    def forward(self, latent: Tensor, timesteps: Tensor) -> Tensor:
        self.latent.copy_(latent)
        self.timesteps.copy_(timesteps)
        self.graph.replay()
        return self.result.clone()
