"""How time and memory grow on a CPU: with side, batch, number of volumes, processes; with the fitted exponents.

    python -m benchmarks.growth

An exponent of 1 is proportional. Sides count voxels, so steps cannot grow slower than with the side's third power.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import arguments, interleaved, peak_resident, table, write_result
from benchmarks.settings import CPU, settings
from benchmarks.steps import WORKS, Images, volumes
from ldm3d import distributed
from ldm3d.allocator import keep_freed_memory
from ldm3d.data import prepare_data
from ldm3d.latents import build_latent_cache
from ldm3d.networks import build_autoencoder
from ldm3d.phantom import write_dataset
from ldm3d.schema import Config, Environment

SECTIONS = {"autoencoder step": "autoencoder_train", "diffusion step": "diffusion_train"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.rank_of:
        one_rank(args.rank_of)
        return
    sides, batches, counts = ((16, 24), (1, 2), (2, 4)) if args.tiny else ((32, 48, 64), (2, 4, 8), (4, 8, 16))
    rows: list[dict[str, Any]] = []
    for name in SECTIONS:
        rows += [grown("side", name, sides, of_side, args.tiny), grown("batch", name, batches, of_batch, args.tiny)]
        if not args.tiny:
            rows += processes(name)
    rows += collections(counts)
    print(table(rows))
    write_result(args.output, {"rows": rows})


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the straight line through log y over log x."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def of_side(side: int, section: str) -> list[str]:
    return [f"{section}.patch_size=[{side},{side},{side}]", f"{section}.batch_size=2"]


def of_batch(batch: int, section: str) -> list[str]:
    return [f"{section}.batch_size={batch}"]


def grown(what: str, name: str, sizes: Sequence[int], overrides: Any, tiny: bool) -> dict[str, Any]:
    """Seconds and GiB of a step of the demo's networks at several sizes."""
    chosen = {n: overrides(n, SECTIONS[name]) for n in sizes}
    network = "tiny" if tiny else "demo"
    works = {str(n): WORKS[name](settings(network, *chosen[n]), CPU, True) for n in sizes}
    timings = interleaved(works, CPU, 1 if tiny else 3)
    seconds = [timings[str(n)].median for n in sizes]
    gib = [] if tiny else [peak_resident(named_step, name, chosen[n]) for n in sizes]
    return summary(name, what, sizes, seconds, gib)


def named_step(name: str, overrides: list[str]) -> Any:
    return WORKS[name](settings("demo", *overrides), CPU, True)


def summary(
    name: str, what: str, sizes: Sequence[int], seconds: Sequence[float], gib: Sequence[float] = ()
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "of": name,
        "with": what,
        "at": ", ".join(map(str, sizes)),
        "s": ", ".join(f"{value:.3g}" for value in seconds),
        "exponent of time": exponent(sizes, seconds),
    }
    if gib:
        row |= {"GiB": ", ".join(f"{value:.3g}" for value in gib), "exponent of memory": exponent(sizes, gib)}
    return row


def collections(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Preparing and encoding data sets of several sizes, and a later start, which finds them prepared."""
    cfg = settings("demo")
    measured = [collection(cfg, count) for count in counts]
    names = ("preparing volumes", "starting again", "encoding latents")
    return [summary(n, "volumes", counts, [m[i] for m in measured]) for i, n in enumerate(names)]


def collection(cfg: Config, count: int) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, count)
        env = Environment(model_dir=folder, tfevent_path=folder, output_dir=folder, data_base_dir=folder)
        started = time.perf_counter()
        prepare_data(cfg, env)
        prepared = time.perf_counter()
        prepare_data(cfg, env)
        again = time.perf_counter()
        autoencoder = build_autoencoder(cfg.autoencoder_def).eval()
        images: Any = Images(volumes(count, cfg.diffusion_train.patch_size))
        build_latent_cache(folder, autoencoder, "none", images, list(map(str, range(count))), True, CPU)
        return prepared - started, again - prepared, time.perf_counter() - again


def processes(name: str) -> list[dict[str, Any]]:
    """One and two processes, each with a whole batch and one thread: twice the volumes in how much more time?"""
    seconds = [min(launched(name, count)) for count in (1, 2)]
    row = summary(name, "processes", (1, 2), seconds)
    return [row | {"volumes a second, 2 against 1": 2 * seconds[0] / seconds[1]}]


def launched(name: str, count: int) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"]
    command += ["-m", "benchmarks.growth", "--rank-of", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds ")]


def one_rank(name: str) -> None:
    torch.set_num_threads(1)
    with distributed.process_group("gloo", 120):
        work = WORKS[name](settings("demo"), CPU, True)
        timing = interleaved({"step": work}, CPU, 5)["step"]
        if distributed.is_main():
            print(f"seconds {timing.median}", flush=True)


if __name__ == "__main__":
    main()
