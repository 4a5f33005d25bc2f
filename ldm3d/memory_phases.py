"""What each phase of both stages holds at its peak, found by running its real code on stand-ins.

Nothing is computed and no GPU is needed; see `ldm3d.live_bytes` for what is counted and what is not.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.decoding import SLAB_BYTES
from ldm3d.decoding_costs import Costs
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentStatistics
from ldm3d.live_bytes import LiveBytes, nbytes, stand_ins
from ldm3d.networks import build_autoencoder, checkpoint_blocks
from ldm3d.perceptual_shape import NETWORKS, PerceptualShape
from ldm3d.randomness import StepRandom
from ldm3d.sampling import Sampler
from ldm3d.sampling_memory import take_two_steps
from ldm3d.schema import Config
from ldm3d.slabs import Keep
from ldm3d.training import Precision

CPU = torch.device("cpu")
BRATS_MM = (240, 240, 155)
"""Extent of a BraTS volume: what is validated whole where the configuration says no size."""
CHECKPOINTING: tuple[bool | str, ...] = (False, "norms", "blocks")
FACTS: dict[str, Any] = {"trained_on": "", "num_train": 1, "step": 0, "channel": 0, "spacing": (1.0, 1.0, 1.0)}


class TracedStage(ABC):
    """One stage on stand-ins, whose training step can be repeated with other settings.

    Args:
        cfg: the configuration.
        counter: of the surrounding `stand_ins`.
        autocast: mixed precision where the configuration wants it, as on a GPU.
    """

    def __init__(self, cfg: Config, counter: LiveBytes, autocast: bool):
        self.cfg, self.counter = cfg, counter
        self.autocast = autocast and cfg.amp
        self._at_backward: list[int] = []
        self.build()
        self.set_up(self.autocast, cfg.use_checkpointing)
        self.train_step()

    # What the two stages differ in.
    name: str
    factor: int
    """Patches must be divisible by it."""
    stage: Any
    networks: list[nn.Module]
    batch_size: int
    patch_size: tuple[int, int, int]

    @abstractmethod
    def build(self) -> None:
        """Make the stage, and set what is declared above."""

    @abstractmethod
    def make_batch(self, batch_size: int, patch_size: Sequence[int]) -> Any:
        """A batch of patches (X, Y, Z) in voxels of the image, as the stage is given it."""

    @abstractmethod
    def step(self, batch: Any) -> None:
        """One training step."""

    def set_up(self, autocast: bool, checkpointing: bool | str) -> None:
        """Switch precision and recomputation, whatever they were before."""
        _set_precision(self.stage.precision, autocast)
        for network in self.networks:
            for module in network.modules():
                module.__dict__.pop("forward", None)
            if checkpointing:
                checkpoint_blocks(network, keep_convolutions=checkpointing == "norms")

    def train_step(self, batch_size: int | None = None, patch_size: Sequence[int] | None = None) -> int:
        """Peak of one step, in bytes; the configuration's sizes unless others are given."""
        batch = self.make_batch(batch_size or self.batch_size, patch_size or self.patch_size)
        self.counter.start_over()
        self.step(batch)
        return self.counter.peak

    def activations(self) -> int:
        """Bytes that forward has kept when backward begins, at the configuration's sizes."""
        batch = self.make_batch(self.batch_size, self.patch_size)
        before = self.counter.now - self.gradients()
        self._at_backward.clear()
        with patch.object(Tensor, "backward", self._noting(Tensor.backward)):
            self.step(batch)
        return self._at_backward[0] - before

    def _noting(self, backward: Callable[..., None]) -> Callable[..., None]:
        def noting(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._at_backward.append(self.counter.now - self.gradients())
            return backward(loss, *args, **kwargs)

        return noting

    def batch(self) -> int:
        """Bytes of the batch of one step."""
        return nbytes(self.make_batch(self.batch_size, self.patch_size))

    @abstractmethod
    def parameters(self) -> int:
        """Bytes of all networks that are on the device while the stage trains."""

    @abstractmethod
    def moments(self) -> int:
        """Bytes of AdamW's two moments."""

    def ema(self) -> int:
        """Bytes of the running average, where there is one."""
        return 0

    @abstractmethod
    def validate(self) -> int:
        """Peak of validating one volume."""

    def gradients(self) -> int:
        """Bytes of those that are there now; between two steps there are none."""
        return nbytes([p.grad for network in self.networks for p in network.parameters()])

    def peak_of(self, action: Callable[[], Any]) -> int:
        self.counter.start_over()
        action()
        return self.counter.peak


class TracedAutoencoder(TracedStage):
    """Stage 1."""

    name = "autoencoder"

    def build(self) -> None:
        train = self.cfg.autoencoder_train
        self.factor = self.cfg.autoencoder_def.downsampling
        without = train.model_copy(update={"perceptual_weight": 0.0})
        plain = self.cfg.model_copy(update={"autoencoder_train": without, "use_checkpointing": False})
        self.stage = AutoencoderStage(plain, CPU, 2)
        if train.perceptual_weight and train.perceptual_network in NETWORKS:
            self.stage.loss.train_cfg = train
            self.stage.loss.perceptual = PerceptualShape(train.perceptual_network)
        self.networks = [self.stage.autoencoder, self.stage.discriminator]
        self.batch_size, self.patch_size = train.batch_size, train.patch_size

    def make_batch(self, batch_size: int, patch_size: Sequence[int]) -> Any:
        return {"image": torch.rand(batch_size, 1, *patch_size), "case": [""] * batch_size}

    def step(self, batch: Any) -> None:
        self.stage.train_step(batch, _random(batch), self.stage.has_discriminator)

    def parameters(self) -> int:
        return nbytes([list(n.parameters()) for n in self.networks])

    def moments(self) -> int:
        return _moments(self.stage.optimizer) + _moments(self.stage.discriminator_optimizer)

    def validate(self, size: Sequence[int] | None = None) -> int:
        """Peak of validating one volume of `size`, or of the configuration's."""
        self.stage.autoencoder.eval()
        image = torch.rand(1, 1, *(size or validation_size(self.cfg)))
        return self.peak_of(lambda: self.stage.reconstruct(image))


class TracedDiffusion(TracedStage):
    """Stage 2. The autoencoder is on the device too, for previews."""

    name = "diffusion"

    def build(self) -> None:
        train = self.cfg.diffusion_train
        self.factor = self.cfg.autoencoder_def.downsampling * self.cfg.diffusion_def.downsampling
        self.autoencoder = build_autoencoder(self.cfg.autoencoder_def).eval().requires_grad_(False)
        self.encoding = self.peak_of(self.encode)
        mean = torch.zeros(self.cfg.latent_shape if train.center_latents else (1, 1, 1, 1))
        plain = self.cfg.model_copy(update={"use_checkpointing": False})
        self.stage = DiffusionStage(plain, CPU, 2, LatentStatistics(mean, 1.0))
        self.networks = [self.stage.unet]
        self.batch_size, self.patch_size = train.batch_size, train.patch_size

    def encode(self) -> None:
        """As `ldm3d.latents` does it: one volume and, where wanted, its mirror image, without autocast."""
        train = self.cfg.diffusion_train
        with torch.inference_mode():
            self.autoencoder.encode(torch.rand(1 + train.flip, 1, *train.patch_size))

    def make_batch(self, batch_size: int, patch_size: Sequence[int]) -> Any:
        factor = self.cfg.autoencoder_def.downsampling
        if self.cfg.diffusion_train.center_latents and tuple(patch_size) != self.patch_size:
            self.stage.statistics = LatentStatistics(torch.zeros(1, 1, 1, 1), 1.0)
        latent = torch.rand(batch_size, self.cfg.latent_channels, *(n // factor for n in patch_size))
        return {"latent": latent, "case": [""] * batch_size}

    def step(self, batch: Any) -> None:
        self.stage.train_step(batch, _random(batch))

    def parameters(self) -> int:
        return nbytes([list(n.parameters()) for n in (self.stage.unet, self.autoencoder)])

    def moments(self) -> int:
        return _moments(self.stage.optimizer)

    def ema(self) -> int:
        return nbytes(list(self.stage.ema.network.parameters()))

    def validate(self) -> int:
        return self.peak_of(lambda: self.stage.validate(_OneLatent(self.cfg.latent_shape)))

    def sample(self, batch_size: int) -> int:
        """Peak of two steps of sampling so many volumes at once."""
        sampler = self.sampler()
        noise = torch.zeros(batch_size, *self.cfg.latent_shape)

        with torch.inference_mode():
            return self.peak_of(lambda: take_two_steps(sampler, noise))

    def decode(self) -> int:
        """Peak of decoding one volume whole."""
        sampler, latent = self.sampler(), torch.zeros(1, *self.cfg.latent_shape)

        def decode() -> Tensor:
            with sampler.precision.autocast():
                volume: Tensor = sampler.autoencoder.decode(sampler.statistics.restore(latent)).float()
                return volume

        with torch.inference_mode():
            return self.peak_of(decode)

    def decode_in_pieces(self) -> int:
        """The same with as little on the device as `ldm3d.decoding` manages without loss."""
        costs = Costs(self.autoencoder, (1, *self.cfg.latent_shape), self.autocast)
        pieces, _ = costs.pieces(SLAB_BYTES[-1], Keep(on_host=True))
        return nbytes(list(self.autoencoder.parameters())) + pieces

    def sampler(self) -> Sampler:
        card = self.stage.card({**FACTS, "autoencoder_sha256": ""}, {})
        sampler = Sampler(self.autoencoder, self.stage.ema.network, self.stage.statistics, card, CPU)
        _set_precision(sampler.precision, self.autocast)
        return sampler

    def training_only(self) -> int:
        """Bytes that only training needs, of what is live between two steps."""
        own = nbytes(list(self.stage.unet.parameters()))
        return own + self.gradients() + self.moments()


class _OneLatent:
    """A latent cache of one volume."""

    def __init__(self, shape: Sequence[int]):
        self.shape = shape

    def __len__(self) -> int:
        return 1

    def mean(self, index: int, device: torch.device) -> Tensor:
        return torch.zeros(1, *self.shape)


def _random(batch: dict[str, Any]) -> StepRandom:
    return StepRandom(0, 0, len(batch["case"]), CPU)


def _set_precision(precision: Precision, autocast: bool) -> None:
    precision.enabled, precision.dtype = autocast, torch.bfloat16


def _moments(optimizer: Any) -> int:
    return nbytes(optimizer.adamw.state_dict()["state"])


def validation_size(cfg: Config) -> tuple[int, ...]:
    """What stage 1 validates with: `val_patch_size`, else a whole BraTS volume, padded."""
    factor = cfg.autoencoder_def.downsampling
    whole = (math.ceil(math.ceil(mm / s) / factor) * factor for mm, s in zip(BRATS_MM, cfg.spacing, strict=True))
    return cfg.autoencoder_train.val_patch_size or tuple(whole)


@contextmanager
def _traced(kind: type[TracedStage], cfg: Config, autocast: bool) -> Iterator[Any]:
    with stand_ins() as counter:
        yield kind(cfg, counter, autocast)


TRACED = {"autoencoder": partial(_traced, TracedAutoencoder), "diffusion": partial(_traced, TracedDiffusion)}
"""Each takes (configuration, whether it is for a GPU, which has autocast) and is a context in which nothing is real."""
