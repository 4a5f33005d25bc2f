"""Build the networks from their definitions, and fit them to the machine."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm3d.definitions import AutoencoderDef, DiffusionDef, DiscriminatorDef

# A fresh posterior then has standard deviation 0.05 instead of 1, which would drown the signal for hundreds of steps.
INITIAL_LOG_VARIANCE = -6.0


class GivenNoiseAutoencoderKL(AutoencoderKL):  # type: ignore[misc]  # monai tells mypy no types
    """MONAI's `AutoencoderKL`, to which the noise of the posterior can be given.

    So the noise can be a function of the volume, not of the process that happens to compute it.
    """

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (B, C, X, Y, Z), posterior mean and standard deviation.

        Args:
            x: image (B, C, X, Y, Z).
            noise: standard normal, of the latent's shape; from the global random state by default.
        """
        mean, sigma = self.encode(x)
        return self.decode(with_noise(mean, sigma, noise)), mean, sigma


class PatchAutoencoderKL(GivenNoiseAutoencoderKL):
    """`AutoencoderKL` for small machines: it works on blocks of voxels, beside a linear path from image to latent.

    Space to depth before the network and depth to space behind it make the first level `patchify`^3 times cheaper
    (Chen et al. 2024, Deep Compression Autoencoder, section 3.1). The linear path carries the image's principal
    components from the first step on (`start_with_principal_components`); the network learns what it lacks.

    Args:
        patchify: voxels a side of one block.
        in_channels: channels of the image, (B, in_channels, X, Y, Z); X, Y, Z divisible by the whole downsampling.
        out_channels: channels of the reconstruction.
        channels: as for `AutoencoderKL`.
        latent_channels: as for `AutoencoderKL`.
        arguments: the others of `AutoencoderKL`.
    """

    def __init__(
        self,
        patchify: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        latent_channels: int,
        **arguments: Any,
    ):
        block = patchify**3
        super().__init__(
            in_channels=in_channels * block,
            out_channels=out_channels * block,
            channels=channels,
            latent_channels=latent_channels,
            **arguments,
        )
        self.patchify = patchify
        side = patchify * 2 ** (len(channels) - 1)
        self.project = nn.Conv3d(in_channels, latent_channels, side, stride=side)
        self.unproject = nn.ConvTranspose3d(latent_channels, out_channels, side, stride=side)
        self.register_buffer("latent_scale", torch.ones(1, latent_channels, 1, 1, 1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (B, C, X / f, Y / f, Z / f) of images (B, 1, X, Y, Z) in [0, 1]."""
        mean, sigma = self._posterior(x)
        return mean * self.latent_scale, sigma * self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 1, X, Y, Z), near [0, 1] but not clipped, of latents as `encode` gives them."""
        return self._image(z / self.latent_scale)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, and the posterior before it is scaled: the KL term wants all channels near N(0, 1)."""
        mean, sigma = self._posterior(x)
        return self._image(with_noise(mean, sigma, noise)), mean, sigma

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, sigma = super().encode(space_to_depth(x, self.patchify))
        return mean + self.project(x), sigma

    def _image(self, z: Tensor) -> Tensor:
        image: Tensor = depth_to_space(super().decode(z), self.patchify) + self.unproject(z)
        return image

    @torch.no_grad()
    def start_with_principal_components(self, images: Tensor) -> None:
        """Make the fresh network equal to the principal components of the images' blocks.

        Inside, all channels have unit variance, which trains fastest. Outside, `latent_scale` gives each the square
        root of its component's spread: between equal spread, with which diffusion spends as much care on the faintest
        detail as on a block's brightness and leaves blocks visible, and the components' own, which drowns the detail.

        Args:
            images: (N, 1, X, Y, Z), some of the training volumes.
        """
        side = self.project.kernel_size[0]
        project_bias, unproject_bias = self.project.bias, self.unproject.bias
        assert project_bias is not None and unproject_bias is not None
        blocks = space_to_depth(images, side).transpose(0, 1).flatten(1).double()
        mean = blocks.mean(1, keepdim=True)
        variances, directions = torch.linalg.eigh(torch.cov(blocks))
        leading = variances.argsort(descending=True)[: self.latent_channels]
        spread = variances[leading].clamp_min(1e-8).sqrt()[:, None]
        components = directions[:, leading].T
        self.project.weight.copy_((components / spread).view_as(self.project.weight))
        project_bias.copy_((-(components @ mean) / spread).flatten())
        self.unproject.weight.copy_((components * spread).view_as(self.unproject.weight))
        nn.init.zeros_(unproject_bias)
        nn.init.zeros_(self.quant_conv_mu.conv.weight)
        nn.init.zeros_(self.quant_conv_mu.conv.bias)
        last = self.decoder.blocks[-1].conv
        nn.init.zeros_(last.weight)
        # Every voxel of a block has nearly the same mean, as blocks lie anywhere in the head.
        last.bias.fill_(mean.mean())
        self.latent_scale.copy_((spread / spread.mean()).sqrt().view_as(self.latent_scale))


def with_noise(mean: Tensor, sigma: Tensor, noise: Tensor | None) -> Tensor:
    """A draw from the posterior (Kingma and Welling 2014, section 2.4)."""
    return mean + sigma * (torch.randn_like(sigma) if noise is None else noise)


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C * block^3, X / block, Y / block, Z / block)."""
    batch, channels, *size = x.shape
    i, j, k = (n // block for n in size)
    folded = x.reshape(batch, channels, i, block, j, block, k, block).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return folded.reshape(batch, channels * block**3, i, j, k)


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Inverse of `space_to_depth`."""
    batch, channels, i, j, k = x.shape
    unfolded = x.reshape(batch, channels // block**3, block, block, block, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return unfolded.reshape(batch, channels // block**3, i * block, j * block, k * block)


def build_autoencoder(definition: AutoencoderDef) -> AutoencoderKL:
    """A fresh autoencoder: `encode` gives mean and standard deviation (B, C, X/f, Y/f, Z/f), f = `downsampling`."""
    arguments = definition.model_dump(exclude={"patchify"})
    if definition.patchify == 1:
        network = GivenNoiseAutoencoderKL(**arguments)
    else:
        network = PatchAutoencoderKL(patchify=definition.patchify, **arguments)
    nn.init.constant_(network.quant_conv_log_sigma.conv.bias, INITIAL_LOG_VARIANCE)
    return network


def build_discriminator(definition: DiscriminatorDef, in_channels: int) -> PatchDiscriminator:
    """A fresh discriminator: (B, C, X, Y, Z) -> list of feature maps, the last one the verdict on each patch."""
    return PatchDiscriminator(spatial_dims=3, in_channels=in_channels, out_channels=1, **definition.model_dump())


def build_unet(definition: DiffusionDef) -> DiffusionModelUNet:
    """A fresh diffusion network: latent (B, C, X, Y, Z) and timesteps (B,) -> prediction of the latent's shape."""
    return DiffusionModelUNet(**definition.model_dump())


def checkpoint_blocks(network: nn.Module, keep_convolutions: bool = False) -> nn.Module:
    """Compute activations of the residual blocks again in the backward pass instead of keeping them.

    MONAI's own flag keeps whole stages and fails under autocast on some builds; blocks keep a third of the memory.

    Args:
        network: is changed in place.
        keep_convolutions: keep what the first of a block's two convolutions gives: only normalisations and activation
            functions are computed again. Nothing needs what the second one gives.
    """
    for module in network.modules():
        if isinstance(module, AEKLResBlock | DiffusionUNetResnetBlock):
            # A block that changes the grid between its halves is computed again as a whole.
            in_halves = keep_convolutions and not _resamples(module)
            module.forward = partial(_block_in_halves, module) if in_halves else partial(_recomputed, module.forward)
    return network


def _resamples(block: nn.Module) -> bool:
    if not isinstance(block, DiffusionUNetResnetBlock):
        return False
    return block.upsample is not None or block.downsample is not None


def _recomputed(forward: Any, *inputs: Tensor) -> Any:
    """`forward`, whose activations are computed again when they are needed. It must draw no random numbers."""
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


def _block_in_halves(block: Any, x: Tensor, embedding: Tensor | None = None) -> Tensor:
    """MONAI's residual block. Computing a half again ends before its convolution, as nothing needs what that gives."""
    h = _recomputed(partial(_half, block.norm1, block.conv1), x)
    if embedding is not None:
        h = h + block.time_emb_proj(F.silu(embedding))[:, :, None, None, None]
    h = _recomputed(partial(_half, block.norm2, block.conv2), h)
    shortcut = block.nin_shortcut if isinstance(block, AEKLResBlock) else block.skip_connection
    summed: Tensor = shortcut(x) + h
    return summed


def _half(norm: nn.Module, convolution: nn.Module, x: Tensor) -> Any:
    return convolution(F.silu(norm(x)))


def compile_blocks(network: nn.Module, dynamic: bool | None = None) -> nn.Module:
    """Compile residual blocks one by one: seconds of compiling instead of minutes for the whole network.

    Args:
        network: whose blocks are compiled, in place.
        dynamic: as for `torch.compile`: one graph for many shapes, one for each, or (None) as torch thinks best.
    """
    # Blocks share their code, for which torch makes 8 graphs and leaves what needs another one uncompiled: the U-Net of
    # config_train_32g.json needs 8 in training alone.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in network.modules():
        if isinstance(module, AEKLResBlock | DiffusionUNetResnetBlock):
            module.compile(dynamic=dynamic)
    return network


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
