"""What both training loops need: precision, random numbers by step, gradient step, learning rate, EMA."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm3d import distributed
from ldm3d.errors import NonFiniteLoss
from ldm3d.networks import checkpoint_blocks, compile_blocks
from ldm3d.schema import Config, Optimization


def seed_step(seed: int, step: int) -> None:
    """Make this step's random numbers a function of (seed, step, rank) alone.

    So a resumed run draws what the undisturbed one would have drawn, without any random state being stored.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 4_099 + distributed.rank()) % 2**63)


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


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """Average gradients over processes where there are several."""
    if distributed.world_size() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)


class Precision:
    """Mixed precision by device: bfloat16 where the GPU has it, else float16 with loss scaling; float32 on a CPU.

    bfloat16 on a CPU without its units runs at 0.34 to 0.71 times the speed of float32, so a CPU never uses it.
    """

    def __init__(self, amp: bool, device: torch.device):
        self.device = device
        self.enabled = amp and device.type == "cuda"
        self.dtype = torch.bfloat16 if self.enabled and torch.cuda.is_bf16_supported() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)


class Optimizer:
    """AdamW with gradient clipping, warm-up and schedule: one call makes one step.

    Args:
        parameters: what is trained.
        train: learning rate and its schedule.
        total_steps: length of the whole training, for the cosine.
        precision: its loss scaler is used.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], train: Optimization, total_steps: int, precision: Precision):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.precision = precision
        self.max_grad_norm = train.max_grad_norm
        self.adamw = torch.optim.AdamW(self.parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: learning_rate_factor(step, train, total_steps)
        )

    def step(self, loss: Tensor, check_norm: Callable[[Tensor], None] = lambda norm: None) -> Tensor:
        """Backward, clip, update; returns the gradient norm before clipping.

        Args:
            loss: finite.
            check_norm: called with the norm before any weight is touched; not where float16's loss scaling is on, which
                by itself skips steps whose gradients have overflowed.
        """
        scaler = self.precision.scaler
        self.adamw.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not scaler.is_enabled():
            check_norm(norm)
        scaler.step(self.adamw)
        scaler.update()
        self.schedule.step()
        return norm

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        return {
            "adamw": self.adamw.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
        self.precision.scaler.load_state_dict(state["scaler"])


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


def checked_step(
    optimizer: Optimizer, loss: Tensor, terms: dict[str, Tensor], step: int, cases: Sequence[str]
) -> Tensor:
    """`Optimizer.step` of a finite loss with finite gradients. Raises `NonFiniteLoss`, and leaves the weights alone."""
    require_finite(loss, terms, step, cases)
    return optimizer.step(loss, lambda norm: require_finite(norm, terms | {"gradient_norm": norm}, step, cases))


def require_finite(value: Tensor, terms: dict[str, Tensor], step: int, cases: Sequence[str]) -> None:
    """Stop before a bad number, a loss or the norm of its gradients, reaches the weights. Raises `NonFiniteLoss`."""
    if not torch.isfinite(value):
        raise NonFiniteLoss(step, {name: float(term.detach()) for name, term in terms.items()}, list(cases))
