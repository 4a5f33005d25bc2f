"""Count the bytes that a computation holds, on real tensors or on stand-ins that compute nothing.

Torch has a tracker of its own in `torch.distributed._tools`, which is private and changes from version to version; what
is used here (dispatch mode, storages that can be referred to weakly, fake tensors) is what that tracker stands on.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What CUDA's autocast computes in float32 and the CPU's does not, as far as the networks here use it.
FLOAT32_ON_CUDA = ((F, "group_norm"), (F, "layer_norm"), (F, "softmax"), (torch, "softmax"), (Tensor, "softmax"))
# The CUDA allocator hands out multiples of this.
BLOCK_BYTES = 512
# What reads a tensor's value; the second stands for the first where no gradients are recorded.
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class LiveBytes(TorchDispatchMode):
    """Within, `now` is the size of all live storages that an operation has returned, `peak` the most it was.

    What an operation needs for itself alone (cuDNN's workspace, columns of a convolution) does not appear.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and _is_fake(args[0]):
            return _any_value(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._live.add(key)
        self.now += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size

    def start_over(self) -> None:
        """Let `peak` begin at what is live now."""
        self.peak = self.now


def _is_fake(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def _any_value(dtype: torch.dtype) -> Any:
    """What a stand-in, which has no value, is said to hold: finite, true, and one."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


@contextmanager
def stand_ins() -> Iterator[LiveBytes]:
    """Within, tensors have shape and type but no content, and every operation costs next to nothing.

    They are CPU tensors that stand in for a GPU's too, as a torch without CUDA cannot make others. Attention keeps its
    output and one number for each row, as the kernels of both do.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(autocast_as_on_cuda())
        # Everything is where it belongs; torch cannot swap a fake parameter for itself.
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *_, **__: module))
        for name in [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]:
            stack.enter_context(patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(LiveBytes())


@contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Within, autocast on a CPU takes float32 for the same operations as autocast on a GPU."""
    with ExitStack() as stack:
        for owner, name in FLOAT32_ON_CUDA:
            stack.enter_context(patch.object(owner, name, _in_float32(getattr(owner, name))))
        yield


def _in_float32(function: Any) -> Any:
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        autocast = torch.is_autocast_enabled("cpu")
        return function(x.float() if autocast else x, *args, **kwargs)

    return wrapped


def nbytes(tensors: Any) -> int:
    """Bytes of all tensors in a nested structure, views counted by their own size."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
