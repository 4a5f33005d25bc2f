"""What all benchmarks share: the machine, interleaved timings, peak memory, counted work, results as JSON and table."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import monai
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ldm3d.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
Work = Callable[[], Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark; the result is named after the module."""
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="where the result is written")
    parser.add_argument(
        "--tiny", "--quick", action="store_true", help="smallest sizes: shows that it runs, measures nothing"
    )
    return parser


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts |= {"gpu": device.name, "gpu_memory_gib": round(device.total_memory / GIB, 1), "cuda": torch.version.cuda}
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Timing(NamedTuple):
    """Seconds of one call: median, fastest and slowest."""

    median: float
    fastest: float
    slowest: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    works: Mapping[str, Work], device: torch.device, repeats: int, warm_up: int = 1, calls: int = 1
) -> dict[str, Timing]:
    """Time several pieces of work in turn, so that what else the machine does meets all of them alike.

    Args:
        works: what is timed, by name.
        device: on a GPU the clock waits until it has finished.
        repeats: measurements of each.
        warm_up: calls of each beforehand.
        calls: in one measurement; on a GPU several, so that the queue is never empty.
    """
    for work in works.values():
        for _ in range(warm_up):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def peak_on_gpu(work: Work, device: torch.device) -> float:
    """GiB allocated at the peak of `work`, weights included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / GIB


def peak_resident(build: Callable[..., Work], *given: Any) -> float:
    """GiB that a process of its own holds at the peak of `build(*given)()`, above what it holds with its imports."""
    queue: Any = multiprocessing.get_context("spawn").SimpleQueue()
    process = multiprocessing.get_context("spawn").Process(target=_resident, args=(queue, build, given))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{build.__name__}{given} ended with {process.exitcode}")
    return float(queue.get())


def _resident(queue: Any, build: Callable[..., Work], given: tuple[Any, ...]) -> None:
    keep_freed_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begin a new high-water mark
    build(*given)()
    queue.put((_status("VmHWM") - before) / GIB)


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def counted_flops(work: Work) -> float:
    """Floating-point operations of `work` in convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: _convolution}) as counter:
        work()
    return float(counter.get_total_flops())


def _convolution(x: Any, weight: Any, *rest: Any, out_shape: Any, **more: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a large matrix product, and of a large 3-D convolution: torch's own best of each."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    channels, edge = (256, 64) if device.type == "cuda" else (64, 40)
    convolution = nn.Conv3d(channels, channels, 3, padding=1).to(device, dtype)
    x = torch.randn(2, channels, edge, edge, edge, device=device, dtype=dtype)
    with torch.inference_mode():
        works: dict[str, Work] = {"matrix product": lambda: a @ b, "convolution": lambda: convolution(x)}
        timings = interleaved(works, device, 5, 2)
    work = {"matrix product": 2 * side**3, "convolution": 2 * 27 * channels * x.numel()}
    return {name: work[name] / timings[name].fastest for name in works}


def clone_weights(source: nn.Module, target: nn.Module) -> nn.Module:
    """`target` with the weights of `source`."""
    weights: dict[str, Tensor] = source.state_dict()
    target.load_state_dict(weights)
    return target


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write figures with what is needed to read them: machine, date and command."""
    made = {
        "command": " ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"made": made, **content}, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
