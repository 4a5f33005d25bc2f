"""What a request for volumes costs above the script: 8 volumes by a warm worker, and by inference.py's own parts."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.api_service import ROOT, Service, generate
from benchmarks.measure import interleaved
from benchmarks.settings import CPU
from inference import batches, file_name, load_sampler
from ldm3d.allocator import keep_freed_memory
from ldm3d.config import load_config, load_environment
from ldm3d.samples import write_sample
from ldm3d.sampling import VolumeId

CONFIG, ENVIRONMENT = Path("config/config_demo.json"), Path("config/environment_sample.json")
GOAL = 0.05


def measure(service: Service, tiny: bool) -> dict[str, Any]:
    """Times of both, in turn: `POST /v1/samples?wait` to a worker that holds the weights, and the script's functions in
    this process, which holds them as well. Then the whole command, with its start and its montage.
    """
    num, steps, repeats = (1, 2, 2) if tiny else (8, 20, 7)
    keep_freed_memory()
    cfg = load_config(CONFIG)
    sampler = load_sampler(cfg, load_environment(ENVIRONMENT), None, CPU)
    with tempfile.TemporaryDirectory() as folder, service.client() as client:
        seeds = iter(range(1000))

        def by_script() -> None:
            seed = next(seeds)
            for batch in batches(range(num), cfg.sampling.batch_size, steps):
                volumes = sampler.sample(seed, batch.indices, "rflow", steps, batch.on_step)
                for index, values in zip(batch.indices, volumes, strict=True):
                    volume = VolumeId(seed, index)
                    write_sample(Path(folder) / file_name(volume), sampler, volume, values, "rflow", steps)

        def by_service() -> None:
            generate(client, num=num, seed=next(seeds), steps=steps)

        timings = interleaved({"service": by_service, "script": by_script}, CPU, repeats)
    service_s, script_s = timings["service"].median, timings["script"].median
    overhead = service_s / script_s - 1
    rows = [
        {
            "what": f"POST /v1/samples?wait, {num} volumes, {steps} steps",
            "s": service_s,
            "over the script": f"{overhead:+.1%}",
        },
        {"what": "inference.py's sampling and writing, warm", "s": script_s},
        {"what": "the command inference.py, from its start", "s": whole_command(num, steps)},
    ]
    return {
        "goal": f"below {GOAL:.0%}; the service also draws a preview of each volume",
        "held": overhead < GOAL,
        "overhead": overhead,
        "threads": torch.get_num_threads(),
        "timings": {name: timing._asdict() for name, timing in timings.items()},
        "rows": rows,
    }


def whole_command(num: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "inference.py", "-c", str(CONFIG), "-e", str(ENVIRONMENT), "--output", folder]
        began = time.perf_counter()
        subprocess.run([*command, "--num", str(num), "--steps", str(steps)], cwd=ROOT, capture_output=True, check=True)
        return time.perf_counter() - began
