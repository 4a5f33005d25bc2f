"""Counts the memory of tensors while code runs, without what libraries take for themselves."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors that were made within and are alive: `peak`, and `waiting_peak` of those given to `wait`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.waiting = self.waiting_peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage(), given)
        return out

    def _meet(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._lose, key, storage.nbytes())

    def _lose(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def wait(self, tensor: Tensor) -> Tensor:
        """A copy that counts as memory of the host, not of the device."""
        with torch.utils._python_dispatch._disable_current_modes():
            kept = tensor.clone()
        size = kept.untyped_storage().nbytes()
        self.waiting += size
        self.waiting_peak = max(self.waiting_peak, self.waiting)
        weakref.finalize(kept.untyped_storage(), self._fetch, size)
        return kept

    def _fetch(self, size: int) -> None:
        self.waiting -= size


@contextmanager
def live_memory() -> Iterator[LiveMemory]:
    with torch.inference_mode(), LiveMemory() as counted:
        yield counted
