"""What both training loops need: precision, gradient steps that stop before a bad number, learning rate, EMA."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm3d import distributed
from ldm3d.console import log
from ldm3d.errors import NonFiniteLoss, NonFiniteValidation
from ldm3d.networks import checkpoint_blocks, compile_blocks
from ldm3d.schema import Config
from ldm3d.sections import Optimization


def prepare_network(network: Any, cfg: Config, device: torch.device) -> Any:
    """Move to the device, then recompute, synchronise and compile as the config says."""
    if cfg.sync_bn and distributed.world_size() > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device)
    if cfg.use_checkpointing:
        network = checkpoint_blocks(network, keep_convolutions=cfg.use_checkpointing == "norms")
    if cfg.compile and device.type == "cuda":
        network = compile_blocks(network)
    return network


def parallel(network: nn.Module, device: torch.device, accumulate_steps: int = 1) -> nn.Module:
    """Average gradients over processes where there are several.

    Static graph: every step uses every parameter in the same way, which lets recomputed activations and overlapping
    communication go together. Not where gradients are accumulated: torch refuses that (2.13, in `no_sync`).
    """
    if distributed.world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        network, device_ids=ids, gradient_as_bucket_view=True, static_graph=accumulate_steps == 1
    )


@contextmanager
def accumulating(more_to_come: bool, *networks: nn.Module) -> Iterator[None]:
    """Within, gradients stay on their process where more of the same step is to come: they are averaged once a step."""
    with ExitStack() as stack:
        for network in networks:
            if more_to_come and isinstance(network, DistributedDataParallel):
                stack.enter_context(network.no_sync())
        yield


class Precision:
    """Mixed precision by device: bfloat16 where the GPU has it, else float16 with loss scaling; float32 on a CPU.

    bfloat16 on a CPU without its units runs at 0.34 to 0.71 times the speed of float32. With them a training step is
    1.5 to 1.85 times as fast, but oneDNN's gradient of the weights of a 3x3x3 convolution is then wrong where the grid
    is 2 deep (torch 2.13), without a word: so a CPU never uses it.
    """

    def __init__(self, amp: bool, device: torch.device):
        self.device = device
        self.enabled = amp and device.type == "cuda"
        # Older GPUs emulate bfloat16, which torch counts as support unless told otherwise.
        has_bfloat16 = self.enabled and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)


class Optimizer:
    """AdamW with gradient clipping, warm-up and schedule. A step is `backward`, once or more, then `guarded_step`.

    Args:
        parameters: what is trained.
        train: learning rate and its schedule.
        total_steps: length of the whole training, for the cosine.
        precision: its loss scaler is used.
        max_skipped: so many steps in a row may be lost to float16's overflows.

    Attributes:
        skipped: steps lost in a row until now.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        train: Optimization,
        total_steps: int,
        precision: Precision,
        max_skipped: int = 0,
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.scaler = precision.scaler
        self.max_grad_norm = train.max_grad_norm
        self.max_skipped, self.skipped = max_skipped, 0
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=scaled_learning_rate(train), weight_decay=train.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: learning_rate_factor(step, train, total_steps)
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to what is there."""
        self.scaler.scale(loss).backward()

    def clip(self) -> Tensor:
        """Scale gradients down to `max_grad_norm`; their norm before."""
        self.scaler.unscale_(self.adamw)
        return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)

    def may_skip(self, norm_is_finite: bool) -> bool:
        """Whether a bad step is one that float16's loss scaling expects: it is left out, and the scale lowered."""
        return self.scaler.is_enabled() and not norm_is_finite and self.skipped < self.max_skipped

    def update(self, finite: bool) -> None:
        """Change the weights; where the gradients are not finite, which only a loss scaler may meet, nothing."""
        self.scaler.step(self.adamw)
        self.scaler.update()
        if finite:
            self.skipped = 0
            self.schedule.step()
        else:
            self.skipped += 1
            log(
                f"notice: gradients beyond float16's range: a network's step was left out, {self.skipped} in a row "
                f"of at most {self.max_skipped}; loss scale now {self.scaler.get_scale():g}"
            )
        self.adamw.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        return {
            "adamw": self.adamw.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]


def guarded_step(
    optimizers: Sequence[Optimizer], losses: Sequence[Tensor], error: Callable[[list[float]], NonFiniteLoss]
) -> list[Tensor]:
    """Clip and update with all optimizers of a step, or with none.

    The device is waited for once: every loss and every norm must be seen to be finite before a weight is touched.

    Args:
        optimizers: their gradients are there.
        losses: what the gradients are of, one for each optimizer.
        error: makes the exception, from the gradients' norms.

    Returns:
        Norms of the gradients before clipping.

    Raises:
        NonFiniteLoss: and no weight was changed. Under float16's loss scaling, after more than `max_skipped` in a row.
    """
    norms = [optimizer.clip() for optimizer in optimizers]
    values = torch.stack([*(loss.detach().float() for loss in losses), *norms])
    finite = torch.isfinite(values).tolist()
    good = []
    for optimizer, loss_is_finite, norm_is_finite in zip(
        optimizers, finite[: len(losses)], finite[len(losses) :], strict=True
    ):
        good.append(loss_is_finite and norm_is_finite)
        if not good[-1] and not optimizer.may_skip(norm_is_finite):
            raise error([float(norm) for norm in norms])
    for optimizer, is_good in zip(optimizers, good, strict=True):
        optimizer.update(is_good)
    return norms


def require_finite_validation(measure: str, bad: list[str]) -> None:
    """Stop where any process has met a validation volume of which the measure is not finite; all processes call it.

    NaN is no better than anything: a training that went on would never publish again, and not say why.

    Args:
        measure: the one by which weights are chosen.
        bad: names of such volumes on this process.

    Raises:
        NonFiniteValidation: on all processes.
    """
    cases = [case for part in distributed.gather_objects(bad) for case in part]
    if cases:
        raise NonFiniteValidation(measure, cases)


def scaled_learning_rate(train: Optimization) -> float:
    """`lr`, times the factor that `scale_lr` makes of the volumes of a step beyond `batch_size`.

    Linear: Goyal et al. 2017, Accurate, Large Minibatch SGD, section 2.1. Square root: Krizhevsky 2014, section 5.
    """
    factor = train.accumulate_steps * distributed.world_size()
    return train.lr * {"none": 1.0, "sqrt": math.sqrt(factor), "linear": factor}[train.scale_lr]


def learning_rate_factor(step: int, train: Optimization, total_steps: int) -> float:
    """Share of `lr` at a step: linear warm-up, then constant or a half cosine to zero at `total_steps`."""
    if step < train.warm_up_steps:
        return (step + 1) / train.warm_up_steps
    if train.lr_schedule == "constant":
        return 1.0
    done = (step - train.warm_up_steps) / max(1, total_steps - train.warm_up_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class EMA:
    """Running average of the weights: average <- decay * average + (1 - decay) * weights, after each step.

    The decay grows from 0.1 as (1 + step) / (10 + step) until it reaches `decay`, so that the first, random weights are
    soon forgotten.

    Args:
        network: what is averaged; `self.network` is a copy of it that carries the average.
        decay: 0 keeps the last weights.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)


def value_range(values: Tensor) -> str:
    """Smallest and largest finite value, and how many are not finite, for people: `0 to 1.5, 3 of 4096 not finite`."""
    finite = torch.isfinite(values)
    bad = int((~finite).sum())
    shown = f"{values[finite].min():.4g} to {values[finite].max():.4g}" if finite.any() else "nowhere finite"
    return shown + (f", {bad} of {values.numel()} not finite" if bad and finite.any() else "")
