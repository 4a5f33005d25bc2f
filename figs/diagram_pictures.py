"""The real pictures of the diagram: a phantom, its latent, how noise takes it, and a volume as it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm3d.diffusion import build_diffusion, sample_latent
from ldm3d.montage import largest_slices, three_planes
from ldm3d.phantom import make_phantom
from ldm3d.samplers import choose_sampler
from ldm3d.sampling import Sampler, volume_generator
from ldm3d.schema import Config
from ldm3d.volumes import crop_or_pad, scale_intensity

PHANTOM = (1, 1)
"""Seed and number of a phantom with a tumour; the weights were trained on phantoms of seed 0."""
VOLUME = (0, 1)
"""Seed and number of the generated volume: the second one of `make sample`."""
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of noise that are shown."""
SHOWN_STEPS = 5
CHANNELS = 3
"""Of the latent, that are shown."""


@dataclass(frozen=True)
class Pictures:
    """Planes as (H, W) in [0, 1], the first row at the top.

    Attributes:
        volume: three planes of the phantom.
        reconstruction: the same of its reconstruction.
        latent: axial planes of some channels of its latent.
        noised: one channel of it at each of `LEVELS`.
        steps: after how many steps of sampling the next two were taken.
        denoised: that channel of the latent.
        decoded: axial planes of the volume that the latent gives.
    """

    volume: list[np.ndarray]
    reconstruction: list[np.ndarray]
    latent: list[np.ndarray]
    noised: list[np.ndarray]
    steps: list[int]
    denoised: list[np.ndarray]
    decoded: list[np.ndarray]


@torch.inference_mode()
def pictures(cfg: Config, model_dir: Path) -> Pictures:
    """Make all of them with published weights; a few seconds on a CPU."""
    sampler = Sampler.from_folder(model_dir, torch.device("cpu"))
    phantom = make_phantom(*PHANTOM, cfg.diffusion_train.patch_size, cfg.spacing[0])
    volume = crop_or_pad(scale_intensity(phantom.image[cfg.channel], "phantom"), cfg.diffusion_train.patch_size)
    centre = largest_slices(phantom.label) or tuple(n // 2 for n in volume.shape)
    mean, _ = sampler.autoencoder.encode(torch.from_numpy(volume)[None, None])
    clean = sampler.statistics.normalise(mean)
    reconstruction = sampler.decode(clean)[0, 0].numpy()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    diffusion = build_diffusion(cfg.noise_schedule)
    scale = cfg.noise_schedule.num_train_timesteps
    noised = [diffusion.add_noise(clean, noise, torch.tensor([level * scale])) for level in LEVELS]
    steps, latents, decoded = trajectory(sampler, cfg)
    inside = [c // cfg.autoencoder_def.downsampling for c in centre]
    middle = [n // 2 for n in clean.shape[2:]]
    return Pictures(
        volume=list(three_planes(volume, centre)),
        reconstruction=list(three_planes(reconstruction, centre)),
        latent=[channel(clean, inside, number) for number in range(CHANNELS)],
        noised=[channel(latent, inside) for latent in noised],
        steps=steps,
        denoised=[channel(latent, middle) for latent in latents],
        decoded=[three_planes(one)[0] for one in decoded],
    )


def trajectory(sampler: Sampler, cfg: Config) -> tuple[list[int], list[Tensor], Tensor]:
    """Some steps of sampling, their latents (1, C, X, Y, Z), and the volumes (B, 1, X, Y, Z) that these give."""
    name, count = choose_sampler(sampler.card.schedule, None, cfg.sampling.steps)
    generator = volume_generator(*VOLUME)
    noise = torch.randn(sampler.card.latent_shape, generator=generator)[None]
    latents = []

    def denoise(latent: Tensor, timesteps: Tensor) -> Tensor:
        latents.append(latent)
        prediction: Tensor = sampler.unet(latent, timesteps=timesteps)
        return prediction

    latents.append(sample_latent(denoise, noise, [generator], sampler.card.schedule, name, count))
    steps = np.rint(np.linspace(0, count, SHOWN_STEPS)).astype(int).tolist()
    chosen = [latents[step] for step in steps]
    return steps, chosen, sampler.decode(torch.cat(chosen))


def channel(latent: Tensor, centre: Sequence[int], number: int = 0) -> np.ndarray:
    """An axial plane of one channel of a normalised latent (1, C, X, Y, Z); two deviations are black and white."""
    plane = three_planes(latent[0, number], centre)[0]
    return (plane / 4 + 0.5).clip(0, 1)
