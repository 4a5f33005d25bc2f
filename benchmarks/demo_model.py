"""The demo's weights with brains that they have not seen: what the effects of single settings are measured on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loss import phantoms
from benchmarks.settings import CPU
from ldm3d.diffusion import Denoise
from ldm3d.latents import LatentStatistics
from ldm3d.metrics import fidelity
from ldm3d.sampling import Sampler, volume_generator

WEIGHTS = Path("checkpoints/demo")
SEED = 20


@dataclass(frozen=True)
class DemoModel:
    """Weights, images and their latents.

    Args:
        sampler: holds the networks and the latents' statistics.
        images: (N, 1, X, Y, Z) in [0, 1].
        mean: of the posterior of each image, (N, C, X', Y', Z').
        sigma: its standard deviation.
    """

    sampler: Sampler
    images: Tensor
    mean: Tensor
    sigma: Tensor

    @property
    def flat(self) -> LatentStatistics:
        """One factor for all latents and no centre: the tutorial's normalisation, from all volumes."""
        return LatentStatistics(torch.zeros(1, 1, 1, 1), float(1 / self.mean.std()))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder gives them -> (N, 1, X, Y, Z) as the decoder gives them, not clipped."""
        return torch.cat([self.sampler.autoencoder.decode(latent[None]) for latent in latents])

    def psnr(self, latents: Tensor) -> float:
        """dB, of decoded latents against the images."""
        return float(-10 * (self.decode(latents).clamp(0, 1) - self.images).square().mean().log10())

    def noise(self, count: int) -> Tensor:
        """(count, C, X', Y', Z') that volumes begin with."""
        shape = self.sampler.card.latent_shape
        return torch.stack([torch.randn(shape, generator=volume_generator(SEED, i)) for i in range(count)])

    def mmd(self, volumes: Tensor) -> float:
        """Distance of generated volumes (M, 1, X, Y, Z) from the images, in image features; 0 is like real."""
        real, generated = ([image[0].clamp(0, 1).numpy() for image in images] for images in (self.images, volumes))
        return float(fidelity(real, generated)["mmd"]["value"])

    def velocity(self, latent: Tensor, timesteps: Tensor) -> Tensor:
        """What the network says of a noised latent on the straight path, timesteps (B,) from 0 to 1000."""
        return self.sampler.unet(latent, timesteps=timesteps)

    def noise_predictor(self, alphas: Tensor) -> Denoise:
        """The same network as one that predicts the noise of a DDPM schedule.

        A DDPM's noised latent sqrt(a) z + sqrt(1 - a) e, divided by the sum of both roots, is a point
        (1 - s) z + s e of the straight path; with the velocity v = z - e there, e is that point minus (1 - s) v.

        Args:
            alphas: cumulative products of the schedule, by timestep.
        """

        def predict(latent: Tensor, timesteps: Tensor) -> Tensor:
            signal, noise = (root.view(-1, 1, 1, 1, 1) for root in roots(alphas[timesteps.long()]))
            point, s = latent / (signal + noise), noise / (signal + noise)
            return point - (1 - s) * self.velocity(point, s.flatten() * 1000)

        return predict


def roots(alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of signal and noise in a DDPM's noised latent."""
    return alphas.sqrt(), (1 - alphas).sqrt()


@torch.inference_mode()
def demo_model(count: int) -> DemoModel:
    sampler = Sampler.from_folder(WEIGHTS, CPU)
    images = phantoms(count)
    encoded: list[Any] = [sampler.autoencoder.encode(image[None]) for image in images]
    mean, sigma = (torch.cat(part) for part in zip(*encoded, strict=True))
    return DemoModel(sampler, images, mean, sigma)


def from_to(values: Any) -> str:
    """The range of some numbers, for a table."""
    return f"{np.min(values):.3g} to {np.max(values):.3g}"
