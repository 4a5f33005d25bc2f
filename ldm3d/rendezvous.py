"""Where the processes of a run meet, also after torchrun has started them again."""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ldm3d.errors import ConfigError

SECONDS_BETWEEN_LOOKS = 0.02
BEGUN = "ldm3d/begun"


def meeting_place(timeout: timedelta) -> tuple[Store, int, int]:
    """The store through which the processes find each other, this one's rank, and their number.

    torchrun keeps one store for all restarts. What processes that have died wrote there, their addresses, would be read
    by the new ones, which then wait for the dead (seen with torch 2.13 in two of three restarts). So the processes that
    are alive agree on a name of their own in it.

    Raises:
        ConfigError: not all processes came within `timeout`.
    """
    store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
    if _has_launch_store():
        try:
            store = PrefixStore(agree_on_name(store, rank, world, timeout), store)
        except dist.DistStoreError as error:
            raise ConfigError(f"not all {world} processes came within {timeout.total_seconds():g} s") from error
    return store, rank, world


def begun_before() -> bool:
    """Whether processes of this launch had begun to train, before torchrun started these in their place.

    That it has started them again says less: those before may have failed before they touched anything. Only where
    torchrun keeps no store (Windows) it has to do.
    """
    if _has_launch_store():
        return _launch_store().check([BEGUN])
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def note_beginning() -> None:
    """Tell those that torchrun may start later that this launch has begun to train; for one process to call."""
    if _has_launch_store():
        _launch_store().set(BEGUN, "yes")


def _has_launch_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launch_store() -> Store:
    """The store that torchrun keeps from its start to its end, as one more client of it."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)


def agree_on_name(store: Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that the processes alive share, and that no dead one has used.

    Each process says hello with a number that only it has; rank 0 answers to that number, until all have heard it. What
    a dead process has said is answered, too, but nobody hears that.
    """
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    if rank == 0:
        store.set(f"name/{me}", me)
        _answer(store, me, set(range(1, world)), time.monotonic() + timeout.total_seconds())
    store.wait([f"name/{me}"], timeout)
    name: str = store.get(f"name/{me}").decode()
    store.set(f"heard/{name}/{rank}", "yes")
    return name


def _answer(store: Store, name: str, missing: set[int], deadline: float) -> None:
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(missing)} are missing")
        for rank in sorted(missing):
            if store.check([f"heard/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                store.set(f"name/{store.get(f'hello/{rank}').decode()}", name)
        time.sleep(SECONDS_BETWEEN_LOOKS)
