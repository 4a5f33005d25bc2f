"""Predicted memory against measured memory.

python -m benchmarks.memory_check --output benchmarks/results/memory_cpu.json

On a CPU: training steps of both stages with real tensors, each in a process of its own. Measured are the peak of live
tensors and the growth of resident memory. On a GPU (--gpu): the configurations for 16 and 32 GB as they are, under a
cap of so much memory, against `max_memory_allocated` and `max_memory_reserved`; and sampling with their networks under
caps of small cards, where the U-Net may have to wait on the host: `benchmarks.small_gpu`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import small_gpu
from benchmarks.measure import write_result
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.config import load_config
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentStatistics
from ldm3d.live_bytes import LiveBytes, autocast_as_on_cuda
from ldm3d.memory_advice import needed
from ldm3d.memory_phases import TRACED, TracedAutoencoder, TracedDiffusion, TracedStage
from ldm3d.randomness import StepRandom

GIB = 2**30
CONFIG = Path("config/config_train_16g.json")
NO_PERCEPTUAL = ["autoencoder_train.perceptual_weight=0"]
TINY = [
    *NO_PERCEPTUAL,
    *(f"{network}.channels=[32,32,32]" for network in ("autoencoder_def", "diffusion_def")),
    *(f"{train}.patch_size=[32,32,32]" for train in ("autoencoder_train", "diffusion_train")),
    "diffusion_def.num_head_channels=32",
    "discriminator_def.num_layers_d=1",
]
MEDIUM_AUTOENCODER = [
    "autoencoder_def.channels=[32,64,64]",
    "autoencoder_def.num_res_blocks=1",
    "autoencoder_train.batch_size=2",
    "autoencoder_train.patch_size=[48,48,48]",
]
SMALL_PATCHES = [
    "autoencoder_train.batch_size=2",
    "autoencoder_train.patch_size=[32,32,32]",
    "discriminator_def.num_layers_d=1",
]
MEDIUM_UNET = [
    "diffusion_def.channels=[64,128,128]",
    "diffusion_def.num_res_blocks=1",
    "diffusion_train.batch_size=8",
    "diffusion_train.patch_size=[64,64,48]",
]
# Name, stage, settings on top of the 16g configuration.
CASES: list[tuple[str, str, list[str]]] = [
    ("autoencoder 32/64/64", "autoencoder", [*MEDIUM_AUTOENCODER, *NO_PERCEPTUAL]),
    ("U-Net 64/128/128", "diffusion", MEDIUM_UNET),
    ("U-Net 64/128/128, default attention", "diffusion", [*MEDIUM_UNET, "diffusion_def.use_flash_attention=false"]),
    ("U-Net of 16g, small latents", "diffusion", ["diffusion_train.patch_size=[64,64,32]"]),
    ("autoencoder of 16g, small patches", "autoencoder", [*SMALL_PATCHES, *NO_PERCEPTUAL]),
]
# What holds least comes first, so that memory which the process keeps does not count for the next.
MODES = [(precision, mode) for precision in ("autocast", "fp32") for mode in ("blocks", "norms", False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU instead of the CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure))))
        return
    if args.gpu and not torch.cuda.is_available():
        parser.error("there is no GPU")
    rows: list[dict[str, Any]] = []
    for row in on_gpu() if args.gpu else on_cpu():
        rows.append(row)
        if args.output:
            write_result(args.output, {"rows": rows})


def on_cpu() -> Iterator[dict[str, Any]]:
    print(f"{'GiB':<40}{'precision':>9}{'recompute':>10}{'predicted':>10}{'tensors':>9}{'resident':>9}{'ratios':>13}")
    for name, stage, settings in CASES:
        task = {"stage": stage, "settings": settings}
        for predicted, measured in zip(predict(task), in_own_process(task), strict=True):
            row = {"case": name, **task, "predicted_bytes": predicted, **measured}
            tensors, resident = row["tensor_bytes"], row["resident_bytes"]
            print(
                f"{name:<40}{row['precision']:>9}{row['checkpointing'] or 'off':>10}{predicted / GIB:10.2f}"
                f"{tensors / GIB:9.2f}{resident / GIB:9.2f}{predicted / tensors:7.3f}{predicted / resident:6.2f}",
                flush=True,
            )
            yield row


def predict(task: dict[str, Any]) -> list[int]:
    with TRACED[task["stage"]](load_config(CONFIG, task["settings"]), True) as traced:
        return [peak for _, _, peak in steps(traced)]


def steps(traced: TracedStage) -> Iterator[tuple[str, str | bool, int]]:
    """Peak of a step in each mode."""
    for precision, checkpointing in MODES:
        traced.set_up(precision == "autocast", checkpointing)
        yield precision, checkpointing, traced.train_step()


def in_own_process(task: dict[str, Any]) -> Any:
    command = [sys.executable, "-m", "benchmarks.memory_check", "--measure", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: dict[str, Any]) -> Any:
    return measure_gpu(task) if "gib" in task else measure_cpu(task)


def measure_cpu(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Real steps in each mode: peak of live tensors, and how far resident memory grew over what it was before all."""
    traced_class = TracedAutoencoder if task["stage"] == "autoencoder" else TracedDiffusion
    with autocast_as_on_cuda(), LiveBytes() as counter:
        traced_class(load_config(CONFIG, TINY), counter, True)  # libraries are loaded and do not count
    with autocast_as_on_cuda(), LiveBytes() as counter:
        before, rows = status_bytes("VmRSS"), []
        traced = traced_class(load_config(CONFIG, task["settings"]), counter, False)
        modes = steps(traced)
        for _ in MODES:
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts over
            precision, checkpointing, peak = next(modes)
            resident = status_bytes("VmHWM") - before
            row = {"precision": precision, "checkpointing": checkpointing}
            rows.append({**row, "tensor_bytes": peak, "resident_bytes": resident})
    return rows


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def on_gpu() -> Iterator[dict[str, Any]]:
    print(f"{'GiB':<32}{'predicted':>10}{'allocated':>10}{'reserved':>9}{'assumed':>9}{'s/step':>8}")
    for gib in (16, 32):
        for stage in ("autoencoder", "diffusion"):
            for mode in ("as configured", "false", '"norms"', '"blocks"'):
                task = {"stage": stage, "gib": gib, "mode": mode, "autocast": True, "settings": []}
                row = {**task, "predicted_bytes": predict_gpu(task), **in_own_process(task)}
                figures = [row["predicted_bytes"], row.get("allocated_bytes", 0), row.get("reserved_bytes", 0)]
                cells = "".join(f"{value / GIB:10.2f}" for value in [*figures, needed(figures[0])])
                print(f"{gib}g {stage} {mode:<16}{cells}{row.get('seconds', float('nan')):8.3f}", flush=True)
                yield row
    yield from small_gpu.rows()


def gpu_settings(task: dict[str, Any]) -> Any:
    mode = [] if task["mode"] == "as configured" else [f"use_checkpointing={task['mode']}"]
    # The perceptual network's weights are a download; without them training goes on without the term.
    return load_config(Path("config") / f"config_train_{task['gib']}g.json", [*NO_PERCEPTUAL, *mode])


def predict_gpu(task: dict[str, Any]) -> int:
    with TRACED[task["stage"]](gpu_settings(task), True) as traced:
        return traced.train_step()


def measure_gpu(task: dict[str, Any]) -> dict[str, Any]:
    """Five real steps on the GPU, under a cap; what does not fit gives no figures."""
    device, cfg = torch.device("cuda", 0), gpu_settings(task)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, task["gib"] * GIB / total), device)
    stage: Any
    try:
        if task["stage"] == "autoencoder":
            stage, train = AutoencoderStage(cfg, device, 10), cfg.autoencoder_train
            image = torch.rand(train.batch_size, 1, *train.patch_size)
            batch = {"image": image, "case": [""] * train.batch_size}
            times = [
                timed(
                    lambda: stage.train_step(
                        batch, StepRandom(0, 0, len(batch["case"]), stage.device), stage.has_discriminator
                    )
                )
                for _ in range(5)
            ]
        else:
            # As the script has it, the autoencoder is on the GPU too.
            kept = AutoencoderStage(cfg, torch.device("cpu"), 10).autoencoder.to(device)
            stage = DiffusionStage(cfg, device, 10, LatentStatistics(torch.zeros(1, 1, 1, 1), 1.0))
            latents = torch.randn(cfg.diffusion_train.batch_size, *cfg.latent_shape, device=device)
            times = [
                timed(
                    lambda: stage.train_step(
                        {"latent": latents, "case": [""]}, StepRandom(0, 0, len(latents), stage.device)
                    )
                )
                for _ in range(5)
            ]
            del kept
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "seconds": min(times),
    }


def timed(step: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
