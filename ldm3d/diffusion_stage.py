"""Stage 2: one training step of the diffusion network, validation, publication."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm3d import distributed
from ldm3d.cards import UNET, DiffusionCard
from ldm3d.diffusion import build_diffusion
from ldm3d.errors import NonFiniteLoss, WeightsError
from ldm3d.latents import LatentCache, LatentStatistics
from ldm3d.networks import build_unet
from ldm3d.randomness import StepRandom
from ldm3d.schema import Config
from ldm3d.training import (
    EMA,
    Optimizer,
    Precision,
    accumulating,
    guarded_step,
    parallel,
    prepare_network,
    require_finite_validation,
    value_range,
)
from ldm3d.weights import LATENT_MEAN, check_definition, load_into, read_weights, save_weights

Batch = dict[str, Any]

VALIDATION_LEVELS = 8
VALIDATION_SEED = 1234


class DiffusionStage:
    """Network, noise, running average and optimizer of stage 2.

    Args:
        cfg: the configuration.
        device: where to train.
        total_steps: length of the whole training.
        statistics: how latents are normalised.
    """

    name = "diffusion"

    def __init__(self, cfg: Config, device: torch.device, total_steps: int, statistics: LatentStatistics):
        self.cfg, self.device, self.statistics = cfg, device, statistics
        train = cfg.diffusion_train
        torch.manual_seed(cfg.seed)
        network = build_unet(cfg.diffusion_def).to(device)
        self.ema = EMA(network, train.ema_decay)
        self.unet = prepare_network(network, cfg, device)
        self.diffusion = build_diffusion(cfg.noise_schedule)
        self.precision = Precision(cfg.amp, device)
        self.optimizer = Optimizer(self.unet.parameters(), train, total_steps, self.precision, cfg.max_skipped_steps)
        self.parallel_unet = parallel(self.unet, device, train.accumulate_steps)

    def train_step(self, batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        """One step on latents as the autoencoder gave them.

        Args:
            batch: `latent` (B, C, X, Y, Z) and `case` names; B is `batch_size` times `accumulate_steps`.
            random: what the step draws, and its number.

        Returns:
            `loss` and `gradient_norm`, detached.

        Raises:
            NonFiniteLoss: before any weight is touched.
        """
        clean = self.statistics.normalise(batch["latent"].to(self.device))
        noise, timesteps = random.normal(clean.shape[1:]), self.diffusion.draw_timesteps(random)
        parts = self.cfg.diffusion_train.accumulate_steps
        loss = torch.zeros((), device=self.device)
        for number, part in enumerate(zip(*(x.chunk(parts) for x in (clean, noise, timesteps)), strict=True), 1):
            with accumulating(number < parts, self.parallel_unet):
                share = self._losses(self.parallel_unet, *part).mean() / parts
                self.optimizer.backward(share)
            loss += share.detach()

        def error(norms: list[float]) -> NonFiniteLoss:
            values = {"loss": float(loss), "gradient_norm": norms[0]}
            ranges = {"latent": value_range(batch["latent"]), "normalised latent": value_range(clean)}
            return NonFiniteLoss(random.step, values, batch["case"], ranges)

        (norm,) = guarded_step([self.optimizer], [loss], error)
        self.ema.update(self.unet, random.step)
        return {"loss": loss, "gradient_norm": norm}

    def _losses(self, unet: torch.nn.Module, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of each sample, (B,)."""
        noisy = self.diffusion.add_noise(clean, noise, timesteps)
        target = self.diffusion.target(clean, noise, timesteps)
        with self.precision.autocast():
            prediction = unet(noisy, timesteps=timesteps)
        return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)

    @torch.inference_mode()
    def validate(self, cache: LatentCache, going_on: Callable[[], bool] = lambda: True) -> dict[str, float]:
        """Loss of the running average on fixed latents, fixed noise and a fixed grid of timesteps.

        Args:
            cache: latents of the validation volumes, of which each process takes its share.
            going_on: asked before each volume; where it says no, the rest is left out.

        Returns:
            `loss` over all, and `level_1` (least noise) to `level_8` (most).

        Raises:
            NonFiniteValidation: on all processes.
        """
        share = range(distributed.rank(), len(cache), distributed.world_size())
        sums = torch.zeros(VALIDATION_LEVELS + 1, dtype=torch.float64)
        timesteps = self.diffusion.grid(VALIDATION_LEVELS).to(self.device)
        bad = []
        for index in takewhile(lambda _: going_on(), share):
            clean = self.statistics.normalise(cache.mean(index, self.device))
            generator = torch.Generator().manual_seed(VALIDATION_SEED + index)
            noise = torch.randn((VALIDATION_LEVELS, *clean.shape[1:]), generator=generator).to(self.device)
            losses = self._losses(self.ema.network, clean.expand(len(noise), -1, -1, -1, -1), noise, timesteps)
            sums += torch.cat([losses, torch.ones(1, device=self.device)]).double().cpu()
            if not torch.isfinite(losses).all().item():
                bad.append(cache.cases[index])
        require_finite_validation("loss", bad)
        sums = distributed.all_sum(sums)
        by_level = (sums[:-1] / sums[-1]).tolist()
        return {"loss": sum(by_level) / len(by_level)} | {f"level_{i + 1}": v for i, v in enumerate(by_level)}

    def publish(self, model_dir: Path, facts: dict[str, Any], validation: dict[str, float]) -> None:
        """Write the running average with its description, from rank 0."""
        if distributed.is_main():
            tensors = self.ema.network.state_dict() | {LATENT_MEAN: self.statistics.mean}
            save_weights(model_dir / UNET, tensors, self.card(facts, validation))

    def card(self, facts: dict[str, Any], validation: dict[str, float]) -> DiffusionCard:
        """The description that is stored with the weights."""
        return DiffusionCard(
            definition=self.cfg.diffusion_def,
            schedule=self.cfg.noise_schedule,
            scale_factor=self.statistics.scale_factor,
            latent_shape=self.cfg.latent_shape,
            ema_decay=self.cfg.diffusion_train.ema_decay,
            validation=validation,
            **facts,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "unet": self.unet.state_dict(),
            "ema": self.ema.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale_factor": self.statistics.scale_factor,
            "latent_mean": self.statistics.mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        self.ema.network.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics = LatentStatistics(state["latent_mean"], state["scale_factor"])

    def start_from(self, folder: Path) -> None:
        """Begin with published weights, and keep the normalisation that they know.

        Raises:
            WeightsError: they are missing, or of another architecture, schedule or latent shape.
        """
        path = folder / UNET
        tensors, card = read_weights(path, DiffusionCard)
        check_definition(path, card.definition, self.cfg.diffusion_def, "diffusion_def")
        check_definition(path, card.schedule, self.cfg.noise_schedule, "NoiseScheduler")
        mean = tensors.pop(LATENT_MEAN, torch.zeros(1, 1, 1, 1))
        if mean.numel() > 1 and tuple(mean.shape) != self.cfg.latent_shape:
            raise WeightsError(
                f"{path}: is centred on latents of {tuple(mean.shape)}, but diffusion_train.patch_size makes them "
                f"{self.cfg.latent_shape}; keep the patch_size that the weights were trained with"
            )
        self.statistics = LatentStatistics(mean, card.scale_factor)
        load_into(self.unet, tensors, path)
        load_into(self.ema.network, tensors, path)
