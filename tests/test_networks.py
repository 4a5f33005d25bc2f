"""ldm3d.networks: shapes, the linear path, recomputed blocks."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from monai.networks.nets import AutoencoderKL, PatchDiscriminator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm3d.networks import (
    PatchAutoencoderKL,
    build_autoencoder,
    build_discriminator,
    build_unet,
    checkpoint_blocks,
    count_parameters,
    depth_to_space,
    space_to_depth,
)
from ldm3d.schema import Config

PATCHIFIED = tiny.config(latent_channels=5, autoencoder_def={"patchify": 2, "latent_channels": 5}, **tiny.latents(5))


def patch_autoencoder(seed: int = 0) -> PatchAutoencoderKL:
    return tiny.autoencoder(PATCHIFIED, seed)


def rough_images(count: int) -> Tensor:
    """Smooth volumes with detail, so that no few components explain all of it."""
    noise = torch.randn(count, 1, 16, 16, 16, generator=torch.Generator().manual_seed(9))
    return (tiny.images(count) + 0.05 * noise).clamp(0, 1)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_folding_blocks_is_undone_by_unfolding(block: int) -> None:
    x = torch.randn(2, 3, 2 * block, 4 * block, 3 * block)
    folded = space_to_depth(x, block)
    assert folded.shape == (2, 3 * block**3, 2, 4, 3)
    assert torch.equal(depth_to_space(folded, block), x)


def test_each_block_lies_in_the_channels_of_its_place() -> None:
    x = torch.randn(1, 2, 4, 6, 4)
    folded = space_to_depth(x, 2)
    for channel in range(2):
        assert torch.equal(folded[0, channel * 8 : channel * 8 + 8, 1, 2, 0], x[0, channel, 2:4, 4:6, 0:2].flatten())


def test_shapes_of_the_patch_autoencoder() -> None:
    network = patch_autoencoder()
    image = torch.rand(2, 1, 16, 8, 24)
    mean, sigma = network.encode(image)
    assert mean.shape == sigma.shape == (2, 5, 4, 2, 6)
    assert PATCHIFIED.autoencoder_def.downsampling == 4
    assert network.decode(mean).shape == image.shape
    assert [part.shape for part in network(image)] == [image.shape, mean.shape, mean.shape]
    assert network.reconstruct(image).shape == image.shape


def test_fresh_patch_autoencoder_is_principal_component_analysis() -> None:
    images, network = rough_images(8), patch_autoencoder()
    network.start_with_principal_components(images)
    mean, _ = network.encode(images)
    expected, components = principal_components(images.numpy(), side=4, count=5)
    reconstructed = network.decode(mean).numpy()
    np.testing.assert_allclose(reconstructed, expected, atol=2e-5)
    assert psnr(reconstructed, images.numpy()) == pytest.approx(psnr(expected, images.numpy()), abs=0.01)
    assert psnr(reconstructed, images.numpy()) > 20
    # Each channel is one component, up to its sign, of unit variance before `latent_scale`.
    unscaled = (mean / network.latent_scale).transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(unscaled.var(axis=1, ddof=1), 1, rtol=1e-4)
    correlation = np.corrcoef(unscaled, components)[:5, 5:]
    np.testing.assert_allclose(np.abs(correlation), np.eye(5), atol=1e-3)


def principal_components(images: np.ndarray, side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruction of images (N, 1, X, Y, Z) from their blocks' components, and the components' values.

    The blocks' mean is one number for all voxels of a block, as in the network.
    """
    n, _, *size = images.shape
    i, j, k = (length // side for length in size)
    blocks = images.reshape(n, i, side, j, side, k, side).transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, side**3)
    blocks = blocks.astype(np.float64)
    _, _, directions = np.linalg.svd(blocks - blocks.mean(axis=0), full_matrices=False)
    values = (blocks - blocks.mean(axis=0)) @ directions[:count].T
    restored = values @ directions[:count] + blocks.mean()
    restored = restored.reshape(n, i, j, k, side, side, side).transpose(0, 1, 4, 2, 5, 3, 6)
    return restored.reshape(images.shape), values.T


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(a - b).mean()))


def test_channels_of_the_latent_keep_part_of_their_components_spread() -> None:
    images, network = rough_images(8), patch_autoencoder()
    network.start_with_principal_components(images)
    mean, _ = network.encode(images)
    _, components = principal_components(images.numpy(), side=4, count=5)
    spread = np.sqrt(components.std(axis=1))
    ratio = mean.transpose(0, 1).flatten(1).std(dim=1).numpy() / spread
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    assert spread[0] / spread[-1] > 1.5  # there is something to keep


def test_training_sees_the_posterior_before_it_is_scaled() -> None:
    images, network = rough_images(8), patch_autoencoder()
    network.start_with_principal_components(images)
    mean, sigma = network.encode(images)
    torch.manual_seed(0)
    reconstructed, inner_mean, inner_sigma = network.eval()(images)
    torch.testing.assert_close(inner_mean * network.latent_scale, mean)
    torch.testing.assert_close(inner_sigma * network.latent_scale, sigma)
    torch.manual_seed(0)
    sampled = network.decode((inner_mean + inner_sigma * torch.randn(mean.shape)) * network.latent_scale)
    torch.testing.assert_close(reconstructed, sampled, atol=1e-5, rtol=1e-5)


def test_more_components_than_an_image_has_are_harmless() -> None:
    network = patch_autoencoder()
    flat = torch.full((2, 1, 16, 16, 16), 0.25)
    network.start_with_principal_components(flat)
    mean, _ = network.encode(flat)
    assert torch.isfinite(mean).all()
    torch.testing.assert_close(network.decode(mean), flat, atol=1e-3, rtol=0)


def test_without_blocks_it_is_monais_autoencoder() -> None:
    cfg = tiny.config()
    ours = tiny.autoencoder(cfg)
    torch.manual_seed(0)
    monais = AutoencoderKL(**cfg.autoencoder_def.model_dump(exclude={"patchify"})).eval()
    assert isinstance(ours, AutoencoderKL) and type(ours) is not PatchAutoencoderKL
    nn.init.constant_(monais.quant_conv_log_sigma.conv.bias, ours.quant_conv_log_sigma.conv.bias[0].item())
    assert tiny.equal_states(ours.state_dict(), monais.state_dict())


@pytest.mark.parametrize("cfg", [tiny.config(), PATCHIFIED], ids=["plain", "patchified"])
def test_a_fresh_posterior_is_narrow(cfg: Config) -> None:
    _, sigma = tiny.autoencoder(cfg).encode(rough_images(2))
    assert sigma.mean().item() == pytest.approx(0.05, abs=0.01)


def test_discriminator_judges_patches() -> None:
    network = build_discriminator(tiny.config().discriminator_def, in_channels=1)
    assert isinstance(network, PatchDiscriminator)
    verdict = network(torch.rand(2, 1, 16, 16, 16))[-1]
    assert verdict.shape[:2] == (2, 1)
    assert all(1 < n < 16 for n in verdict.shape[2:])


def test_fresh_unet_predicts_zero_and_takes_fractions_of_timesteps() -> None:
    cfg = tiny.config()
    latent = torch.randn(2, *cfg.latent_shape)
    timesteps = torch.tensor([0.25, 999.5])
    assert not build_unet(cfg.diffusion_def)(latent, timesteps=timesteps).any()
    network = tiny.unet(cfg)
    assert network(latent, timesteps=timesteps).shape == latent.shape
    assert not torch.equal(network(latent, timesteps=timesteps), network(latent, timesteps=timesteps.floor()))


def test_parameters_are_counted() -> None:
    assert count_parameters(nn.Linear(3, 4)) == 3 * 4 + 4


def gradients(network: nn.Module, *inputs: Tensor) -> list[Tensor]:
    for parameter in network.parameters():
        parameter.requires_grad_(True).grad = None
    output = network(*inputs)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    # The encoder's log-variance takes part in training only; here it may have no gradient.
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


NETWORKS = {
    "autoencoder": lambda: (tiny.shaken(build_autoencoder(tiny.config().autoencoder_def)), (tiny.images(2),)),
    "patchified": lambda: (tiny.shaken(build_autoencoder(PATCHIFIED.autoencoder_def)), (tiny.images(2),)),
    "unet": lambda: (
        tiny.unet().train(),
        (torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10.0, 700.0])),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_blocks_change_nothing(name: str) -> None:
    results = []
    for prepare in (lambda network: network, checkpoint_blocks):
        network, inputs = NETWORKS[name]()
        prepare(network)
        torch.manual_seed(5)
        with torch.no_grad():
            output = network(*inputs)
        torch.manual_seed(5)
        results.append((output, gradients(network, *inputs), network.state_dict()))
    assert len(results[0][1]) > 20
    assert tiny.equal_states(results[0], results[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_recomputed_in_the_backward_pass_only(name: str) -> None:
    network, inputs = NETWORKS[name]()
    calls: dict[str, int] = {}
    blocks = {
        key: m for key, m in network.named_modules() if type(m).__name__ in {"AEKLResBlock", "DiffusionUNetResnetBlock"}
    }
    assert len(blocks) >= 4
    for key, block in blocks.items():
        block.conv1.register_forward_hook(lambda *_, key=key: calls.update({key: calls.get(key, 0) + 1}))
    checkpoint_blocks(network)
    with torch.no_grad():
        network(*inputs)
    assert set(calls.values()) == {1}
    calls.clear()
    gradients(network, *inputs)
    assert calls == dict.fromkeys(blocks, 2)


def with_norms_recomputed(network: nn.Module) -> nn.Module:
    return checkpoint_blocks(network, keep_convolutions=True)


UPDOWN = tiny.config(diffusion_def={"resblock_updown": True})
NETWORKS_TO_RECOMPUTE = NETWORKS | {
    "unet that resamples in blocks": lambda: (tiny.unet(UPDOWN).train(), NETWORKS["unet"]()[1])
}


@pytest.mark.parametrize("name", NETWORKS_TO_RECOMPUTE)
@pytest.mark.parametrize("recompute", [checkpoint_blocks, with_norms_recomputed])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_changes_no_bit_of_a_gradient(name: str, recompute: Any, autocast: bool) -> None:
    results = []
    for prepare in (lambda network: network, recompute):
        network, inputs = NETWORKS_TO_RECOMPUTE[name]()
        prepare(network)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(network, *inputs))
    assert len(results[0]) > 20
    assert tiny.equal_states(results[0], results[1])


class Operations(TorchDispatchMode):
    """Counts what is really computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_that_are_kept_are_not_computed_again(name: str) -> None:
    convolutions, norms = [], []
    for prepare in (lambda network: network, with_norms_recomputed, checkpoint_blocks):
        network, inputs = NETWORKS[name]()
        prepare(network)
        with Operations() as operations:
            gradients(network, *inputs)
        convolutions.append(operations.counts["aten.convolution.default"])
        norms.append(operations.counts["aten.native_group_norm.default"])
    assert convolutions[0] == convolutions[1] < convolutions[2]
    assert norms[0] < norms[1] == norms[2]
