"""The shape of the perceptual loss without its weights: what it keeps in memory can be counted, nothing else."""

from collections.abc import Sequence

import torch
from monai.losses import PerceptualLoss
from torch import Tensor, nn

# Each line of a network is one stage whose output LPIPS compares (Zhang et al. 2018, appendix A): a number of channels
# is a 3x3 convolution, "pool" halves the grid, a pair is a Fire module (Iandola et al. 2016, table 1).
Layer = int | str | tuple[int, int] | nn.Module
SQUEEZE: tuple[tuple[Layer, ...], ...] = (
    ("stem",),
    ("pool", (16, 64), (16, 64)),
    ("pool", (32, 128), (32, 128)),
    ("pool", (48, 192)),
    ((48, 192),),
    ((64, 256),),
    ((64, 256),),
)
ALEX: tuple[tuple[Layer, ...], ...] = (("large stem",), ("pool", 192), ("pool", 384), (256,), (256,))
VGG: tuple[tuple[Layer, ...], ...] = (
    (64, 64),
    ("pool", 128, 128),
    ("pool", 256, 256, 256),
    ("pool", 512, 512, 512),
    ("pool", 512, 512, 512),
)
NETWORKS = {"squeeze": SQUEEZE, "alex": ALEX, "vgg": VGG}


class PerceptualShape(PerceptualLoss):  # type: ignore[misc]  # monai tells mypy no types
    """MONAI's loss over slices in three directions, with a network that has LPIPS's layers and no weights of its.

    Args:
        name: one of `NETWORKS`.
    """

    def __init__(self, name: str):
        nn.Module.__init__(self)
        self.spatial_dims, self.is_fake_3d, self.fake_3d_ratio, self.channel_wise = 3, True, 0.5, False
        self.perceptual_function = _Lpips(NETWORKS[name])
        self.eval().requires_grad_(False)


class _Lpips(nn.Module):
    def __init__(self, stages: Sequence[Sequence[Layer]]):
        super().__init__()
        channels, self.stages = 3, nn.ModuleList()
        for stage in stages:
            layers: list[nn.Module] = []
            for layer in stage:
                made, channels = _layer(layer, channels)
                layers += made
            self.stages.append(nn.Sequential(*layers))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance of slices (N, 1, X, Y)."""
        pairs = zip(self._features(image), self._features(target), strict=True)
        distances = [(_unit(a) - _unit(b)).square().mean(1).mean() for a, b in pairs]
        return torch.stack(distances).sum()

    def _features(self, image: Tensor) -> list[Tensor]:
        x = (image - torch.zeros(1, 3, 1, 1)) / torch.ones(1, 3, 1, 1)
        return [x := stage(x) for stage in self.stages]


class _Fire(nn.Module):
    def __init__(self, channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(channels, squeezed, 1), nn.ReLU(inplace=True))
        self.expand1 = nn.Sequential(nn.Conv2d(squeezed, expanded, 1), nn.ReLU(inplace=True))
        self.expand3 = nn.Sequential(nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        return torch.cat([self.expand1(squeezed), self.expand3(squeezed)], dim=1)


def _layer(layer: Layer, channels: int) -> tuple[list[nn.Module], int]:
    """Modules of a layer, and the channels that come out of it."""
    if layer == "pool":
        return [nn.MaxPool2d(3, 2, ceil_mode=True)], channels
    if isinstance(layer, tuple):
        return [_Fire(channels, *layer)], 2 * layer[1]
    if layer == "stem":
        return [nn.Conv2d(channels, 64, 3, stride=2), nn.ReLU(inplace=True)], 64
    if layer == "large stem":
        return [nn.Conv2d(channels, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True)], 64
    assert isinstance(layer, int)
    return [nn.Conv2d(channels, layer, 3, padding=1), nn.ReLU(inplace=True)], layer


def _unit(features: Tensor) -> Tensor:
    return features / features.square().sum(1, keepdim=True).sqrt().add(1e-10)
