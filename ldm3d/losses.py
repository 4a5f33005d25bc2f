"""The terms of the autoencoder's loss."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss, PerceptualLoss
from torch import Tensor, nn

from ldm3d import distributed
from ldm3d.console import log
from ldm3d.sections import AutoencoderTrain


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence of N(mean, sigma^2) from N(0, 1), in nats, averaged over all elements of the latent.

    Kingma and Welling 2014, appendix B, give it for one element. Because it is averaged, not summed as in the MONAI
    tutorial, its weight means the same for every patch size and number of latent channels.

    Args:
        mean: (B, C, X, Y, Z).
        sigma: standard deviation, of the same shape, positive.
    """
    mean, sigma = mean.float(), sigma.float()
    variance = sigma.square()
    # The smallest normal number keeps log finite where a half-precision sigma has underflowed to 0.
    floor = torch.finfo(torch.float32).tiny
    return 0.5 * (mean.square() + variance - variance.clamp_min(floor).log() - 1).mean()


class AutoencoderLoss(nn.Module):
    """Reconstruction + KL + perceptual + adversarial, each already weighted, by name.

    Args:
        train: weights and kinds of the terms.
    """

    def __init__(self, train: AutoencoderTrain):
        super().__init__()
        self.train_cfg = train
        self.reconstruct = F.l1_loss if train.recon_loss == "l1" else F.mse_loss
        self.perceptual = load_perceptual(train) if train.perceptual_weight else None
        # MONAI applies a LeakyReLU before the squares unless told otherwise; least squares (Mao et al. 2017) has none.
        self.adversarial = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def formula(self) -> str:
        """The loss with its weights, for people: `l1 + 0.001 kl + 0.01 adversarial from epoch 6`."""
        train = self.train_cfg
        terms = [train.recon_loss, f"{train.kl_weight:g} kl"]
        if self.perceptual is not None:
            terms.append(f"{train.perceptual_weight:g} perceptual ({train.perceptual_network})")
        if train.adv_weight:
            terms.append(f"{train.adv_weight:g} adversarial from epoch {train.adv_warm_up_epochs + 1}")
        return " + ".join(terms)

    def generator(
        self, image: Tensor, reconstruction: Tensor, mean: Tensor, sigma: Tensor, verdict: Tensor | None
    ) -> dict[str, Tensor]:
        """Weighted terms for the autoencoder.

        Args:
            image: (B, 1, X, Y, Z) in [0, 1].
            reconstruction: of the same shape.
            mean: latent mean (B, C, X', Y', Z').
            sigma: latent standard deviation.
            verdict: the discriminator's last output on `reconstruction`; None during the warm-up.
        """
        train = self.train_cfg
        terms = {
            "reconstruction": self.reconstruct(reconstruction.float(), image.float()),
            "kl": train.kl_weight * kl_divergence(mean, sigma),
        }
        if self.perceptual is not None:
            terms["perceptual"] = train.perceptual_weight * self.perceptual(reconstruction.float(), image.float())
        if verdict is not None:
            adversarial = self.adversarial(verdict.float(), target_is_real=True, for_discriminator=False)
            terms["adversarial"] = train.adv_weight * adversarial
        return terms

    def discriminator(self, verdict_fake: Tensor, verdict_real: Tensor) -> Tensor:
        """Loss of the discriminator: mean of its squared errors on fakes (target 0) and reals (target 1)."""
        fake = self.adversarial(verdict_fake.float(), target_is_real=False, for_discriminator=True)
        real = self.adversarial(verdict_real.float(), target_is_real=True, for_discriminator=True)
        loss: Tensor = 0.5 * (fake + real)
        return loss


def load_perceptual(train: AutoencoderTrain) -> nn.Module | None:
    """MONAI's perceptual network, frozen; None with a notice where any process cannot have its weights.

    All processes call this together: with a term that only some have, each would train on another loss.
    """
    loss, reason = _perceptual(train)
    reasons = [reason for reason in distributed.gather_objects(reason) if reason]
    if loss is None or reasons:
        log(
            f"notice: no perceptual loss: the weights of {train.perceptual_network!r} cannot be loaded ({reasons[0]}). "
            "To use it, install the package that is named, if one is, and run once where there is a network, or set "
            "autoencoder_train.perceptual_weights to a folder that holds them"
        )
        return None
    return loss.eval().requires_grad_(False)


def _perceptual(train: AutoencoderTrain) -> tuple[nn.Module | None, str]:
    """The network, or why this process cannot have it."""
    is_3d = train.perceptual_network.startswith("medicalnet_")
    folder = train.perceptual_weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = PerceptualLoss(
                spatial_dims=3,
                network_type=train.perceptual_network,
                is_fake_3d=not is_3d,
                channel_wise=is_3d,
                cache_dir=str(_existing(folder)) if folder else None,
            )
    except Exception as error:  # torch.hub, lpips and torchvision each raise their own kinds
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return None, f"{type(error).__name__}: {reason}"
    return loss, ""


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return folder
