"""Noise schedules: how a latent is noised in training, what the network is to predict, how it is sampled."""

from collections.abc import Callable
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor

from ldm3d.randomness import StepRandom
from ldm3d.sections import DdpmSchedule, RFlowSchedule, SamplerName, Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]


class RectifiedFlow:
    """Straight paths between data and noise (Liu et al. 2023, Flow Straight and Fast, equation 1).

    With time s in [0, 1] from data to noise, z_s = (1 - s) z_0 + s e, and the network predicts z_0 - e, MONAI's sign.
    Timesteps given to the network are s * `num_train_timesteps`, continuous.
    """

    def __init__(self, schedule: RFlowSchedule):
        self.scale = schedule.num_train_timesteps
        self.logit_normal = schedule.timesteps == "logit-normal"

    def draw_timesteps(self, random: StepRandom) -> Tensor:
        """Random training timesteps (B,) in (0, num_train_timesteps)."""
        return (random.normal().sigmoid() if self.logit_normal else random.uniform()) * self.scale

    def grid(self, count: int) -> Tensor:
        """`count` evenly spaced timesteps for validation, float (count,)."""
        return (torch.arange(count) + 0.5) / count * self.scale

    def add_noise(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latent (B, C, X, Y, Z) at `timesteps` (B,)."""
        s = _per_sample(timesteps / self.scale, latent)
        return (1 - s) * latent + s * noise

    def target(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict, of the latent's shape."""
        return latent - noise


class GaussianDiffusion:
    """DDPM with epsilon or v prediction (Ho et al. 2020; Salimans and Ho 2022, section 4), by MONAI's scheduler."""

    def __init__(self, schedule: DdpmSchedule):
        self.schedule = schedule
        self.scheduler = DDPMScheduler(**_arguments(schedule), clip_sample=False)

    def draw_timesteps(self, random: StepRandom) -> Tensor:
        """Random training timesteps (B,) in 0 .. num_train_timesteps - 1."""
        return random.integers(self.schedule.num_train_timesteps)

    def grid(self, count: int) -> Tensor:
        """`count` evenly spaced timesteps for validation, integers (count,)."""
        return ((torch.arange(count) + 0.5) / count * self.schedule.num_train_timesteps).long()

    def add_noise(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latent (B, C, X, Y, Z) at `timesteps` (B,)."""
        noised: Tensor = self.scheduler.add_noise(original_samples=latent, noise=noise, timesteps=timesteps)
        return noised

    def target(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict, of the latent's shape."""
        if self.schedule.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.scheduler.get_velocity(sample=latent, noise=noise, timesteps=timesteps)
        return velocity


def build_diffusion(schedule: Schedule) -> RectifiedFlow | GaussianDiffusion:
    """The training side of a schedule."""
    return RectifiedFlow(schedule) if isinstance(schedule, RFlowSchedule) else GaussianDiffusion(schedule)


def sample_latent(
    denoise: Denoise,
    noise: Tensor,
    generators: list[torch.Generator],
    schedule: Schedule,
    sampler: SamplerName,
    steps: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Follow the schedule from noise to latent. Nothing is clipped: latents are not bounded by 1.

    Args:
        denoise: the network: latent (B, C, X, Y, Z) and timesteps (B,) -> prediction.
        noise: standard normal (B, C, X, Y, Z).
        generators: one for each sample, for samplers that add noise on the way; on the CPU.
        schedule: what the network was trained with.
        sampler: from `ldm3d.samplers.choose_sampler`.
        steps: number of evaluations of the network.
        on_step: called with the number of each finished step.

    Returns:
        Latent (B, C, X, Y, Z), still scaled.
    """
    if isinstance(schedule, RFlowSchedule):
        return _sample_flow(denoise, noise, schedule, steps, on_step)
    scheduler = _sampling_scheduler(schedule, sampler)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    latent = noise
    for number, (timestep, following) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        prediction = denoise(latent, torch.full((len(latent),), timestep, device=latent.device))
        if sampler == "ddim":
            latent = _ddim_step(scheduler, prediction, timestep, following, latent)
        else:
            latent = _scheduler_step(scheduler, prediction, timestep, latent, generators)
        on_step(number + 1)
    return latent


def _sample_flow(
    denoise: Denoise, noise: Tensor, schedule: RFlowSchedule, steps: int, on_step: Callable[[int], None]
) -> Tensor:
    """Euler steps of equal length from s = 1 to s = 0."""
    latent = noise
    for number in range(steps):
        s = 1 - number / steps
        timesteps = torch.full((len(latent),), s * schedule.num_train_timesteps, device=latent.device)
        latent = latent + denoise(latent, timesteps) / steps
        on_step(number + 1)
    return latent


def _sampling_scheduler(schedule: DdpmSchedule, sampler: SamplerName) -> Any:
    arguments = _arguments(schedule)
    if sampler == "ddpm":
        return DDPMScheduler(**arguments, clip_sample=False)
    if sampler == "ddim":
        return DDIMScheduler(**arguments, clip_sample=False)
    return PNDMScheduler(**arguments, skip_prk_steps=True)


def _ddim_step(scheduler: Any, prediction: Tensor, timestep: int, following: int, latent: Tensor) -> Tensor:
    """To the timestep that follows, or to the clean latent (Song et al. 2021, DDIM, equation 12 without noise).

    MONAI's own step goes `num_train_timesteps // steps` down, but its timesteps lie further apart than that unless the
    steps are all of them: the latent is then noisier than the network is told, and with few steps stays so.
    """
    _, clean = scheduler.step(prediction, timestep, latent)
    alpha = scheduler.alphas_cumprod[timestep]
    alpha_following = scheduler.alphas_cumprod[following] if following >= 0 else scheduler.one
    noise = (latent - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    less_noisy: Tensor = alpha_following.sqrt() * clean + (1 - alpha_following).sqrt() * noise
    return less_noisy


def _scheduler_step(
    scheduler: Any, prediction: Tensor, timestep: int, latent: Tensor, generators: list[torch.Generator]
) -> Tensor:
    if not isinstance(scheduler, DDPMScheduler):
        following: Tensor = scheduler.step(prediction, timestep, latent)[0]
        return following
    # Each sample draws from its own generator, on the CPU, so that no neighbour and no device changes it.
    rows = [
        scheduler.step(p[None].cpu(), timestep, z[None].cpu(), generator)[0]
        for p, z, generator in zip(prediction, latent, generators, strict=True)
    ]
    return torch.cat(rows).to(latent.device)


def _arguments(schedule: DdpmSchedule) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "schedule": schedule.schedule,
        "prediction_type": schedule.prediction_type,
    }
    if schedule.schedule != "cosine":
        arguments |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return arguments


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))
