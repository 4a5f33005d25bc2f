"""The recipe that is compared with: MONAI's tutorial `generation/3d_ldm`, with MONAI's own classes.

What makes it what it is, and is kept: the autoencoder in float32 with anomaly detection on, Adam as torch makes it by
default, two passes of the discriminator; stage 2 with the frozen autoencoder encoding every volume at every step, plain
attention, on a GPU float16 autocast with loss scaling; 1000 DDPM steps in float32, one volume at a time; data decoded
from NIfTI into MONAI's `CacheDataset`; cuDNN's search for fast kernels on. Each step's losses are read, as its
TensorBoard lines do.

What is left out of both recipes: the perceptual term, whose weights need a network.

What is better here than there: volumes are sampled with the scale factor of the training, and clipping of latents is
off; neither changes the time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai import transforms
from monai.data import CacheDataset
from monai.inferers import LatentDiffusionInferer
from monai.losses import PatchAdversarialLoss
from monai.networks.schedulers import DDPMScheduler
from torch import Tensor, nn

from benchmarks.measure import clone_weights
from ldm3d.networks import build_autoencoder, build_discriminator, build_unet
from ldm3d.schema import Config

KL_WEIGHT = 1e-7
BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
NUM_TIMESTEPS = 1000


class ReferenceAutoencoder:
    """Stage 1 of the tutorial.

    Args:
        cfg: networks, learning rate and adversarial weight; the networks of both recipes are the same.
        weights: to start with.
        device: where to train.
        anomaly: anomaly detection, which the tutorial leaves on.
    """

    def __init__(self, cfg: Config, weights: nn.Module, device: torch.device, anomaly: bool = True):
        torch.backends.cudnn.benchmark = True
        self.device, self.anomaly = device, anomaly
        self.adv_weight = cfg.autoencoder_train.adv_weight
        self.autoencoder = clone_weights(weights, build_autoencoder(cfg.autoencoder_def)).to(device)
        self.discriminator = build_discriminator(cfg.discriminator_def, cfg.image_channels).to(device)
        self.adversarial = PatchAdversarialLoss(criterion="least_squares")
        lr = cfg.autoencoder_train.lr
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=lr)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr)

    def train_step(self, image: Tensor) -> float:
        """One step as after the warm-up; without an adversarial weight, as before it. Returns the L1 term."""
        with torch.autograd.set_detect_anomaly(self.anomaly):
            image = image.to(self.device)
            self.optimizer.zero_grad(set_to_none=True)
            reconstruction, mean, sigma = self.autoencoder(image)
            l1 = F.l1_loss(reconstruction, image)
            loss = l1 + KL_WEIGHT * summed_kl(mean, sigma)
            if self.adv_weight:
                verdict = self.discriminator(reconstruction.contiguous().float())[-1]
                fooled = self.adversarial(verdict, target_is_real=True, for_discriminator=False)
                loss = loss + self.adv_weight * fooled
            loss.backward()
            self.optimizer.step()
            if self.adv_weight:
                self._discriminator_step(image, reconstruction.detach())
            return l1.item()

    def _discriminator_step(self, image: Tensor, reconstruction: Tensor) -> None:
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        fake = self.adversarial(self.discriminator(reconstruction)[-1], target_is_real=False, for_discriminator=True)
        real = self.adversarial(self.discriminator(image)[-1], target_is_real=True, for_discriminator=True)
        (self.adv_weight * 0.5 * (fake + real)).backward()
        self.discriminator_optimizer.step()

    @torch.no_grad()
    def validate(self, images: Sequence[Tensor]) -> float:
        """Mean L1 of volumes (1, 1, X, Y, Z), one at a time."""
        self.autoencoder.eval()
        losses = []
        for image in images:
            moved = image.to(self.device)
            losses.append(F.l1_loss(self.autoencoder(moved)[0], moved).item())
        self.autoencoder.train()
        return sum(losses) / len(losses)


def summed_kl(mean: Tensor, sigma: Tensor) -> Tensor:
    """Summed over the latent, averaged over the batch, as the tutorial weighs it."""
    variance = sigma.square()
    return 0.5 * (mean.square() + variance - variance.log() - 1).flatten(1).sum(1).mean()


class ReferenceDiffusion:
    """Stage 2 of the tutorial.

    Args:
        cfg: networks and learning rate.
        autoencoder: frozen.
        unet: weights to start with.
        first: images (B, 1, X, Y, Z) of the first batch, whose latents give the scale factor.
        device: where to train.
    """

    def __init__(self, cfg: Config, autoencoder: nn.Module, unet: nn.Module, first: Tensor, device: torch.device):
        torch.backends.cudnn.benchmark = True
        self.device = device
        self.autoencoder: Any = clone_weights(autoencoder, build_autoencoder(cfg.autoencoder_def)).to(device).eval()
        plain = cfg.diffusion_def.model_copy(update={"use_flash_attention": False})
        self.unet = clone_weights(unet, build_unet(plain)).to(device)
        self.scheduler = DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS, **BETAS, clip_sample=False)
        self.half = device.type == "cuda"  # torch's autocast of the tutorial is CUDA's
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.half)
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=cfg.diffusion_train.lr)
        with torch.no_grad(), self._autocast():
            latent = self.autoencoder.encode_stage_2_inputs(first.to(device))
        self.latent_shape = latent.shape[1:]
        self.inferer = LatentDiffusionInferer(self.scheduler, scale_factor=float(1 / latent.float().std()))

    def _autocast(self) -> Any:
        return torch.autocast("cuda", dtype=torch.float16, enabled=self.half)

    def train_step(self, image: Tensor) -> float:
        """One step on images (B, 1, X, Y, Z); returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(image)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    @torch.no_grad()
    def validate(self, images: Sequence[Tensor]) -> float:
        """Mean loss at random timesteps of volumes (1, 1, X, Y, Z), one at a time."""
        self.unet.eval()
        losses = [self._loss(image) for image in images]
        self.unet.train()
        return float(torch.stack(losses).mean())

    def _loss(self, image: Tensor) -> Tensor:
        image = image.to(self.device)
        with self._autocast():
            noise = torch.randn(len(image), *self.latent_shape, dtype=image.dtype).to(self.device)
            timesteps = torch.randint(0, NUM_TIMESTEPS, (len(image),), device=self.device)
            predicted = self.inferer(
                inputs=image,
                autoencoder_model=self.autoencoder,
                diffusion_model=self.unet,
                noise=noise,
                timesteps=timesteps,
            )
            return F.mse_loss(predicted.float(), noise.float())

    @torch.no_grad()
    def denoise(self, steps: int) -> Tensor:
        """The first `steps` of the 1000 steps from noise to the latent of one volume, in float32."""
        self.unet.eval()
        self.scheduler.set_timesteps(NUM_TIMESTEPS)
        latent = torch.randn(1, *self.latent_shape).to(self.device)
        for timestep in self.scheduler.timesteps[:steps]:
            prediction = self.unet(latent, timesteps=timestep[None].to(self.device))
            latent, _ = self.scheduler.step(prediction, timestep, latent)
        return latent

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """(1, 1, X, Y, Z) of a latent, on the CPU."""
        return self.autoencoder.decode_stage_2_outputs(latent / self.inferer.scale_factor).cpu()


def reference_dataset(
    images: Sequence[Path], cfg: Config, patch_size: Sequence[int], random_crop: bool
) -> CacheDataset:
    """The tutorial's data: all volumes through deterministic transforms into memory, then crop and scale each visit."""
    crop: Any = (
        transforms.RandSpatialCropd(keys="image", roi_size=patch_size, random_size=False)
        if random_crop
        else transforms.CenterSpatialCropd(keys="image", roi_size=patch_size)
    )
    steps = [
        transforms.LoadImaged(keys="image"),
        transforms.EnsureChannelFirstd(keys="image"),
        transforms.Lambdad(keys="image", func=lambda x: x[cfg.channel : cfg.channel + 1]),
        transforms.EnsureTyped(keys="image"),
        transforms.Orientationd(keys="image", axcodes="RAS"),
        transforms.Spacingd(keys="image", pixdim=cfg.spacing, mode="bilinear"),
        crop,
        transforms.ScaleIntensityRangePercentilesd(keys="image", lower=0, upper=99.5, b_min=0, b_max=1),
        transforms.SpatialPadd(keys="image", spatial_size=patch_size),
    ]
    items = [{"image": str(path)} for path in images]
    return CacheDataset(items, transforms.Compose(steps), cache_rate=1.0, num_workers=None, progress=False)
