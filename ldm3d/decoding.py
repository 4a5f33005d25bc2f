"""Latent -> volume within a memory budget: whole, in exact pieces, or, as a last resort, in blended windows.

Each plan's peak is predicted from the shapes alone, and the first plan that fits is taken. All sizes are in bytes on
top of what is there before: the weights, and on a CPU Python and torch.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

from ldm3d.allocator import free_bytes, freed_memory_returned
from ldm3d.decoding_costs import Costs
from ldm3d.errors import ConfigError
from ldm3d.slabs import Keep, PiecewiseDecoder

GIB = 2**30
# Thinner slabs would save little memory, as whole volumes need most, and fall into torch's slow convolution on a CPU.
SLAB_BYTES = tuple(2**20 * n for n in (256, 128, 64))
# What predictions leave out: fragments between tensors, small ones, libraries' own buffers.
RESERVE = 1.1
# Of a window, in voxels of the latent: below, group normalisation sees too little of the image.
SMALLEST_WINDOW = 8
OVERLAP = 0.5


@dataclass(frozen=True)
class Plan:
    """How to decode.

    Args:
        peak: predicted, in bytes, on the device that computes.
        slab_bytes: of the pieces; 0 if it is not done in pieces.
        slabs: how many of them the finest volume has.
        keep: where whole volumes wait between pieces.
        window: its side in voxels of the latent; 0 if it is not done in windows.
        alone: what can leave the device must have left it.
    """

    peak: int
    slab_bytes: int = 0
    slabs: int = 0
    keep: Keep = field(default_factory=Keep)
    window: int = 0
    alone: bool = False

    def __str__(self) -> str:
        if self.window:
            return f"blended windows of at most {self.window} latent voxels a side, not exact"
        if not self.slab_bytes:
            return "whole"
        waiting = "on the host" if self.keep.on_host else "beside it"
        precision = "rounded to 16 bit" if self.keep.half else "exact"
        return f"{precision} in {self.slabs} slabs, whole volumes {waiting}"


def choose_plan(
    autoencoder: AutoencoderKL, latent: Tensor, budget: int | None = None, autocast: bool = False, movable: int = 0
) -> Plan:
    """The first of these that fits: whole, exact pieces, pieces with 16-bit volumes between them, windows.

    Args:
        autoencoder: decodes.
        latent: (B, C, X, Y, Z) on the device that computes; its values do not matter.
        budget: bytes; None for what is free.
        autocast: convolutions compute in 16 bit.
        movable: bytes on the device, outside the budget, that can wait on the host; the plan is `alone` if so.

    Raises:
        ConfigError: not even small windows fit.
    """
    room = free_bytes(latent.device) if budget is None else budget
    if room is None:
        return Plan(Costs(autoencoder, tuple(latent.shape), autocast).whole())
    plan = _fitting(autoencoder, latent, room, autocast)
    if movable and (plan is None or str(plan) != "whole"):
        roomier = _fitting(autoencoder, latent, room + movable, autocast, to_host=movable)
        if roomier is not None and str(roomier) != str(plan):
            return replace(roomier, alone=True)
    if plan is None:
        smallest = _windowed(autoencoder, latent, SMALLEST_WINDOW, autocast).peak
        raise ConfigError(
            f"decoding needs {smallest * RESERVE / GIB:.2g} GiB even in windows of {SMALLEST_WINDOW} latent voxels, "
            f"and there are {room / GIB:.2g}: raise sampling.decode_gib, or free memory"
        )
    return plan


def _fitting(autoencoder: AutoencoderKL, latent: Tensor, room: int, autocast: bool, to_host: int = 0) -> Plan | None:
    """The first plan that fits into `room` bytes, where `to_host` more go to the host than the plan's own."""
    device = latent.device
    costs = Costs(autoencoder, tuple(latent.shape), autocast)
    whole = Plan(costs.whole())
    if whole.peak * RESERVE <= room:
        return whole
    host = free_bytes(torch.device("cpu"))
    for half in (False,) if autocast else (False, True):
        for on_host in (False, True) if device.type == "cuda" else (False,):
            for slab_bytes in SLAB_BYTES:
                keep = Keep(on_host, half)
                peak, waiting = costs.pieces(slab_bytes, keep)
                if peak * RESERVE <= room and (not on_host or host is None or waiting * RESERVE + to_host <= host):
                    return Plan(peak, slab_bytes, costs.slabs(slab_bytes), keep)
    for side in range(max(latent.shape[2:]), SMALLEST_WINDOW - 1, -1):
        plan = _windowed(autoencoder, latent, side, autocast)
        if plan.peak * RESERVE <= room:
            return plan
    return None


def _windowed(autoencoder: AutoencoderKL, latent: Tensor, side: int, autocast: bool) -> Plan:
    sizes = tuple(latent.shape)
    window = (*sizes[:2], *(min(side, n) for n in sizes[2:]))
    # On a CPU the image, its weights and their quotient are there too.
    images = 0 if latent.device.type == "cuda" else 3 * Costs(autoencoder, sizes, autocast).image
    return Plan(Costs(autoencoder, window, autocast).whole() + images, window=side)


@contextmanager
def waiting_on_host(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, a network's weights are in the host's memory; afterwards they are on `device` again.

    Not after an error, as what filled the device may still be there: who computes with the network brings it back.
    """
    move(network, torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    move(network, device)


def move(network: nn.Module, device: torch.device) -> None:
    """Take a network's weights to a device, so that training can go on with them also if this is done in sampling."""
    with torch.inference_mode(False):
        network.to(device)


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, latent: Tensor, plan: Plan) -> Tensor:
    """Decode (B, C, X, Y, Z) to (B, 1, X * f, Y * f, Z * f) as `plan` says."""
    volume: Tensor
    if not plan.slab_bytes and not plan.window:
        volume = autoencoder.decode(latent)
        return volume
    with freed_memory_returned():
        if plan.window:
            volume = _decode_windows(autoencoder, latent, plan.window)
        else:
            pieces = PiecewiseDecoder(autoencoder.decoder, plan.slab_bytes, plan.keep)
            volume = _with_decoder(autoencoder, pieces).decode(latent)
    return volume


def _decode_windows(autoencoder: AutoencoderKL, latent: Tensor, side: int) -> Tensor:
    volume: Tensor = sliding_window_inference(
        latent,
        [min(side, n) for n in latent.shape[2:]],
        sw_batch_size=1,
        predictor=autoencoder.decode,
        overlap=OVERLAP,
        mode="gaussian",
        device=torch.device("cpu"),
        sw_device=latent.device,
    )
    return volume


def _with_decoder(autoencoder: AutoencoderKL, decoder: nn.Module) -> AutoencoderKL:
    """The same autoencoder with another decoder; the given one is left as it is."""
    twin = copy.copy(autoencoder)
    twin._modules = dict(autoencoder._modules)
    twin.decoder = decoder
    return twin
