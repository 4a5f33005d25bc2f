"""What decoding will need, predicted from the shapes alone: whole, and in pieces."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from monai.networks.blocks import SpatialAttentionBlock, UpSample
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn

from ldm3d.slabs import Keep, num_slabs

# Weights per pair of channels while those of an upsampled convolution are summed.
KERNELS = 30


@dataclass(frozen=True)
class Pass:
    """One step of the decoder on a whole volume: a convolution, or attention.

    Args:
        size: (X, Y, Z) of what it reads.
        reads: channels.
        writes: channels.
        factor: voxels a side that it makes of one.
        side: channels that it writes besides, for the end of the residual block.
        rest: channels that are added to what it writes, and freed.
        keeps: what it reads is needed afterwards.
        attention: every voxel looks at every other one.
        flash: without a matrix of all pairs.
    """

    size: tuple[int, ...]
    reads: int
    writes: int
    factor: int = 1
    side: int = 0
    rest: int = 0
    keeps: bool = False
    attention: bool = False
    flash: bool = True


class Costs:
    """Bytes that each way of decoding needs at its highest moment, on top of the weights.

    Args:
        autoencoder: decodes.
        shape: of the latent, (B, C, X, Y, Z).
        autocast: convolutions compute and write in 16 bit, norms in 32.
        scratch: count what a convolution takes for itself, a copy of what it reads: measured on a CPU, and assumed for
            a GPU.
    """

    def __init__(self, autoencoder: AutoencoderKL, shape: tuple[int, ...], autocast: bool, scratch: bool = True):
        self.batch, _, *size = shape
        self.passes = list(_passes(autoencoder.decoder.blocks, tuple(size)))
        self.number = 2 if autocast else 4
        self.scratch = scratch
        # Of a patch autoencoder: the unfolded image beside the linear path's, and their sum.
        self.images = 3 if getattr(autoencoder, "patchify", 1) > 1 else 2

    @property
    def image(self) -> int:
        """The finished image in float32."""
        last = self.passes[-1]
        return 4 * self.batch * last.writes * prod(last.size)

    def whole(self) -> int:
        """Plain decoding."""
        return max(*(self._whole(step) for step in self.passes), self.images * self.image)

    def _whole(self, step: Pass) -> int:
        e, voxels = self.number, self.batch * prod(step.size)
        if step.attention:
            pairs = 0 if step.flash else 2 * 4 * self.batch * prod(step.size) ** 2
            return self._attending(step) + pairs
        held = e * voxels * (step.reads if step.keeps or step.side else step.rest)
        if step.factor > 1:
            grown = voxels * step.factor**3
            return e * voxels * step.reads + grown * (self._read(step.reads, e) + e * step.writes)
        # Normalised beside activated; activated beside convolved; at the end also the shortcut and the sum.
        activated = 8 * step.reads
        convolved = self._read(step.reads, 4) + e * step.writes
        summed = 3 * e * step.writes if step.rest else 0
        return held + voxels * max(activated, convolved, summed)

    def _read(self, channels: int, number: int) -> int:
        """Bytes per voxel of what a convolution reads, as it is given and as it is computed with."""
        cast = self.number if self.number != number else 0
        return channels * (number + cast + (self.number if self.scratch else 0))

    def slabs(self, slab_bytes: int) -> int:
        """In how many slabs the last pass is done."""
        return self._slabs(self.passes[-1], slab_bytes)

    def _slabs(self, step: Pass, slab_bytes: int) -> int:
        widest = max(step.reads, step.writes * step.factor**3)
        return num_slabs(step.size[0], 4 * self.batch * widest * prod(step.size[1:]), slab_bytes)

    def pieces(self, slab_bytes: int, keep: Keep) -> tuple[int, int]:
        """The exact decoder in pieces: its peak on the device, and what waits on the host at most."""
        peaks, waiting, chunks = [self.images * self.image], [0], 1
        for step in self.passes:
            if step.attention:
                peaks.append(self._attending(step))
                chunks = 1
                continue
            stored = 2 if keep.half else self.number
            count = self._slabs(step, slab_bytes)
            voxels = self.batch * prod(step.size)
            source = stored * voxels * step.reads
            written, side = (stored * voxels * step.factor**3 * channels for channels in (step.writes, step.side))
            rest = stored * voxels * step.rest
            # A slab is freed when the next one is done, the last one when it has been read.
            before = source + rest
            left = source if step.keeps else min(source, 2 * source // min(count, chunks))
            nearly = left + (written * (count - 2) + (side + rest) * (count - 1)) // count if count > 1 else 0
            after = (source if step.keeps else 0) + written * (count - 1) // count + side + rest // count
            waits = max(before, left + written * (count - 1) // count + side, after + written // count)
            working = self._working(step, count, stored)
            kept = max(before, nearly, after)
            if keep.on_host:
                peaks.append(working + (self.image if step is self.passes[-1] else 0))
                waiting.append(waits)
            else:
                peaks.append(max(working + kept, waits))
            chunks = count
        return max(peaks), max(waiting)

    def _attending(self, step: Pass) -> int:
        """Input and normalised input, query, key, value and two results."""
        return self.batch * prod(step.size) * step.reads * (4 + 6 * self.number)

    def _working(self, step: Pass, count: int, stored: int) -> int:
        """The slab that is read, and what becomes of it."""
        x, y, z = step.size
        planes = -(-x // count)
        inner = self.batch * planes * y * z
        margin = 2 if step.factor > 1 else 0
        read = 4 * self.batch * step.reads * (planes + 2) * (y + margin) * (z + margin)
        inside = read * self._read(step.reads, 4) // (4 * step.reads)
        out = self.number * inner * step.writes * step.factor**3
        packed = stored * inner * step.writes * step.factor**3
        # Of an upsampled slab one voxel in eight is computed at a time, and what they read is cut out.
        part = 0
        if step.factor > 1:
            part = out // step.factor**3 + (read if self.scratch else 0) + 4 * KERNELS * step.reads * step.writes
        shortcut = read + inner * (self.number + stored) * step.side
        added = 4 * inner * step.rest
        return max(inside + out + part, shortcut, out + max(packed, added))


def _passes(blocks: nn.ModuleList, size: tuple[int, ...]) -> Iterator[Pass]:
    """The decoder's steps in their order; a norm belongs to the convolution behind it."""
    block: Any
    for block in blocks:
        if isinstance(block, AEKLResBlock):
            a, b = block.in_channels, block.out_channels
            identity = isinstance(block.nin_shortcut, nn.Identity)
            yield Pass(size, a, b, side=0 if identity else b, keeps=identity)
            yield Pass(size, b, b, rest=b)
        elif isinstance(block, SpatialAttentionBlock):
            channels = block.norm.num_channels
            yield Pass(size, channels, channels, attention=True, flash=block.attn.use_flash_attention)
        elif isinstance(block, UpSample):
            layer = block.postconv.conv
            yield Pass(size, layer.in_channels, layer.out_channels, factor=2)
            size = tuple(2 * n for n in size)
        elif not isinstance(block, nn.GroupNorm):
            yield Pass(size, block.conv.in_channels, block.conv.out_channels)
