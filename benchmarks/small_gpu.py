"""Sampling under the caps of small GPUs: what is predicted, and on a GPU what is.

    python -m benchmarks.small_gpu              what fits, predicted
    python -m benchmarks.small_gpu --gpu        measured too, under the cap; part of benchmarks.memory_check --gpu

One volume in two steps with the networks of a configuration, once as `Sampler` does it, and once with the U-Net kept on
the device: how it is decoded then, the peak, the seconds, and whether both make the same.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import GIB, RESULTS, table, write_result
from benchmarks.sampling import sampler_of
from ldm3d import sampling
from ldm3d.config import load_config
from ldm3d.decoding import Plan, choose_plan
from ldm3d.live_bytes import nbytes
from ldm3d.memory_advice import CONTEXT_BYTES
from ldm3d.memory_phases import TRACED
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.schema import Config

# What cards of 6 GB let programs have lies between the two in the middle.
CARDS_GIB = (4.0, 5.75, 6.0, 8.0)
NO_PERCEPTUAL = ["autoencoder_train.perceptual_weight=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="measure as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "small_gpu.json", help="where the result is written")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    if args.gpu and not torch.cuda.is_available():
        parser.error("there is no GPU")
    found = list(rows()) if args.gpu else [predict(name, gib, amp) for name, gib, amp in cases()]
    write_result(args.output, {"rows": found})
    print(table(found))


def cases() -> Iterator[tuple[str, float, bool]]:
    for name in ("16g", "32g"):
        for amp in (True, False):
            for gib in CARDS_GIB:
                yield name, gib, amp


def config(name: str) -> Config:
    return load_config(Path("config") / f"config_train_{name}.json", NO_PERCEPTUAL)


def predict(name: str, gib: float, amp: bool) -> dict[str, Any]:
    """How the planner decodes on such a card, with and without moving the U-Net, in GiB."""
    cfg = config(name)
    with torch.device("meta"):
        autoencoder, unet = build_autoencoder(cfg.autoencoder_def), build_unet(cfg.diffusion_def)
        latent = torch.empty(1, *cfg.latent_shape)
    weights = nbytes([list(network.parameters()) for network in (autoencoder, unet)])
    room, movable = gib * GIB - CONTEXT_BYTES - weights, nbytes(list(unet.parameters()))
    kept, moved = (choose_plan(autoencoder, latent, int(room), amp, size) for size in (0, movable))
    return {
        "config": name,
        "precision": "autocast" if amp else "fp32",
        "card GiB": gib,
        "denoising GiB": denoising(name, amp) / GIB,
        "U-Net kept": str(kept),
        "kept GiB": (kept.peak + weights) / GIB,
        "as it is done": str(moved) + (", U-Net on the host" if moved.alone else ""),
        "done GiB": (moved.peak + weights - movable * moved.alone) / GIB,
    }


@cache
def denoising(name: str, amp: bool) -> int:
    """Peak while a volume's latent is made, with all weights."""
    with TRACED["diffusion"](config(name), amp) as traced:
        return int(traced.sample(1) - traced.training_only())


def rows() -> Iterator[dict[str, Any]]:
    """Predicted and, in a process for each, measured on the GPU."""
    for name, gib, amp in cases():
        task = json.dumps({"name": name, "gib": gib, "amp": amp})
        command = [sys.executable, "-m", "benchmarks.small_gpu", "--measure", task]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = predict(name, gib, amp) | json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        yield row


def measure(name: str, gib: float, amp: bool) -> dict[str, Any]:
    """The same on the GPU; what does not fit says so."""
    device = torch.device("cuda", 0)
    cap = gib * GIB - CONTEXT_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    # What the card of this size would say is free.
    sampling.free_bytes = lambda _: cap - torch.cuda.memory_allocated(device)  # type: ignore[attr-defined]
    sampler = sampler_of(config(name).model_copy(update={"amp": amp}), device)
    found: dict[str, Any] = {}
    made = []
    for how, choose in (("measured", choose_plan), ("measured kept", _kept)):
        sampling.choose_plan = choose  # type: ignore[attr-defined]
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        try:
            made.append(sampler.sample(0, [0], steps=2))
        except torch.cuda.OutOfMemoryError:
            return found | {f"{how} decoding": "out of memory"}
        found |= {
            f"{how} decoding": f"{sampler.decoding}{', alone' if sampler.decoding and sampler.decoding.alone else ''}",
            f"{how} GiB": torch.cuda.max_memory_reserved(device) / GIB,
            f"{how} s": time.perf_counter() - start,
        }
    return found | {"difference": float((made[0] - made[1]).abs().max())}


def _kept(autoencoder: Any, latent: torch.Tensor, budget: int, autocast: bool, movable: int) -> Plan:
    return choose_plan(autoencoder, latent, budget, autocast)


if __name__ == "__main__":
    main()
