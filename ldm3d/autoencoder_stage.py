"""Stage 1: one training step of the autoencoder and its discriminator, validation, publication."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor

from ldm3d import distributed
from ldm3d.cards import AUTOENCODER, DISCRIMINATOR, AutoencoderCard, DiscriminatorCard
from ldm3d.errors import NonFiniteLoss
from ldm3d.kernels import batch_invariant
from ldm3d.losses import AutoencoderLoss
from ldm3d.metrics import reconstruction
from ldm3d.networks import PatchAutoencoderKL, build_autoencoder, build_discriminator
from ldm3d.randomness import StepRandom
from ldm3d.schema import Config
from ldm3d.training import (
    Optimizer,
    Precision,
    accumulating,
    guarded_step,
    parallel,
    prepare_network,
    require_finite_validation,
    value_range,
)
from ldm3d.weights import check_definition, load_into, read_weights, save_weights

Batch = dict[str, Any]


class AutoencoderStage:
    """Networks, losses and optimizers of stage 1.

    Args:
        cfg: the configuration.
        device: where to train.
        total_steps: length of the whole training.
    """

    name = "autoencoder"

    def __init__(self, cfg: Config, device: torch.device, total_steps: int):
        self.cfg, self.device = cfg, device
        self.has_discriminator = cfg.autoencoder_train.adv_weight > 0
        torch.manual_seed(cfg.seed)
        network = build_autoencoder(cfg.autoencoder_def)
        self.autoencoder: AutoencoderKL = prepare_network(network, cfg, device)
        self.discriminator = prepare_network(
            build_discriminator(cfg.discriminator_def, cfg.image_channels), cfg, device
        )
        self.loss = AutoencoderLoss(cfg.autoencoder_train).to(device)
        train = cfg.autoencoder_train
        self.precision = Precision(cfg.amp, device)
        self.optimizer = Optimizer(
            self.autoencoder.parameters(), train, total_steps, self.precision, cfg.max_skipped_steps
        )
        self.discriminator_optimizer = Optimizer(
            self.discriminator.parameters(), train, total_steps, Precision(cfg.amp, device), cfg.max_skipped_steps
        )
        self.parallel_autoencoder = parallel(self.autoencoder, device, train.accumulate_steps)
        self.parallel_discriminator = parallel(self.discriminator, device, train.accumulate_steps)

    def train_step(self, batch: Batch, random: StepRandom, adversarial: bool) -> dict[str, Tensor]:
        """One step of the autoencoder and, after the warm-up, of the discriminator.

        Args:
            batch: `image` (B, 1, X, Y, Z) in [0, 1] and `case` names; B is `batch_size` times `accumulate_steps`.
            random: what the step draws, and its number.
            adversarial: the warm-up is over.

        Returns:
            Weighted loss terms by name, detached, with `discriminator` and `gradient_norm`.

        Raises:
            NonFiniteLoss: before a bad number reaches a weight.
        """
        image = batch["image"].to(self.device, non_blocking=True)
        noise = random.normal(self.latent_shape(image))
        parts = self.cfg.autoencoder_train.accumulate_steps
        terms: dict[str, Tensor] = {}
        latents = []
        for number, part in enumerate(zip(image.chunk(parts), noise.chunk(parts), strict=True), 1):
            with accumulating(number < parts, self.parallel_autoencoder, self.parallel_discriminator):
                new, mean = self._backward(*part, adversarial, 1 / parts)
            terms = {name: terms.get(name, 0) + term.detach() / parts for name, term in new.items()}
            latents.append(mean)

        def error(norms: list[float]) -> NonFiniteLoss:
            names = ("gradient_norm", "discriminator_gradient_norm")
            values = {name: float(term) for name, term in terms.items()} | dict(zip(names, norms, strict=False))
            ranges = {"image": value_range(image), "latent": value_range(torch.cat(latents))}
            return NonFiniteLoss(random.step, values, batch["case"], ranges)

        # Summed as they were for the gradient: what is logged beside the loss is no part of it.
        losses = [torch.stack([term for name, term in terms.items() if name != "discriminator"]).sum()]
        optimizers = [self.optimizer]
        if adversarial:
            losses.append(terms["discriminator"])
            optimizers.append(self.discriminator_optimizer)
        norms = guarded_step(optimizers, losses, error)
        return terms | {"gradient_norm": norms[0]}

    def _backward(
        self, image: Tensor, noise: Tensor, adversarial: bool, share: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of one batch, as a share of the step; its terms and its latents' means."""
        with self.precision.autocast():
            reconstructed, mean, sigma = self.parallel_autoencoder(image, noise)
            verdict = self._verdict(reconstructed) if adversarial else None
            terms = self.loss.generator(image, reconstructed, mean, sigma, verdict)
        self.optimizer.backward(torch.stack(list(terms.values())).sum() * share)
        if adversarial:
            terms["discriminator"] = self._discriminator_loss(image, reconstructed.detach())
            self.discriminator_optimizer.backward(terms["discriminator"] * share)
        return terms, mean.detach()

    def _verdict(self, reconstructed: Tensor) -> Tensor:
        """The discriminator's opinion, with gradients for the autoencoder only."""
        self.discriminator.requires_grad_(False)
        verdict: Tensor = self.discriminator(reconstructed)[-1]
        self.discriminator.requires_grad_(True)
        return verdict

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        with self.precision.autocast():
            # One forward pass for both halves: DistributedDataParallel takes one per backward pass.
            verdicts = self.parallel_discriminator(torch.cat([fake, real]))[-1]
            return self.loss.discriminator(*verdicts.chunk(2))

    def latent_shape(self, image: Tensor) -> tuple[int, ...]:
        """(C, X, Y, Z) of the latent of images (B, 1, X', Y', Z')."""
        factor = self.cfg.autoencoder_def.downsampling
        return self.cfg.latent_channels, *(n // factor for n in image.shape[2:])

    def start_fresh(self, first_look: Callable[[], Tensor]) -> None:
        """Let a network that knows how use some training volumes (N, 1, X, Y, Z) for a good start."""
        if isinstance(self.autoencoder, PatchAutoencoderKL):
            self.autoencoder.start_with_principal_components(first_look().to(self.device))

    @torch.inference_mode()
    def reconstruct(self, image: Tensor) -> Tensor:
        """Decode the latent's mean: (B, 1, X, Y, Z) in [0, 1], without sampling."""
        with batch_invariant(self.device), self.precision.autocast():
            reconstructed: Tensor = self.autoencoder.reconstruct(image.to(self.device))
        return reconstructed.float().clamp(0, 1)

    def validate(self, loader: Iterable[Batch]) -> tuple[dict[str, float], tuple[Tensor, Tensor] | None]:
        """PSNR (dB), SSIM and L1 over the whole validation set, and the first volume with its reconstruction.

        Nothing where no process was given a volume.

        Raises:
            NonFiniteValidation: on all processes.
        """
        self.autoencoder.eval()
        rows: list[dict[str, float]] = []
        bad: list[str] = []
        shown = None
        for batch in loader:
            image, reconstructed = batch["image"], self.reconstruct(batch["image"])
            measures = reconstruction([image[0, 0].numpy()], [reconstructed[0, 0].cpu().numpy()])
            # None is what is not finite: all three of a bad reconstruction, PSNR alone of a perfect one.
            rows.append({name: float(measure["value"] or 0.0) for name, measure in measures.items()})
            if measures["l1"]["value"] is None:
                bad += batch["case"]
            shown = shown or (image[0, 0], reconstructed[0, 0])
        self.autoencoder.train()
        require_finite_validation("l1", bad)
        gathered = [row for part in distributed.gather_objects(rows) for row in part]
        names = gathered[0] if gathered else {}
        return {name: sum(row[name] for row in gathered) / len(gathered) for name in names}, shown

    def publish(self, model_dir: Path, facts: dict[str, Any], validation: dict[str, float]) -> None:
        """Write the current weights with their description, from rank 0."""
        if not distributed.is_main():
            return
        card = AutoencoderCard(definition=self.cfg.autoencoder_def, validation=validation, **facts)
        save_weights(model_dir / AUTOENCODER, self.autoencoder.state_dict(), card)
        if self.has_discriminator:
            judge = DiscriminatorCard(definition=self.cfg.discriminator_def, **facts)
            save_weights(model_dir / DISCRIMINATOR, self.discriminator.state_dict(), judge)

    def start_from(self, folder: Path) -> None:
        """Begin with published weights; the discriminator's too, where there are any."""
        tensors, card = read_weights(folder / AUTOENCODER, AutoencoderCard)
        check_definition(folder / AUTOENCODER, card.definition, self.cfg.autoencoder_def, "autoencoder_def")
        load_into(self.autoencoder, tensors, folder / AUTOENCODER)
        if (folder / DISCRIMINATOR).is_file():
            tensors, judge = read_weights(folder / DISCRIMINATOR, DiscriminatorCard)
            check_definition(folder / DISCRIMINATOR, judge.definition, self.cfg.discriminator_def, "discriminator_def")
            load_into(self.discriminator, tensors, folder / DISCRIMINATOR)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "autoencoder": self.autoencoder.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
