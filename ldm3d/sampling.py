"""Noise -> latent -> volume. One Sampler for the script, the service and the notebook.

Volume i of a request depends on (weights, settings, seed, i) alone. Its noise comes from a generator of its own, on
the CPU; and inside a batch on the CPU nothing is computed otherwise than alone: see `ldm3d.kernels`. Another machine,
another number of threads, and on a GPU another batch size, can add in another order, which shows in the last digits.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

from ldm3d.allocator import free_bytes
from ldm3d.cards import AUTOENCODER, UNET, DiffusionCard
from ldm3d.console import log
from ldm3d.decoding import GIB, Plan, choose_plan, decode, move, waiting_on_host
from ldm3d.diffusion import sample_latent
from ldm3d.errors import ConfigError, WeightsError
from ldm3d.files import sha256
from ldm3d.kernels import batch_invariant, has_onednn
from ldm3d.latents import LatentStatistics
from ldm3d.samplers import LARGEST_SEED, choose_sampler
from ldm3d.training import Precision
from ldm3d.weights import load_autoencoder, load_unet


class VolumeId(NamedTuple):
    """Which volume: `number`, from 0, of the request with this seed."""

    seed: int
    number: int


class Sampler:
    """Generates volumes with trained weights.

    Args:
        autoencoder: decodes the latents.
        unet: denoises them.
        statistics: how latents were normalised in training.
        card: what the diffusion network was trained with.
        device: where to compute.
        amp: mixed precision where the device has it.
        digests: of the weights' files, for provenance.
        decode_gib: memory for decoding; None for what is free.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        unet: nn.Module,
        statistics: LatentStatistics,
        card: DiffusionCard,
        device: torch.device,
        amp: bool = True,
        digests: dict[str, str] | None = None,
        decode_gib: float | None = None,
    ):
        self.autoencoder = autoencoder.to(device).eval()
        self.unet = unet.to(device).eval()
        self.statistics = statistics
        self.card = card
        self.device = device
        self.precision = Precision(amp, device)
        self.digests = digests or {}
        self.decode_bytes = None if decode_gib is None else int(decode_gib * GIB)
        self.decoding: Plan | None = None

    @classmethod
    def from_folder(
        cls, model_dir: Path, device: torch.device, amp: bool = True, decode_gib: float | None = None
    ) -> "Sampler":
        """Load published weights.

        Raises:
            WeightsError: they are missing, damaged, or do not belong together.
        """
        autoencoder, _ = load_autoencoder(model_dir)
        unet, mean, card = load_unet(model_dir)
        digests = {name: sha256(model_dir / name) for name in (AUTOENCODER, UNET)}
        if digests[AUTOENCODER] != card.autoencoder_sha256:
            raise WeightsError(
                f"{model_dir / UNET}: was trained on the latents of another {AUTOENCODER} than the one beside it; "
                "put the two that belong together into one folder, or train the diffusion model again"
            )
        statistics = LatentStatistics(mean, card.scale_factor)
        return cls(autoencoder, unet, statistics, card, device, amp, digests, decode_gib)

    def sample(
        self,
        seed: int,
        indices: Sequence[int],
        scheduler: str | None = None,
        steps: int | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Generate the volumes `indices` of one request together: `sample_volumes` with one seed."""
        return self.sample_volumes([VolumeId(seed, index) for index in indices], scheduler, steps, on_step)

    def sample_volumes(
        self,
        volumes: Sequence[VolumeId],
        scheduler: str | None = None,
        steps: int | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Generate volumes, of one request or of several, together.

        Args:
            volumes: which.
            scheduler: ddpm, ddim, pndm or rflow; None for the default of the training.
            steps: network evaluations; None for the scheduler's default.
            on_step: called after each step with its number.

        Returns:
            (B, 1, X, Y, Z) float32 in [0, 1], on the CPU.

        Raises:
            ConfigError: the scheduler does not fit the training, seed or steps are out of range, or there is not
                memory enough to decode.
        """
        generators = [volume_generator(*volume) for volume in volumes]
        noise = torch.stack([torch.randn(self.card.latent_shape, generator=g) for g in generators])
        return self.from_noise(noise, generators, scheduler, steps, on_step)

    @torch.inference_mode()
    def from_noise(
        self,
        noise: Tensor,
        generators: list[torch.Generator],
        scheduler: str | None = None,
        steps: int | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Generate volumes of given noise (B, C, X, Y, Z), standard normal.

        Samplers that draw noise at each step take each volume's from its generator. The other arguments, the result
        and what is raised are as in `sample_volumes`.
        """
        name, count = choose_sampler(self.card.schedule, scheduler, steps)
        move(self.unet, self.device)  # on a GPU an error may have left it on the host
        with batch_invariant(self.device):
            noise = noise.to(self.device)
            latents = sample_latent(self._denoise, noise, generators, self.card.schedule, name, count, on_step)
            return self.decode(latents)

    def _denoise(self, latent: Tensor, timesteps: Tensor) -> Tensor:
        # Without oneDNN a single sample would be convolved by another kernel than several: it is given a twin.
        alone = len(latent) == 1 and self.device.type == "cpu" and not has_onednn(latent)
        if alone:
            latent, timesteps = latent.repeat(2, 1, 1, 1, 1), timesteps.repeat(2)
        with self.precision.autocast():
            prediction: Tensor = self.unet(latent, timesteps=timesteps).float()
        return prediction[:1] if alone else prediction

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, X, Y, Z), one after the other -> volumes (B, 1, X', Y', Z') in [0, 1], on the CPU.

        How is kept as `decoding`, and logged where it is in pieces or windows and was not so before. On a GPU without
        room enough the U-Net waits on the host meanwhile.

        Raises:
            ConfigError: there is not memory enough.
        """
        latents = self.statistics.restore(latents)
        weights = sum(p.numel() * p.element_size() for p in self.unet.parameters())
        movable = 0 if self.device.type == "cpu" else weights
        budget = free_bytes(self.device) if self.decode_bytes is None else self.decode_bytes
        plan = choose_plan(self.autoencoder, latents[:1], budget, self.precision.enabled, movable)
        if str(plan) != str(self.decoding) and (plan.slab_bytes or plan.window):
            log(f"decoding: {plan}, about {plan.peak / GIB:.2g} GiB")
        self.decoding = plan
        with waiting_on_host(self.unet, self.device) if plan.alone else nullcontext():
            return torch.cat([self._decode(latent[None], plan) for latent in latents])

    def _decode(self, latent: Tensor, plan: Plan) -> Tensor:
        with self.precision.autocast():
            volume = decode(self.autoencoder, latent, plan)
        return volume.float().clamp(*self.card.intensity_range).cpu()


def volume_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of volume `index` of a request; streams of different (seed, index) have nothing in common.

    Raises:
        ConfigError: the seed is out of range.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed {seed}: must be between 0 and {LARGEST_SEED}")
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
