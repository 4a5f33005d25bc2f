"""Whether a training step fits a machine, and what would if it does not."""

import math
import os
from collections.abc import Callable, Sequence

import torch

from ldm3d import distributed
from ldm3d.allocator import free_bytes
from ldm3d.console import log
from ldm3d.memory_phases import CHECKPOINTING, TRACED, TracedStage
from ldm3d.schema import Config

GIB = 2**30
# Beside live tensors: holes between them, and CUDA's context, or torch's libraries, with the convolutions' workspace.
FRAGMENTATION, CONTEXT_BYTES = 0.1, GIB
SPARE = 0.1
SECTIONS = {"autoencoder": "autoencoder_train", "diffusion": "diffusion_train"}


def needed(peak: int) -> float:
    """Bytes of a GPU, or of a CPU's memory, that a peak of live tensors takes."""
    return peak * (1 + FRAGMENTATION) + CONTEXT_BYTES


def largest_peak(room: float, spare: float = SPARE) -> float:
    """Inverse of `needed`: the peak for which there is room with so much to spare."""
    return (room * (1 - spare) - CONTEXT_BYTES) / (1 + FRAGMENTATION)


def suggest_training(traced: TracedStage, limit: float) -> list[str]:
    """Settings with which a training step, which does not fit as it is, stays within `limit` bytes of live tensors."""
    found = []
    section = SECTIONS[traced.name]
    mode = "blocks" if traced.cfg.use_checkpointing is True else traced.cfg.use_checkpointing
    for stronger in CHECKPOINTING[CHECKPOINTING.index(mode) + 1 :]:
        traced.set_up(traced.autocast, stronger)
        if traced.train_step() <= limit:
            found.append(f'use_checkpointing="{stronger}"')
            break
    traced.set_up(traced.autocast, traced.cfg.use_checkpointing)
    batch_size = largest_batch(traced.train_step, traced.batch_size, limit)
    if batch_size:
        return [*found, f"{section}.batch_size={batch_size}"]
    patch = largest_patch(lambda size: traced.train_step(1, size), traced.patch_size, traced.factor, limit)
    if patch:
        found.append(f"{section}.batch_size=1 with {section}.patch_size={list(patch)}")
    return found


def largest_batch(peak: Callable[[int], int], most: int, limit: float) -> int:
    """The largest batch up to `most` whose peak is within `limit`, 0 if there is none; peaks grow in proportion."""
    one = peak(1)
    if one > limit:
        return 0
    if most == 1:
        return 1
    slope = max(1, peak(2) - one)
    batch_size = min(most, 1 + int((limit - one) // slope))
    while batch_size > 1 and peak(batch_size) > limit:
        batch_size -= 1
    return batch_size


def largest_patch(
    peak: Callable[[tuple[int, ...]], int], size: Sequence[int], factor: int, limit: float
) -> tuple[int, ...] | None:
    """The largest size of the same shape, divisible by `factor`, whose peak is within `limit`; None if there is none.

    Sizes differ by a twentieth, which is as fine as shapes of few multiples of `factor` can be.
    """
    shares = [share / 20 for share in range(20, 0, -1)]
    sizes = list(dict.fromkeys(tuple(max(factor, round(n * s / factor) * factor) for n in size) for s in shares))
    first, last = 0, len(sizes)
    while first < last:
        middle = (first + last) // 2
        try:
            fits = peak(sizes[middle]) <= limit
        except ValueError:  # too small for the discriminator's layers
            fits = False
        if fits:
            last = middle
        else:
            first = middle + 1
    return sizes[first] if first < len(sizes) else None


def warn_if_too_large(cfg: Config, stage: str, device: torch.device) -> None:
    """Say in one line, from rank 0, if a training step will not fit this machine, and what would. Never raises.

    Args:
        cfg: the configuration.
        stage: "autoencoder" or "diffusion".
        device: where it is to train.
    """
    if not distributed.is_main():
        return
    try:
        message = _warning(cfg, stage, device)
    except Exception as error:  # torch's stand-ins do not know every operation of every version
        reason = (str(error).splitlines() or ["no reason given"])[0]
        message = f"notice: memory cannot be predicted ({type(error).__name__}: {reason})"
    if message:
        log(message)


def _warning(cfg: Config, stage: str, device: torch.device) -> str | None:
    gpu = device.type == "cuda"
    free = torch.cuda.get_device_properties(device).total_memory if gpu else free_bytes(device)
    room = None if free is None else free // (1 if gpu else int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if room is None or crude_bound(cfg, stage) < room / 2:
        return None
    limit = largest_peak(room, spare=0)
    with TRACED[stage](cfg, gpu) as traced:
        peak = traced.train_step()
        if peak <= limit:
            return None
        settings = suggest_training(traced, limit)
    fitting = ", or with ".join(settings)
    return (
        f"warning: a step of {SECTIONS[stage]} will take about {needed(peak) / GIB:.1f} GiB, but {device} has "
        f"{room / GIB:.1f} GiB; " + (f"it would fit with {fitting}" if settings else "nothing smaller would fit")
    )


def crude_bound(cfg: Config, stage: str) -> float:
    """Bytes that a training step certainly does not exceed, at once: many times what is needed, for small machines."""
    first = stage == "autoencoder"
    net = cfg.autoencoder_def if first else cfg.diffusion_def
    train = cfg.autoencoder_train if first else cfg.diffusion_train
    fold = cfg.autoencoder_def.patchify if first else cfg.autoencoder_def.downsampling
    voxels = train.batch_size * math.prod(n / fold for n in train.patch_size)
    blocks = net.num_res_blocks if isinstance(net.num_res_blocks, tuple) else (net.num_res_blocks,) * len(net.channels)
    total = 0.0
    for level, (channels, count, attention) in enumerate(zip(net.channels, blocks, net.attention_levels, strict=True)):
        points = voxels / 8**level
        # Down and up, the middle, and on the way up twice the channels; a block keeps about eight volumes.
        total += points * channels * 4 * 8 * 3 * (2 * count + 3)
        parameters = (2 * count + 3) * 2 * 27 * (2 * channels) ** 2
        total += parameters * 4 * 6
        if attention and not net.use_flash_attention:
            heads = channels if first else max(1, channels // max(1, cfg.diffusion_def.head_channels[level]))
            total += 3 * 4 * heads * points * points / train.batch_size * (2 * count + 3)
    perceptual = 4 * 1000 * math.prod(train.patch_size) * train.batch_size if first else 0
    return total + perceptual
