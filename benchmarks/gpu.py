"""Everything that only a GPU can show, in one run of under 10 minutes on one card.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny        shows that it runs

On the networks of config_train_32g.json, with the tutorial's batches: the reference recipe against ours; each possible
setting switched by itself, timed in turn with ours as shipped; sampling; and whether the 16 and 32 GB configs fit under
a cap. Each part is written as soon as it is measured; one that fails says why and does not stop the others.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import steps
from benchmarks.measure import (
    GIB,
    Timing,
    Work,
    arguments,
    counted_flops,
    interleaved,
    peak_flops,
    peak_on_gpu,
    synchronize,
    table,
    write_result,
)
from benchmarks.reference import NUM_TIMESTEPS
from benchmarks.sampling import decode, reference_of, sampler_of
from benchmarks.settings import settings
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentStatistics
from ldm3d.networks import compile_blocks
from ldm3d.sampling import Sampler
from ldm3d.schema import Config

# Seconds at 40 % of the 800 TFLOP/s that an H100 does in bfloat16, from the counted work of each.
LIMITS = {"autoencoder step": 0.10, "diffusion step": 0.08, "sample, 10 steps": 0.12}
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
        return interleaved(works, self.device, *((1, 1, 1) if self.tiny else (3, 3, 3)))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu together with --tiny")
    parser.add_argument("--minutes", type=float, default=8, help="no part is begun later than this")
    bench = Bench(parser.parse_args())
    torch.backends.cudnn.benchmark = True  # as both recipes have it
    bench.part("peak", peaks)
    bench.part("recipes", recipes)
    bench.part("sampling", sampling)
    bench.part("fit", fit)
    bench.part("diffusion settings", lambda b: one_by_one(b, "diffusion step", DIFFUSION_SETTINGS))
    bench.part("autoencoder settings", lambda b: one_by_one(b, "autoencoder step", AUTOENCODER_SETTINGS))
    bench.part("sampling settings", sampling_settings)
    bench.part("where time goes", where_time_goes)


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


def peaks(bench: Bench) -> Rows:
    """What the card does at best, in TFLOP/s."""
    rows = []
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        with flags(tf32=tf32):
            rows.append({"TFLOP/s": name} | {k: v / 1e12 for k, v in peak_flops(bench.device, dtype).items()})
    return rows


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


def recipes(bench: Bench) -> Rows:
    """Both recipes, one step of each stage and one validation."""
    cfg, rows = settings(bench.networks), []
    for name, build in steps.WORKS.items():
        works = {"ours": build(cfg, bench.device, True), "reference": build(cfg, bench.device, False)}
        timings = bench.timings(works)
        flops = counted_flops(works["ours"])
        row: dict[str, Any] = {
            "what": name,
            "ours s": timings["ours"].median,
            "reference s": timings["reference"].median,
            "times as fast": timings["reference"].median / timings["ours"].median,
            "ours spread": f"{timings['ours'].fastest:.3g} to {timings['ours'].slowest:.3g}",
            "reference spread": f"{timings['reference'].fastest:.3g} to {timings['reference'].slowest:.3g}",
            "ours TFLOP": flops / 1e12,
            "ours TFLOP/s": flops / 1e12 / timings["ours"].median,
            "limit s": LIMITS.get(name),
            "time over limit": timings["ours"].median / LIMITS[name] if name in LIMITS else None,
        }
        rows.append(row | memory(bench, works))
        del works
        free(bench.device)
    return rows


def memory(bench: Bench, works: dict[str, Work]) -> dict[str, float]:
    if bench.device.type != "cuda":
        return {}
    return {f"{name} GiB": peak_on_gpu(work, bench.device) for name, work in works.items()}


# One setting at a time


def as_shipped(stage: Any) -> None:
    """Nothing is changed."""


def channels_last(stage: Any) -> None:
    for name in ("autoencoder", "discriminator", "unet"):
        if hasattr(stage, name):
            getattr(stage, name).to(memory_format=torch.channels_last_3d)


Setting = tuple[list[str], Callable[[Any], None], dict[str, bool]]
COMMON: dict[str, Setting] = {
    "float32, no TF32": (["amp=false"], as_shipped, {"tf32": False}),
    "float32, TF32": (["amp=false"], as_shipped, {"tf32": True}),
    "cuDNN search off": ([], as_shipped, {"benchmark": False}),
    "channels_last_3d": ([], channels_last, {}),
    "compiled blocks": (["compile=true"], as_shipped, {}),
    "compiled blocks, channels_last_3d": (["compile=true"], channels_last, {}),
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


def stepped(name: str, cfg: Config, device: torch.device, change: Callable[[Any], None]) -> Work:
    """A training step of ours on data that are on the device already."""
    if name == "autoencoder step":
        stage = AutoencoderStage(cfg, device, steps.TOTAL_STEPS)
        change(stage)
        train = cfg.autoencoder_train
        image = steps.volumes(train.batch_size, train.patch_size).to(device)
        batch = {"image": image, "case": [""]}
        return lambda: stage.train_step(batch, 0, stage.has_discriminator)
    diffusion = DiffusionStage(cfg, device, steps.TOTAL_STEPS, LatentStatistics(torch.zeros(1, 1, 1, 1), 1.0))
    change(diffusion)
    latents = torch.randn(cfg.diffusion_train.batch_size, *cfg.latent_shape, device=device)
    return lambda: diffusion.train_step(latents, 0, [""])


# Sampling


def sampling(bench: Bench) -> Rows:
    """A whole volume: 1000 steps of the reference, from its first 20, against ours in 30 and 10."""
    cfg = settings(bench.networks)
    sampler = sampler_of(cfg, bench.device)
    reference = reference_of(cfg, sampler, bench.device)
    latent = torch.randn(1, *cfg.latent_shape, device=bench.device)
    few = 2 if bench.tiny else 20
    works: dict[str, Work] = {
        "reference steps": lambda: reference.denoise(few),
        "reference decode": lambda: reference.decode(latent),
        "sample, 30 steps": lambda: sampler.sample(0, [0], steps=30),
        "sample, 10 steps": lambda: sampler.sample(0, [0], steps=10),
        "decode": lambda: decode(sampler, latent),
    }
    timings = interleaved(works, bench.device, 1 if bench.tiny else 3)
    decoding = timings["reference decode"].median
    whole = timings["reference steps"].median / few * NUM_TIMESTEPS + decoding
    rows = []
    for name in ("sample, 30 steps", "sample, 10 steps", "decode"):
        other, own = decoding if name == "decode" else whole, timings[name].median
        row = {"what": name, "ours s": own, "reference s": other, "times as fast": other / own}
        if name in LIMITS:
            flops = counted_flops(works[name])
            row |= {"ours TFLOP": flops / 1e12, "limit s": LIMITS[name], "time over limit": own / LIMITS[name]}
        rows.append(row | memory(bench, {"ours": works[name]}))
    return rows


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
    timing = interleaved({"work": work}, bench.device, 1 if bench.tiny else 5)["work"]
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


# Does it fit


def fit(bench: Bench) -> Rows:
    """One step of each stage of the 16 and 32 GB configs as they are, with no more memory than they name."""
    rows = []
    for name, gib in (("16g", 16), ("32g", 32)):
        cfg = settings("tiny" if bench.tiny else f"{name} as shipped")
        for step in ("autoencoder step", "diffusion step"):
            (row,) = guarded(lambda c=cfg, s=step, g=gib: [fitted(bench, c, s, g)])
            rows.append({"config": name, "what": step, **row})
            free(bench.device)
    return rows


def fitted(bench: Bench, cfg: Config, step: str, gib: int) -> dict[str, Any]:
    if bench.device.type != "cuda":
        stepped(step, cfg, bench.device, as_shipped)()
        return {"cap GiB": gib}
    total = torch.cuda.get_device_properties(bench.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), bench.device)
    try:
        work = stepped(step, cfg, bench.device, as_shipped)
        peak = peak_on_gpu(lambda: (work(), work()), bench.device)
        reserved = torch.cuda.max_memory_reserved(bench.device) / GIB
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    return {"cap GiB": gib, "allocated GiB": peak, "reserved GiB": reserved, "to spare": 1 - reserved / gib}


def where_time_goes(bench: Bench) -> Rows:
    """The operations that take most of a step of ours."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    rows: Rows = []
    for name in ("autoencoder step", "diffusion step"):
        work = stepped(name, settings(bench.networks), bench.device, as_shipped)
        work()
        with torch.profiler.profile(activities=activities) as profile:
            work()
            synchronize(bench.device)
        key = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
        # Operators only: what they launch is theirs.
        events = [event for event in events if event.key.startswith(("aten::", "triton", "Optimizer"))]
        total = sum(getattr(event, key) for event in events) or 1
        rows += [{"what": name, "operation": e.key, "share": getattr(e, key) / total} for e in events[:8]]
    return rows


if __name__ == "__main__":
    main()
