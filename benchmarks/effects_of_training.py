"""What the tutorial's way of training costs, each difference alone; part of `benchmarks.tutorial_effects`."""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo_model import WEIGHTS, DemoModel, from_to
from benchmarks.loss import DDPM, PHANTOM_SEED, cached
from benchmarks.measure import interleaved
from benchmarks.reference import KL_WEIGHT, ReferenceAutoencoder, ReferenceDiffusion, summed_kl
from benchmarks.settings import CPU, settings
from benchmarks.steps import TOTAL_STEPS, volumes
from ldm3d.diffusion import build_diffusion
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentStatistics
from ldm3d.losses import kl_divergence
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.phantom import make_phantom
from ldm3d.randomness import StepRandom
from ldm3d.tutorial import AUTOENCODER, read_tutorial_weights
from ldm3d.volumes import PERCENTILES, crop_or_pad, percentiles

Row = dict[str, Any]
CROP = (24, 40, 28)
"""As much of a phantom along each axis as the tutorial's 112 x 128 x 80 voxels are of a BraTS volume at 1.1 mm."""
CROPS = 50
RANKS = 4


def scale_of_one_batch(model: DemoModel) -> list[Row]:
    """The scale factor of a first batch of 2: what each process, and each resumed run, gets for its own."""
    whole = float(1 / model.mean.std())
    batches = [float(1 / pair.std()) / whole for pair in model.mean.split(2)]
    return [
        {
            "difference": "scale factor of one batch",
            "measured": f"factors of {len(batches)} batches of 2, as shares of all volumes' factor",
            "tutorial": from_to(batches),
            "here": "1",
        }
    ]


def intensities(num: int) -> list[Row]:
    """What one and the same intensity becomes, by the place of the crop it is scaled in."""
    rng = np.random.default_rng(0)
    became = []
    for index in range(num):
        volume = make_phantom(PHANTOM_SEED, index).image[0]
        low, high = percentiles(volume, PERCENTILES)
        middle = (low + high) / 2
        for _ in range(CROPS):
            start = [int(rng.integers(n - size + 1)) for n, size in zip(volume.shape, CROP, strict=True)]
            low, high = percentiles(crop_or_pad(volume, CROP, start), PERCENTILES)
            became.append((middle - low) / (high - low))
    return [
        {
            "difference": "intensities scaled after the crop",
            "measured": f"what the middle of the range becomes, {CROPS} crops of each of {num} phantoms",
            "tutorial": from_to(became),
            "here": "0.5",
        }
    ]


def kl(model: DemoModel) -> list[Row]:
    """The KL term's share of reconstruction + KL at two patch sizes, and where half precision has lost sigma."""
    rows = []
    weight = settings("demo").autoencoder_train.kl_weight
    for size in ((16, 24, 16), (32, 40, 32), (48, 64, 48)):
        patch = torch.stack([torch.from_numpy(crop_or_pad(i[0].numpy(), size))[None] for i in model.images])
        mean, sigma = model.sampler.autoencoder.encode(patch)
        l1 = float(F.l1_loss(model.sampler.autoencoder.decode(mean), patch))
        terms = float(KL_WEIGHT * summed_kl(mean, sigma)), float(weight * kl_divergence(mean, sigma))
        rows.append(
            {
                "difference": "KL summed",
                "measured": f"its share in L1 + KL, patch {' x '.join(map(str, size))}",
                **{who: f"{term / (term + l1):.2%}" for who, term in zip(("tutorial", "here"), terms, strict=True)},
            }
        )
    lost = torch.full((1, 1, 1, 1, 1), 1e-8).half()
    rows.append(
        {
            "difference": "KL without epsilon",
            "measured": "KL of a latent of which float16 has rounded sigma, 1e-8, to 0",
            "tutorial": f"{float(summed_kl(torch.zeros_like(lost), lost)):.3g}",
            "here": f"{float(kl_divergence(torch.zeros_like(lost), lost)):.3g}",
        }
    )
    return rows


def anomaly_detection(repeats: int, network: str) -> list[Row]:
    cfg = settings(network)
    image = volumes(cfg.autoencoder_train.batch_size, cfg.autoencoder_train.patch_size)
    recipes = {
        on: ReferenceAutoencoder(cfg, build_autoencoder(cfg.autoencoder_def), CPU, anomaly=on) for on in (True, False)
    }
    timings = interleaved({str(on): lambda r=r: r.train_step(image) for on, r in recipes.items()}, CPU, repeats)
    return [
        {
            "difference": "anomaly detection left on",
            "measured": f"seconds of an autoencoder step without it, times ({network} networks)",
            "tutorial": timings["True"].median / timings["False"].median,
            "here": "1",
        }
    ]


def encoding(repeats: int, network: str) -> list[Row]:
    """How many times longer the tutorial's step of stage 2 is for encoding its volumes again."""
    cfg = settings(network)
    image = volumes(cfg.diffusion_train.batch_size, cfg.diffusion_train.patch_size)
    autoencoder = build_autoencoder(cfg.autoencoder_def).eval()
    encodes = ReferenceDiffusion(cfg, autoencoder, build_unet(cfg.diffusion_def), image, CPU)
    reads = copy.copy(encodes)
    with torch.no_grad():
        reads.autoencoder = _Cached(encodes.autoencoder.encode_stage_2_inputs(image))
    timings = interleaved(
        {"encodes": lambda: encodes.train_step(image), "reads": lambda: reads.train_step(image)}, CPU, repeats
    )
    return [
        {
            "difference": "encoding at every step",
            "measured": f"seconds of a diffusion step on cached latents, times ({network} networks)",
            "tutorial": timings["encodes"].median / timings["reads"].median,
            "here": "1",
        }
    ]


class _Cached:
    """An autoencoder that has encoded its images before."""

    def __init__(self, latent: Tensor):
        self.latent = latent

    def encode_stage_2_inputs(self, image: Tensor) -> Tensor:
        return self.latent


def validation(model: DemoModel, repeats: int) -> list[Row]:
    """How far the validation loss of the same weights moves from one validation to the next."""
    cfg = settings("demo")
    with tempfile.TemporaryDirectory() as folder:
        cache = cached(Path(folder), model.sampler.autoencoder, model.images)
        stage = DiffusionStage(cfg, CPU, TOTAL_STEPS, cache.statistics(True))
        stage.start_from(WEIGHTS)
        losses = {"here": [stage.validate(cache)["loss"] for _ in range(2)]}
    torch.manual_seed(0)
    losses["tutorial"] = [_random_validation(model, stage) for _ in range(repeats)]
    return [
        {
            "difference": "validation at random timesteps",
            "measured": f"standard deviation of the loss from validation to validation, {len(model.images)} volumes",
            **{who: f"{np.std(values) / np.mean(values):.2%}" for who, values in losses.items()},
        }
    ]


def _random_validation(model: DemoModel, stage: DiffusionStage) -> float:
    """One random timestep, noise and draw of the latent for each volume, as the tutorial validates."""
    diffusion = build_diffusion(stage.cfg.noise_schedule)
    losses = []
    for mean, sigma in zip(model.mean, model.sigma, strict=True):
        clean = stage.statistics.normalise((mean + sigma * torch.randn_like(sigma))[None])
        noise, timesteps = torch.randn_like(clean), torch.rand(1) * 1000
        predicted = model.velocity(diffusion.add_noise(clean, noise, timesteps), timesteps)
        losses.append(float(F.mse_loss(predicted, diffusion.target(clean, noise, timesteps))))
    return float(np.mean(losses))


def validation_of_ranks(model: DemoModel) -> list[Row]:
    """What each of several processes takes for the validation loss where nobody adds them up."""
    reconstructed = model.decode(model.mean).clamp(0, 1)
    losses = (reconstructed - model.images).abs().flatten(1).mean(1)
    shares = [float(losses[rank::RANKS].mean() / losses.mean()) for rank in range(RANKS)]
    return [
        {
            "difference": "validation not reduced over processes",
            "measured": f"L1 of {RANKS} processes' shares of {len(losses)} volumes, as shares of the whole",
            "tutorial": from_to(shares),
            "here": "1",
        }
    ]


def resume(model: DemoModel, steps: int) -> list[Row]:
    """Weights of a run that was stopped halfway and resumed, against one that was not."""
    return [
        {
            "difference": "resume loads weights only",
            "measured": f"distance of the weights after {steps} more steps, as a share of the way they went",
            "tutorial": _resumed_reference(model, steps),
            "here": _resumed(model, steps),
        }
    ]


def _resumed_reference(model: DemoModel, steps: int) -> float:
    cfg = settings("demo", DDPM)
    batches = model.images.chunk(2)

    def train(recipe: ReferenceDiffusion, first: int) -> Tensor:
        for step in range(first, first + steps):
            torch.manual_seed(step)
            recipe.train_step(batches[step % len(batches)])
        return flat_weights(recipe.unet)

    undisturbed = ReferenceDiffusion(cfg, model.sampler.autoencoder, build_unet(cfg.diffusion_def), batches[0], CPU)
    halfway = train(undisturbed, 0)
    # A new process: weights are read, Adam begins anew, the scale factor is that of another batch.
    stopped = ReferenceDiffusion(cfg, model.sampler.autoencoder, undisturbed.unet, batches[1], CPU)
    return far(train(undisturbed, steps), train(stopped, steps), halfway)


def _resumed(model: DemoModel, steps: int) -> float:
    cfg = settings("demo", DDPM)
    latents = model.mean.chunk(2)

    def train(stage: DiffusionStage, first: int) -> Tensor:
        for step in range(first, first + steps):
            latent = latents[step % len(latents)]
            stage.train_step({"latent": latent, "case": [""]}, StepRandom(0, step, len(latent), CPU))
        return flat_weights(stage.unet)

    undisturbed = DiffusionStage(cfg, CPU, TOTAL_STEPS, model.flat)
    halfway = train(undisturbed, 0)
    stopped = DiffusionStage(cfg, CPU, TOTAL_STEPS, LatentStatistics(torch.zeros(1, 1, 1, 1), 1.0))
    stopped.load_state_dict(copy.deepcopy(undisturbed.state_dict()))
    return far(train(undisturbed, steps), train(stopped, steps), halfway)


def flat_weights(network: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten().clone() for weight in network.parameters()])


def far(one: Tensor, other: Tensor, start: Tensor) -> float:
    """Distance of two ends, as a share of the way from `start` to the first."""
    return float((one - other).norm() / (one - start).norm())


def old_weights() -> list[Row]:
    """An `AutoencoderKL` of `monai-generative` with attention, loaded by MONAI's own loader and by ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from generative.networks.nets import AutoencoderKL as OldAutoencoderKL

        plain = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "norm_num_groups": 8}
        torch.manual_seed(0)
        old = OldAutoencoderKL(
            **plain, num_channels=(8, 16), num_res_blocks=(1, 1), attention_levels=(False, True)
        ).eval()
    definition = settings("demo").autoencoder_def.model_copy(
        update={
            "channels": (8, 16),
            "latent_channels": 3,
            "norm_num_groups": 8,
            "attention_levels": (False, True),
            "with_encoder_nonlocal_attn": True,
            "with_decoder_nonlocal_attn": True,
            "patchify": 1,
        }
    )
    by_monai, ours = build_autoencoder(definition).eval(), build_autoencoder(definition).eval()
    by_monai.load_old_state_dict(dict(old.state_dict()))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(old.state_dict(), Path(folder) / AUTOENCODER)
        read_tutorial_weights(Path(folder) / AUTOENCODER, ours)
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = old.reconstruct(image)
    return [
        {
            "difference": "weights of monai-generative",
            "measured": "largest difference of a reconstruction from that package's, by MONAI's loader and by ours",
            "tutorial": float((by_monai.reconstruct(image) - wanted).abs().max()),
            "here": float((ours.reconstruct(image) - wanted).abs().max()),
        }
    ]
