"""Everything that only a GPU can show, in one run of under 10 minutes on one card.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny        shows that it runs

On the networks of config_train_32g.json, with the tutorial's batches: the reference recipe against ours; each possible
setting switched by itself, timed in turn with ours as shipped; sampling; and whether the 16 and 32 GB configs fit under
a cap. Each part is written as soon as it is measured; one that fails says why and does not stop the others.
"""

from typing import Any

import torch

from benchmarks import steps
from benchmarks.gpu_parts import Bench, Rows, as_shipped, flags, free, guarded, memory, stepped
from benchmarks.gpu_settings import AUTOENCODER_SETTINGS, DIFFUSION_SETTINGS, one_by_one, sampling_settings
from benchmarks.measure import GIB, Work, arguments, counted_flops, interleaved, peak_flops, peak_on_gpu, synchronize
from benchmarks.reference import NUM_TIMESTEPS
from benchmarks.sampling import decode, reference_of, sampler_of
from benchmarks.settings import settings
from ldm3d.schema import Config

# Seconds at 40 % of the 800 TFLOP/s that an H100 does in bfloat16, from the counted work of each.
LIMITS = {"autoencoder step": 0.10, "diffusion step": 0.08, "sample, 10 steps": 0.12}


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
    timings = interleaved(works, bench.device, *((1, 0) if bench.tiny else (3, 2)))
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
