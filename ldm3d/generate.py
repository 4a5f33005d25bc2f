"""Published weights as one network, from noise to volume, and a call that writes volumes: what exported folders use."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm3d.distributed import choose_device
from ldm3d.files import require_writable
from ldm3d.samplers import choose_sampler
from ldm3d.samples import file_name, write_sample
from ldm3d.sampling import Sampler, VolumeId, volume_generator


class Generator(nn.Module):
    """U-Net, sampler and decoder together.

    Args:
        model_dir: folder with the published weights.
        scheduler: ddpm, ddim, pndm or rflow; None for the default of the training.
        steps: network evaluations for a volume; None for the scheduler's default.
        device: where to compute; None for a GPU where there is one.
        amp: mixed precision where the device has it.
        decode_gib: memory for decoding; None for what is free.

    Raises:
        WeightsError: the weights are missing, damaged, or do not belong together.
        ConfigError: scheduler or steps do not fit the training.
    """

    def __init__(
        self,
        model_dir: str | Path,
        scheduler: str | None = None,
        steps: int | None = None,
        device: torch.device | str | None = None,
        amp: bool = True,
        decode_gib: float | None = None,
    ):
        super().__init__()
        chosen = choose_device() if device is None else torch.device(device)
        self.sampler = Sampler.from_folder(Path(model_dir), chosen, amp, decode_gib)
        self.unet, self.autoencoder = self.sampler.unet, self.sampler.autoencoder
        self.scheduler, self.steps = choose_sampler(self.sampler.card.schedule, scheduler, steps)

    def forward(self, noise: Tensor) -> Tensor:
        """Standard normal noise (B, C, X, Y, Z) of the latent's shape -> volumes (B, 1, X', Y', Z') in [0, 1]."""
        generators = [volume_generator(0, index) for index in range(len(noise))]
        return self.sampler.from_noise(noise, generators, self.scheduler, self.steps)

    def write(
        self,
        output: str | Path,
        num: int = 1,
        seed: int = 0,
        batch_size: int = 1,
        dtype: Literal["float32", "int16"] = "float32",
    ) -> list[Path]:
        """Write the volumes that `inference.py` makes with this seed, as NIfTI with a sidecar each.

        Args:
            output: folder for them.
            num: how many.
            seed: the same seed gives the same volumes.
            batch_size: volumes at once: changes speed and memory only.
            dtype: how voxels are stored.

        Returns:
            Their paths.

        Raises:
            ConfigError: the seed is out of range, or memory is too small.
            OutputError: the folder cannot be written to.
        """
        require_writable(output)
        paths = [Path(output) / file_name(VolumeId(seed, index)) for index in range(num)]
        for start in range(0, num, batch_size):
            indices = range(start, min(start + batch_size, num))
            volumes = self.sampler.sample(seed, indices, self.scheduler, self.steps)
            for index, values in zip(indices, volumes, strict=True):
                volume = VolumeId(seed, index)
                write_sample(paths[index], self.sampler, volume, values, self.scheduler, self.steps, dtype)
        return paths
