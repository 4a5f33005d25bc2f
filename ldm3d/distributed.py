"""One process or many: rank, world size, device, reductions. Everything works the same with one process."""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ldm3d.errors import ConfigError
from ldm3d.rendezvous import meeting_place

T = TypeVar("T")


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process on its own machine (the global rank would name a GPU that another node has)."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process speaks for all; known from torchrun's environment before they have joined."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0


def choose_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def check_gpus(gpus: int | None) -> None:
    """Refuse a `-g` that does not agree with the machine or with what torchrun started.

    Raises:
        ConfigError: more GPUs were asked for than there are, or than processes were started.
    """
    if gpus is None:
        return
    available = torch.cuda.device_count()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus < 0:
        raise ConfigError(f"-g {gpus}: the number of GPUs must be 0 (CPU) or more")
    if gpus > available:
        raise ConfigError(f"-g {gpus}: this machine has {available} GPU(s); use -g {available} or leave -g out")
    if gpus > 1 and gpus != local_processes:
        raise ConfigError(
            f"-g {gpus}: {local_processes} process(es) were started on this machine; "
            f"start one for each GPU: torchrun --nproc_per_node={gpus} ... -g {gpus}"
        )


@contextmanager
def process_group(backend: str | None, timeout_seconds: float) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    Args:
        backend: "nccl", "gloo", or None to choose by hardware.
        timeout_seconds: how long a collective may wait before the run fails instead of hanging.

    Yields:
        The device of this process.

    Raises:
        ConfigError: nccl was asked for where there is no GPU.
    """
    device = choose_device()
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("ddp_backend nccl: there is no GPU here; use gloo, or null to choose by hardware")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Shapes hardly ever change: worth a search for the fastest kernel of each.
        torch.backends.cudnn.benchmark = True
    if not launched_by_torchrun():
        yield device
        return
    if device.type == "cuda" and backend != "gloo":
        # Tensors on the CPU go by gloo: to agree on when to stop, the processes need not wait for their devices.
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    store, this_rank, processes = meeting_place(timeout)
    dist.init_process_group(backend or "gloo", store=store, rank=this_rank, world_size=processes, timeout=timeout)
    # The networks hold the group, too. If they let it go last, torch waits for gloo's threads while these wait for the
    # interpreter, and a training that is done never ends (torch 2.13, about one in a hundred on a busy machine). Let go
    # from Python, the interpreter is free meanwhile.
    atexit.register([dist.group.WORLD].clear)
    yield device
    # Only at a good end: after an error the others may be waiting for this process, and leaving would wait for them.
    dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended, which then has said why."""
    if not (launched_by_torchrun() and isinstance(error, RuntimeError)):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo/transport", "NCCL"))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values`, on the CPU, over all processes, in place; the tensor itself with one process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(values: Sequence[float]) -> list[float]:
    """Largest of each value over all processes."""
    largest = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def gather_objects(value: T) -> list[T]:
    """`value` of every process, in order of rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
