"""One training step and one validation of each recipe, as pieces of work that can be timed and measured.

Both recipes start from the same weights and see the same volumes. Ours are the stages that the scripts train with.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.measure import Work
from benchmarks.reference import ReferenceAutoencoder, ReferenceDiffusion
from benchmarks.settings import CPU, settings
from ldm3d import distributed
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentCache, build_latent_cache
from ldm3d.networks import build_autoencoder
from ldm3d.randomness import StepRandom
from ldm3d.schema import Config

NUM_VOLUMES = 4
TOTAL_STEPS = 1000
_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Of the latent caches; removed at the end of the process."""


class Images(Dataset[dict[str, Any]]):
    """Volumes in memory, as the loaders give them."""

    def __init__(self, volumes: Tensor):
        self.volumes = volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.volumes[index], "case": f"case{index}"}


def volumes(count: int, size: tuple[int, int, int]) -> Tensor:
    """Smooth random volumes (count, 1, X, Y, Z) in [0, 1]: what they show does not change what they cost."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 1, 4, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=size, mode="trilinear")


def autoencoder_step(cfg: Config, device: torch.device, ours: bool) -> Work:
    """One step of stage 1 on one batch, after the adversarial warm-up if there is an adversarial term."""
    stage = AutoencoderStage(cfg, device, TOTAL_STEPS)
    image = volumes(cfg.autoencoder_train.batch_size, cfg.autoencoder_train.patch_size)
    if ours:
        batch = {"image": image, "case": ["a"] * len(image)}
        return lambda: stage.train_step(batch, StepRandom(0, 0, len(image), device), stage.has_discriminator)
    reference = ReferenceAutoencoder(cfg, stage.autoencoder, device)
    return lambda: reference.train_step(image)


def autoencoder_validation(cfg: Config, device: torch.device, ours: bool) -> Work:
    """Validation of stage 1 on whole volumes; ours gives PSNR and SSIM besides L1."""
    stage = AutoencoderStage(cfg, device, TOTAL_STEPS)
    image = volumes(NUM_VOLUMES, cfg.diffusion_train.patch_size)
    if ours:
        loader = [{"image": row[None], "case": ["a"]} for row in image]
        return lambda: stage.validate(loader)
    reference = ReferenceAutoencoder(cfg, stage.autoencoder, device)
    return lambda: reference.validate(image.split(1))


def diffusion_step(cfg: Config, device: torch.device, ours: bool) -> Work:
    """One step of stage 2: ours on latents that it reads from the cache, the reference's on volumes in memory."""
    return _diffusion(cfg, device, ours, cfg.diffusion_train.batch_size, _our_step, _reference_step)


def diffusion_validation(cfg: Config, device: torch.device, ours: bool) -> Work:
    """Validation of stage 2: ours at 8 fixed levels of noise for each volume, the reference's at one random level."""
    return _diffusion(cfg, device, ours, NUM_VOLUMES, _our_validation, _reference_validation)


def _diffusion(
    cfg: Config,
    device: torch.device,
    ours: bool,
    count: int,
    make_ours: Callable[[DiffusionStage, LatentCache], Work],
    make_reference: Callable[[ReferenceDiffusion, Tensor], Work],
) -> Work:
    torch.manual_seed(cfg.seed)
    autoencoder = build_autoencoder(cfg.autoencoder_def).to(device).eval()
    image = volumes(count, cfg.diffusion_train.patch_size)
    cache = _cache(autoencoder, image, device)
    stage = DiffusionStage(cfg, device, TOTAL_STEPS, cache.statistics(False))
    if ours:
        return make_ours(stage, cache)
    return make_reference(ReferenceDiffusion(cfg, autoencoder, stage.unet, image, device), image)


def _cache(autoencoder: Any, image: Tensor, device: torch.device) -> LatentCache:
    _folders.append(tempfile.TemporaryDirectory(prefix="ldm3d-benchmark-"))
    folder = Path(distributed.broadcast_object(_folders[-1].name))
    names = [str(i) for i in range(len(image))]
    return build_latent_cache(folder, autoencoder, "none", Images(image), names, False, device)  # type: ignore[arg-type]


def _our_step(stage: DiffusionStage, cache: LatentCache) -> Work:
    indices = list(range(len(cache)))

    def step() -> None:
        random = StepRandom(0, 0, len(cache), stage.device)
        stage.train_step({"latent": cache.sample(indices, random), "case": cache.cases}, random)

    return step


def _reference_step(reference: ReferenceDiffusion, image: Tensor) -> Work:
    return lambda: reference.train_step(image)


def _our_validation(stage: DiffusionStage, cache: LatentCache) -> Work:
    return lambda: stage.validate(cache)


def _reference_validation(reference: ReferenceDiffusion, image: Tensor) -> Work:
    return lambda: reference.validate(image.split(1))


WORKS: dict[str, Callable[[Config, torch.device, bool], Work]] = {
    "autoencoder step": autoencoder_step,
    "diffusion step": diffusion_step,
    "autoencoder validation": autoencoder_validation,
    "diffusion validation": diffusion_validation,
}


def named_work(name: str, networks: str, ours: bool) -> Work:
    """A piece of work on the CPU by the names of work and networks: what a process of its own is told to do."""
    return WORKS[name](settings(networks), CPU, ours)
