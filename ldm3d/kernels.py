"""Which kernels a CPU samples with: the same for a volume alone and in a batch, and not the slow ones."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def batch_invariant(device: torch.device) -> AbstractContextManager[Any]:
    """`BatchInvariant` on a CPU; nothing elsewhere, where it could only get into a compiler's way."""
    return BatchInvariant() if device.type == "cpu" else nullcontext()


class BatchInvariant(TorchFunctionMode):
    """Within, on a CPU, a sample's result is the same, bit for bit, whatever else is in its batch.

    Three things differ with the batch there. Matrix products of few rows use another kernel, and the last elements of a
    SiLU, where they do not fill a vector register, another exponential: both are computed sample by sample here. And
    torch leaves 3-D convolutions of one single sample, unless it is large, to a kernel of its own, 2 to 4 times slower
    than oneDNN's, which computes all others: here it computes all of them.

    It holds for one thread of the program at a time, and changes no network.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.device.type == "cpu":
            if func is torch.conv3d and has_onednn(x):
                return _convolution(*args, **kwargs)
            if func in (F.linear, F.silu) and len(x) > 1:
                return torch.cat([func(sample, *args[1:], **kwargs) for sample in x.split(1)])
        return func(*args, **kwargs)


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN can convolve this tensor, on the CPU; a stand-in without content it cannot."""
    return type(x) is Tensor and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """`torch.conv3d` with the arguments that `nn.Conv3d` gives it, by oneDNN; without a backward pass."""
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
