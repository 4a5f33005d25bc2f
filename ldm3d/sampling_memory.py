"""What sampling several volumes together holds at its peak, from the shapes alone."""

import torch
from torch import Tensor

from ldm3d.diffusion import sample_latent
from ldm3d.live_bytes import stand_ins
from ldm3d.samplers import choose_sampler
from ldm3d.sampling import Sampler


def sampling_peak(sampler: Sampler, batch_size: int) -> int:
    """Bytes on top of the weights, while latents are denoised; decoding is counted by `ldm3d.decoding_costs`.

    Args:
        sampler: as it will sample.
        batch_size: volumes at once.
    """
    # On a CPU a volume alone may be computed as two.
    count = max(2, batch_size) if sampler.device.type == "cpu" else batch_size
    with stand_ins() as counter, torch.inference_mode():
        take_two_steps(sampler, torch.zeros(count, *sampler.card.latent_shape, device=sampler.device))
        return counter.peak


def take_two_steps(sampler: Sampler, noise: Tensor) -> Tensor:
    """As many steps as it takes to see all that is held at once. For stand-ins: `noise` (B, C, X, Y, Z)."""

    def denoise(latent: Tensor, timesteps: Tensor) -> Tensor:
        with sampler.precision.autocast():
            prediction: Tensor = sampler.unet(latent, timesteps=timesteps).float()
            return prediction

    name, _ = choose_sampler(sampler.card.schedule, None, None)
    return sample_latent(denoise, noise, [], sampler.card.schedule, name, 2)
