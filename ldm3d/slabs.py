"""The exact decoder in pieces: convolutions over slabs, group normalisation over the whole volume.

A volume is kept as slabs along its first axis. A pass reads slabs with one plane of their neighbours on either side,
normalises, activates and convolves them, and writes slabs; what it has read for the last time is freed at once. So
nothing normalised ever exists whole, and input and output of a pass hardly do so together. The statistics of the next
normalisation are gathered while slabs are written.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import SpatialAttentionBlock, UpSample
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Keep:
    """Where whole volumes wait, and as what.

    Args:
        on_host: in the machine's memory, pinned, and not on the GPU that computes.
        half: as 16-bit numbers; they are computed with in float32 all the same.
    """

    on_host: bool = False
    half: bool = False

    def store(self, slab: Tensor) -> Tensor:
        """(B, C, T, Y, Z) -> (T, B, C, Y, Z), where a run of planes is one block, as fast copies to a GPU need it."""
        planes = slab.movedim(2, 0)
        packed = torch.empty(planes.shape, dtype=self._dtype(slab), device=slab.device).copy_(planes)
        return to_host(packed) if self.on_host else packed

    def _dtype(self, slab: Tensor) -> torch.dtype:
        if not self.half:
            return slab.dtype
        # float16 is eight times finer than bfloat16, but ends at 65504.
        low, high = torch.aminmax(slab)
        return torch.float16 if max(-low.item(), high.item()) < LARGEST_HALF else torch.bfloat16


def to_host(tensor: Tensor) -> Tensor:
    """Copy to the machine's memory; from a GPU without waiting: pinned memory is not reused before the copy is done."""
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return kept.copy_(tensor, non_blocking=True)


class Moments:
    """Mean and variance of each channel, from slabs that come one after another.

    Slabs are combined by their means and squared deviations, which loses no digits where the mean is large (Chan,
    Golub and LeVeque 1983, Algorithms for computing the sample variance, equation 2.1).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, slab: Tensor) -> None:
        """Take in (B, C, T, Y, Z)."""
        variance, mean = torch.var_mean(slab.float().flatten(2), dim=2, correction=0)
        count = slab[0, 0].numel()
        total, difference = self.count + count, mean.double() - self.mean
        self.squares = self.squares + variance.double() * count + difference**2 * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """What `norm` multiplies with and what it adds, (B, C, 1, 1, 1) float32 each."""
        groups = (norm.num_groups, -1)
        means, variances = self.mean.unflatten(1, groups), (self.squares / self.count).unflatten(1, groups)
        mean = means.mean(2, keepdim=True)
        variance = (variances + (means - mean) ** 2).mean(2, keepdim=True)
        scale = norm.weight.unflatten(0, groups) / (variance + norm.eps).sqrt()
        shift = norm.bias.unflatten(0, groups) - mean * scale
        return tuple(m.flatten(1).float()[:, :, None, None, None] for m in (scale, shift))


class Volume:
    """A whole volume (B, C, X, Y, Z) as slabs along X, with its moments."""

    def __init__(self, keep: Keep):
        self.keep = keep
        self.planes = 0
        self.moments = Moments()
        self.slabs: deque[tuple[int, Tensor]] = deque()

    def append(self, slab: Tensor) -> None:
        """The next planes, (B, C, T, Y, Z)."""
        self.moments.add(slab)
        self.slabs.append((self.planes, self.keep.store(slab)))
        self.planes += slab.shape[2]

    def read(self, first: int, last: int, device: torch.device, margin: int = 0) -> Tensor:
        """Planes `first` to before `last` with `margin` more voxels around each, zero where there are none; float32."""
        batch, channels, y, z = self.slabs[0][1].shape[1:]
        shape = (batch, channels, last - first, y + 2 * margin, z + 2 * margin)
        box = torch.zeros(shape, device=device) if margin else torch.empty(shape, device=device)
        box[:, :, : max(0, -first)] = 0
        box[:, :, self.planes - first :] = 0
        inside = box[..., margin : margin + y, margin : margin + z]
        for start, slab in self.slabs:
            low, high = max(first, start), min(last, start + len(slab))
            if low < high:
                planes = slab[low - start : high - start].to(device, non_blocking=True)
                inside[:, :, low - first : high - first].copy_(planes.movedim(0, 2))
        return box

    def forget(self, plane: int) -> None:
        """Free the slabs before `plane`, which will not be read again."""
        while self.slabs and self.slabs[0][0] + len(self.slabs[0][1]) <= plane:
            self.slabs.popleft()


class PiecewiseDecoder(nn.Module):
    """Computes what MONAI's `Decoder` does, but for rounding.

    Args:
        decoder: `autoencoder.decoder`.
        slab_bytes: size of a slab in float32, the larger one of what is read and what is written.
        keep: where whole volumes wait.
    """

    def __init__(self, decoder: Any, slab_bytes: int, keep: Keep):
        super().__init__()
        self.blocks = decoder.blocks
        self.slab_bytes, self.keep = slab_bytes, keep

    def forward(self, x: Tensor) -> Tensor:
        """Latent (B, C, X, Y, Z) -> image (B, 1, X * f, Y * f, Z * f)."""
        device, norm = x.device, None
        volume = self._keep_whole(x, Keep())
        for block in self.blocks:
            if isinstance(block, AEKLResBlock):
                volume = self._residual(block, volume, device)
            elif isinstance(block, SpatialAttentionBlock):
                volume = self._keep_whole(attend(block, take_whole(volume, device)), self.keep)
            elif isinstance(block, UpSample):
                volume = self._pass(volume, device, UpsampledConvolution(block.postconv.conv), self.keep)
            elif isinstance(block, nn.GroupNorm):
                norm = block
            else:
                # The latent before and the image behind are small, and stay as they are.
                volume = self._pass(volume, device, Convolution(block.conv), Keep() if norm else self.keep, norm)
        return take_whole(volume, device)

    def _keep_whole(self, x: Tensor, keep: Keep) -> Volume:
        volume = Volume(keep)
        volume.append(x)
        return volume

    def _residual(self, block: AEKLResBlock, x: Volume, device: torch.device) -> Volume:
        identity = isinstance(block.nin_shortcut, nn.Identity)
        rest = x if identity else Volume(self.keep)
        shortcut = None if identity else (block.nin_shortcut.conv, rest)
        first, second = Convolution(block.conv1.conv), Convolution(block.conv2.conv)
        h = self._pass(x, device, first, self.keep, block.norm1, F.silu, shortcut, forget=not identity)
        return self._pass(h, device, second, self.keep, block.norm2, F.silu, rest=rest)

    def _pass(
        self,
        source: Volume,
        device: torch.device,
        convolution: "Convolution",
        keep: Keep,
        norm: nn.GroupNorm | None = None,
        activation: Callable[..., Tensor] | None = None,
        shortcut: tuple[nn.Conv3d, Volume] | None = None,
        rest: Volume | None = None,
        forget: bool = True,
    ) -> Volume:
        """Normalise, activate and convolve slab by slab.

        Args:
            source: what is read, and freed if `forget` is true.
            device: where to compute.
            convolution: from planes with neighbours to planes.
            keep: where the result waits.
            norm: applied first.
            activation: applied second.
            shortcut: a pointwise convolution of `source` as it is, and where its results go.
            rest: is added, and freed.
            forget: nobody else needs `source`.
        """
        target, factor = Volume(keep), convolution.factor
        affine = source.moments.affine(norm) if norm is not None else None
        for first, last in self._spans(source, convolution):
            slab = source.read(first - 1, last + 1, device, convolution.margin)
            if shortcut is not None:
                shortcut[1].append(pointwise(shortcut[0], slab[:, :, 1:-1]))
            if forget:
                source.forget(last - 1 if last < source.planes else last)
            if affine is not None:
                # Not the planes that are padding: plain decoding adds them behind the activation.
                normalise(slab[:, :, first == 0 : last + 1 - first + (last < source.planes)], affine, activation)
            slab = convolution(slab)
            if rest is not None:
                slab += rest.read(first * factor, last * factor, device)
                rest.forget(last * factor)
            target.append(slab)
            del slab
        return target

    def _spans(self, source: Volume, convolution: "Convolution") -> Iterator[tuple[int, int]]:
        """Planes of `source` that are read together, but for their neighbours."""
        count = num_slabs(source.planes, convolution.plane_bytes(source.slabs[0][1][0]), self.slab_bytes)
        edges = [round(source.planes * i / count) for i in range(count + 1)]
        return pairwise(edges)


def num_slabs(planes: int, plane_bytes: int, slab_bytes: int) -> int:
    """In how many slabs of at most `slab_bytes` a volume is read; none is thinner than a plane."""
    return -(-planes // max(1, slab_bytes // plane_bytes))


class Convolution:
    """A convolution of planes whose neighbours are there: (B, C, T + 2, Y, Z) -> (B, C', T, Y, Z)."""

    factor, margin = 1, 0

    def __init__(self, layer: nn.Conv3d):
        self.layer = layer

    def plane_bytes(self, plane: Tensor) -> int:
        """Bytes in float32 of one plane (B, C, Y, Z), or of what becomes of it if that is more."""
        grown = plane[:, 0].numel() * self.factor**3
        return 4 * max(plane.numel(), grown * self.layer.out_channels)

    def __call__(self, slab: Tensor) -> Tensor:
        return F.conv3d(slab, self.layer.weight, self.layer.bias, padding=(0, 1, 1))


class UpsampledConvolution(Convolution):
    """Doubling each voxel and a convolution: (B, C, T + 2, Y + 2, Z + 2) -> (B, C', 2 T, 2 Y, 2 Z).

    Of the 27 voxels under the kernel only 8 are different ones, and which ones depends on whether a place is even or
    odd. So eight kernels of 2 x 2 x 2 sums of weights give the result with 8/27 of the work.
    """

    factor, margin = 2, 1

    def __call__(self, slab: Tensor) -> Tensor:
        batch, _, *size = slab.shape
        x, y, z = (n - 2 for n in size)
        out: Tensor | None = None
        for i, j, k in product((0, 1), repeat=3):
            kernel = self.layer.weight
            for axis, odd in enumerate((i, j, k), start=2):
                left, middle, right = kernel.unbind(axis)
                kernel = torch.stack((left + middle, right) if odd else (left, middle + right), axis)
            part = F.conv3d(slab[:, :, i : i + x + 1, j : j + y + 1, k : k + z + 1], kernel, self.layer.bias)
            if out is None:
                out = part.new_empty(batch, part.shape[1], x, 2, y, 2, z, 2)
            out[:, :, :, i, :, j, :, k] = part
        assert out is not None
        return out.view(batch, -1, 2 * x, 2 * y, 2 * z)


def normalise(slab: Tensor, affine: tuple[Tensor, Tensor], activation: Callable[..., Tensor] | None) -> None:
    """Scale, shift and activate in place."""
    slab.mul_(affine[0]).add_(affine[1])
    if activation is not None:
        activation(slab, inplace=True)


def pointwise(layer: nn.Conv3d, slab: Tensor) -> Tensor:
    """A convolution of 1 x 1 x 1 as the matrix product that it is: on one CPU thread torch unfolds it otherwise."""
    out = torch.matmul(layer.weight.flatten(1), slab.flatten(2))
    assert layer.bias is not None
    return out.add_(layer.bias[:, None]).view(*out.shape[:2], *slab.shape[2:])


def attend(block: SpatialAttentionBlock, x: Tensor) -> Tensor:
    """Attention needs all voxels together; computed without the matrix of all pairs, whatever the config says."""
    attention = copy.copy(block.attn)
    attention.use_flash_attention = True
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    attended: Tensor = attention(tokens).transpose(1, 2).reshape(x.shape) + x
    return attended


def take_whole(volume: Volume, device: torch.device) -> Tensor:
    """The volume in one piece; its slabs are freed."""
    whole = volume.read(0, volume.planes, device)
    volume.forget(volume.planes)
    return whole
