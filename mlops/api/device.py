"""Memory and use of what a worker computes on. Only its own process can ask its device."""

import os
import subprocess
import threading
import time
from pathlib import Path

import torch

from ldm3d.allocator import CGROUP, MEMINFO, free_bytes
from ldm3d.console import log
from mlops.api import metrics

SECONDS = 5.0
CPU = torch.device("cpu")


def watch(device: torch.device) -> None:
    """Keep the figures up to date from a thread, for the life of the process."""
    threading.Thread(target=_keep_looking, args=(device,), daemon=True).start()


def _keep_looking(device: torch.device) -> None:
    last, trouble = (time.monotonic(), time.process_time()), ""
    while True:
        time.sleep(SECONDS)
        now = (time.monotonic(), time.process_time())
        try:
            look(device, (now[1] - last[1]) / (now[0] - last[0]))
        except Exception as error:  # a driver's, say; figures that stand still for good would look like a calm device
            if repr(error) != trouble:
                trouble = repr(error)
                log(f"warning: the device cannot be looked at: {trouble}")
        last = now


def look(device: torch.device, cpu_seconds_per_second: float) -> None:
    """Look once.

    Args:
        device: where the worker computes. The machine's own memory is told of in any case.
        cpu_seconds_per_second: that this process has used since the last look.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    metrics.DEVICE_USE.labels("cpu").set(cpu_seconds_per_second / cores)
    if (free := free_bytes(CPU)) is not None:
        total = _machine_bytes()
        metrics.DEVICE_TOTAL.labels("cpu").set(total)
        metrics.DEVICE_USED.labels("cpu").set(total - free)
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        metrics.WORKER_BYTES.set(resident_pages * os.sysconf("SC_PAGE_SIZE"))
    if device.type == "cuda":
        _look_at_gpu(device)


def _look_at_gpu(device: torch.device) -> None:
    name = f"cuda:{device.index if device.index is not None else torch.cuda.current_device()}"
    free, total = free_bytes(device), torch.cuda.mem_get_info(device)[1]
    metrics.DEVICE_TOTAL.labels(name).set(total)
    metrics.DEVICE_USED.labels(name).set(total - (free or 0))
    if (use := _gpu_use(device)) is not None:
        metrics.DEVICE_USE.labels(name).set(use)


def _gpu_use(device: torch.device) -> float | None:
    """Share of the time in which the GPU computed; None where neither pynvml nor nvidia-smi tells."""
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # pynvml is not installed, or has an error of its own: a part of a GPU does not tell
        pass
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", f"GPU-{uuid}"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout) / 100
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _machine_bytes() -> int:
    """The machine's memory, within the container's limit."""
    machine = 1024 * int(MEMINFO.read_text().split("MemTotal:")[1].split()[0])
    limit = CGROUP / "memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
