"""Decoding whole and in pieces: time, highest memory, difference.

python -m benchmarks.decode --output benchmarks/results/decode_cpu.json
python -m benchmarks.decode --shape 240 240 156 --rounds 1 --config config/config_train_32g.json --ways plain pieces

Each decoding runs in a process of its own, so that its highest memory is its own; ways take turns, and medians are
shown. Weights and latent are random: neither time nor memory depends on them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import write_result
from ldm3d.allocator import keep_freed_memory
from ldm3d.config import load_config
from ldm3d.decoding import GIB, SLAB_BYTES, Plan, decode
from ldm3d.decoding_costs import Costs
from ldm3d.networks import build_autoencoder
from ldm3d.slabs import Keep

ROOT = Path(__file__).resolve().parents[1]

# Names of the ways, and where whole volumes wait; None is plain decoding.
WAYS = {
    "plain": None,
    "pieces": Keep(),
    "pieces-16bit": Keep(half=True),
    "pieces-host": Keep(on_host=True),
    "pieces-host-16bit": Keep(on_host=True, half=True),
}
# Thinner slabs than so many of them make would tell nothing about large volumes.
FEWEST_SLABS = 8


def main() -> None:
    args = parse()
    if args.way:
        print(json.dumps(measure(args)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = args.ways or [name for name, keep in WAYS.items() if device == "cuda" or not (keep and keep.on_host)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for number, name in enumerate(ways):
                image = Path(folder) / f"{number}.pt"
                runs[name].append(in_a_process(["--way", name, "--image", str(image)]))
                print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
        images = [torch.load(Path(folder) / f"{number}.pt") for number in range(len(ways))]
    rows = [
        {
            "way": name,
            **{key: median(run[key] for run in runs[name]) for key in runs[name][0]},
            "greatest_difference": (image - images[0]).abs().max().item(),
        }
        for name, image in zip(ways, images, strict=True)
    ]
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["cpu_time_ratio"] = row["cpu_seconds"] / rows[0]["cpu_seconds"]
    spread = images[0].std().item()
    show(rows, args.shape, device)
    if args.output:
        settings = {"config": args.config.name, "shape": args.shape, "device": device, "rounds": args.rounds}
        write_result(args.output, settings | {"standard_deviation_of_image": spread, "ways": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[64, 72, 56], help="voxels of the image")
    parser.add_argument("--config", type=Path, default=ROOT / "config/config_train_32g.json", help="whose autoencoder")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is measured")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="what to measure; ratios are to the first of them")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One decoding: seconds, and GiB at the highest, of which `predicted_gib` were expected."""
    if args.way != "plain":
        keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    definition = load_config(args.config, []).autoencoder_def
    network = build_autoencoder(definition).to(device).eval()
    latent = torch.randn(1, definition.latent_channels, *(n // definition.downsampling for n in args.shape)).to(device)
    plan = plan_of(WAYS[args.way], Costs(network, tuple(latent.shape), autocast=False))
    before = highest_memory(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    image = decode(network, latent, plan).cpu()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = highest_memory(device)
    torch.save(image, args.image)
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "slabs": plan.slabs}
    return figures | {
        "peak_gib": after / GIB,
        "of_decoding_gib": (after - before) / GIB,
        "predicted_gib": plan.peak / GIB,
    }


def plan_of(keep: Keep | None, costs: Costs) -> Plan:
    if keep is None:
        return Plan(costs.whole())
    size = next((size for size in SLAB_BYTES if costs.slabs(size) >= FEWEST_SLABS), SLAB_BYTES[-1])
    return Plan(costs.pieces(size, keep)[0], size, costs.slabs(size), keep)


def highest_memory(device: torch.device) -> int:
    """Bytes: resident memory of this process, or what torch has handed out on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(rows: list[dict[str, Any]], shape: list[int], device: str) -> None:
    print(f"decoding {'x'.join(map(str, shape))} on {device}")
    heads = ("slabs", "s", "ratio", "CPU s", "ratio", "GiB", "of it", "predicted")
    print(" " * 20 + "".join(f"{head:>10}" for head in heads) + "  difference")
    for row in rows:
        print(
            f"{row['way']:20}{row['slabs']:10.0f}{row['seconds']:10.1f}{row['time_ratio']:10.2f}"
            f"{row['cpu_seconds']:10.1f}{row['cpu_time_ratio']:10.2f}{row['peak_gib']:10.2f}"
            f"{row['of_decoding_gib']:10.2f}{row['predicted_gib']:10.2f}  {row['greatest_difference']:.1e}"
        )


if __name__ == "__main__":
    main()
