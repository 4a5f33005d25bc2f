"""What the tutorial's way of sampling costs, each difference alone; part of `benchmarks.tutorial_effects`."""

from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from torch import Tensor

from benchmarks.demo_model import DemoModel, from_to
from benchmarks.reference import BETAS, NUM_TIMESTEPS
from ldm3d.brain import image_features
from ldm3d.diffusion import Denoise, sample_latent
from ldm3d.sections import DdpmSchedule

Row = dict[str, Any]
SCHEDULE = DdpmSchedule(beta_start=BETAS["beta_start"], beta_end=BETAS["beta_end"])


def scale_factor(model: DemoModel, num: int) -> list[Row]:
    """Scaled latents decoded with scale factor 1.0, as `inference.py` of the tutorial does."""
    statistics = model.sampler.statistics
    scaled = statistics.normalise(model.mean)
    latents = sample_latent(model.velocity, model.noise(num), [], model.sampler.card.schedule, "rflow", 20)
    wrong, right = model.decode(latents + statistics.mean), model.decode(statistics.restore(latents))
    return [
        {
            "difference": "scale factor 1.0 at sampling",
            "measured": f"PSNR of phantoms whose latents were scaled by {statistics.scale_factor:.3g}, dB",
            "tutorial": model.psnr(scaled + statistics.mean),
            "here": model.psnr(statistics.restore(scaled)),
        },
        {
            "difference": "scale factor 1.0 at sampling",
            "measured": f"L1 of {num} generated volumes from those of the same latents decoded rightly",
            "tutorial": float((wrong - right).abs().mean()),
        },
    ]


def clipping(model: DemoModel, num: int) -> list[Row]:
    """`clip_sample`, which MONAI's schedulers have on."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 1, 64, 64, 64, generator=generator)
    latents = model.flat.normalise(model.mean)
    by_clip = {clip: clean_latents(latents, clip) for clip in (True, False)}
    generated = {clip: _ddim(model, num, 50, clip) for clip in (True, False)}
    return [
        {
            "difference": "latents clipped to -1 to 1",
            "measured": "spread of standard normal latents",
            "tutorial": float(clean_latents(normal, True).std()),
            "here": float(clean_latents(normal, False).std()),
        },
        {
            "difference": "latents clipped to -1 to 1",
            "measured": "spread of the phantoms' latents, scaled by one factor",
            "tutorial": float(by_clip[True].std()),
            "here": float(by_clip[False].std()),
        },
        {
            "difference": "latents clipped to -1 to 1",
            "measured": "PSNR of the phantoms decoded from them, dB: the best that is left",
            "tutorial": model.psnr(model.flat.restore(by_clip[True])),
            "here": model.psnr(model.flat.restore(by_clip[False])),
        },
        {
            "difference": "latents clipped to -1 to 1",
            "measured": f"MMD of {num} generated volumes, 50 DDIM steps",
            "tutorial": model.mmd(generated[True]),
            "here": model.mmd(generated[False]),
        },
    ]


def clean_latents(latents: Tensor, clip: bool) -> Tensor:
    """What MONAI's scheduler takes for the clean latent where the network predicts the noise exactly."""
    scheduler = DDPMScheduler(NUM_TIMESTEPS, **BETAS, clip_sample=clip)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy = scheduler.add_noise(latents, noise, torch.full((len(latents),), 100))
    return scheduler.step(noise, 100, noisy)[1]


def _ddim(model: DemoModel, num: int, steps: int, clip: bool = False) -> Tensor:
    """Volumes (num, 1, X, Y, Z) by MONAI's own DDIM steps."""
    scheduler = DDIMScheduler(NUM_TIMESTEPS, **BETAS, clip_sample=clip)
    scheduler.set_timesteps(steps)
    predict = model.noise_predictor(scheduler.alphas_cumprod)
    latent = model.noise(num)
    for timestep in scheduler.timesteps.tolist():
        prediction = predict(latent, torch.full((num,), timestep))
        latent, _ = scheduler.step(prediction, timestep, latent)
    return model.decode(model.sampler.statistics.restore(latent))


def ddim(model: DemoModel, num: int) -> list[Row]:
    """DDIM that goes another way than its timesteps say; judged by what many steps give from the same noise."""
    alphas = DDPMScheduler(NUM_TIMESTEPS, **BETAS).alphas_cumprod
    predict = model.noise_predictor(alphas)

    def ours(steps: int) -> Tensor:
        latent = sample_latent(predict, model.noise(num), [], SCHEDULE, "ddim", steps)
        return model.decode(model.sampler.statistics.restore(latent))

    truth = ours(100)
    return [
        {
            "difference": "DDIM off its timesteps",
            "measured": f"L1 from 100 steps of the same noise, {num} volumes, {steps} steps",
            "tutorial": float((_ddim(model, num, steps) - truth).abs().mean()),
            "here": float((ours(steps) - truth).abs().mean()),
        }
        for steps in (10, 25)
    ]


def flow_timesteps(model: DemoModel, num: int) -> list[Row]:
    """`RFlowScheduler` with continuous timesteps, as MAISI uses it: its steps together should go the whole way, 1."""
    schedule = model.sampler.card.schedule
    rows: list[Row] = [
        {
            "difference": "float16 timesteps of rectified flow",
            "measured": f"way that {steps} steps go together; 1 is from noise to data",
            "tutorial": f"{float(_flow(_one, torch.zeros(1, 1, 1, 1, 1), steps)):.4f}",
            "here": f"{float(sample_latent(_one, torch.zeros(1, 1, 1, 1, 1), [], schedule, 'rflow', steps)):.4f}",
        }
        for steps in (7, 30)
    ]
    latents = (
        _flow(model.velocity, model.noise(num), 30),
        sample_latent(model.velocity, model.noise(num), [], schedule, "rflow", 30),
    )
    theirs, ours = (model.decode(model.sampler.statistics.restore(latent)) for latent in latents)
    rows.append(
        {
            "difference": "float16 timesteps of rectified flow",
            "measured": f"L1 between the {num} volumes of either, 30 steps",
            "tutorial": float((theirs - ours).abs().mean()),
        }
    )
    return rows


def _one(latent: Tensor, timesteps: Tensor) -> Tensor:
    return torch.ones_like(latent)


def _flow(velocity: Denoise, latent: Tensor, steps: int) -> Tensor:
    """MONAI's steps, as the docstring of its scheduler shows them."""
    scheduler = RFlowScheduler(NUM_TIMESTEPS, use_discrete_timesteps=False)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        prediction = velocity(latent, torch.full((len(latent),), timestep))
        latent, _ = scheduler.step(prediction, timestep, latent, following)
    return latent


def written_file(model: DemoModel, num: int) -> list[Row]:
    """Identity affine, values as they come out of the decoder."""
    sampler = model.sampler
    latents = sample_latent(model.velocity, model.noise(num), [], sampler.card.schedule, "rflow", 20)
    raw = model.decode(sampler.statistics.restore(latents))
    volumes = [volume[0].clamp(0, 1).numpy() for volume in raw]
    ml = {
        spacing: [image_features(volume, spacing)["brain_volume_ml"] for volume in volumes]
        for spacing in ((1.0, 1.0, 1.0), sampler.card.spacing)
    }
    return [
        {
            "difference": "identity affine",
            "measured": f"volume of the brain by the file's voxel size, ml, mean of {num}",
            "tutorial": float(np.mean(ml[1.0, 1.0, 1.0])),
            "here": float(np.mean(ml[sampler.card.spacing])),
        },
        {
            "difference": "values are not clipped",
            "measured": f"values in {num} generated volumes",
            "tutorial": from_to(raw.numpy()),
            "here": from_to(raw.clamp(0, 1).numpy()),
        },
    ]
