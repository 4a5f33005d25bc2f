"""ldm3d.sampling: a volume is a function of (weights, settings, seed, index), and lies where its latent belongs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.errors import ConfigError, WeightsError
from ldm3d.files import sha256
from ldm3d.kernels import BatchInvariant
from ldm3d.latents import LatentStatistics
from ldm3d.samplers import LARGEST_SEED
from ldm3d.sampling import Sampler, volume_generator
from ldm3d.schema import Config
from ldm3d.weights import LATENT_MEAN, save_weights

NO_MEAN = torch.zeros(1, 1, 1, 1)
FLOW = {"NoiseScheduler": {"type": "rflow"}}
# Numbers of channels and voxels that fill no vector register, and a coarsest level of a single voxel.
ODD = {
    "diffusion_def": {
        "channels": [12, 24],
        "attention_levels": [True, True],
        "num_head_channels": 12,
        "norm_num_groups": 4,
    },
    "diffusion_train": {"patch_size": [12, 8, 20]},
}
ONE_VOXEL = {
    "diffusion_def": {"channels": [16, 32, 32], "attention_levels": [True, True, True]},
    "diffusion_train": {"patch_size": [8, 8, 8]},
}
FEW = {"NoiseScheduler": {"type": "ddpm", "num_train_timesteps": 4, "beta_start": 0.1, "beta_end": 0.5}}


def sampler_of(cfg: Config, statistics: LatentStatistics | None = None, unet: nn.Module | None = None) -> Sampler:
    statistics = statistics or LatentStatistics(NO_MEAN, 1.25)
    return Sampler(tiny.autoencoder(cfg), unet or tiny.unet(cfg), statistics, tiny.diffusion_card(cfg), tiny.CPU)


def latents_of(cfg: Config) -> Sampler:
    """A sampler that hands out its latents as they are: nothing is hidden by the autoencoder or by clipping."""
    sampler = sampler_of(cfg)
    sampler.decode = lambda latent: latent  # type: ignore[method-assign]
    return sampler


# Reproducible


@pytest.mark.parametrize(
    ("settings", "scheduler", "steps"),
    [
        (FLOW, "rflow", 3),
        ({}, "ddim", 3),
        (FEW, "ddpm", 4),
        (FLOW | ODD, "rflow", 2),
        (FLOW | ONE_VOXEL, "rflow", 2),
        ({"diffusion_def": {"attention_levels": [True, True], "use_flash_attention": False}}, "ddim", 2),
        ({"diffusion_def": {"use_combined_linear": True, "resblock_updown": True}}, "ddim", 2),
    ],
    ids=["rflow", "ddim", "ddpm", "odd", "one voxel", "plain attention", "combined linear"],
)
def test_a_volume_does_not_depend_on_its_batch(settings: dict[str, Any], scheduler: str, steps: int) -> None:
    sampler = latents_of(tiny.config(**settings))
    alone = {i: sampler.sample(7, [i], scheduler, steps)[0] for i in range(8)}
    for indices in ([0, 1], [1, 0], [3, 0, 6], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]):
        together = sampler.sample(7, indices, scheduler, steps)
        for position, index in enumerate(indices):
            assert torch.equal(together[position], alone[index]), (indices, index)
    assert torch.equal(sampler.sample(7, [3], scheduler, steps)[0], alone[3])  # after all the others


def test_nor_does_it_with_more_threads(two_threads: None) -> None:
    sampler = latents_of(tiny.config(**FLOW | ODD))
    together = sampler.sample(7, [3, 0, 1], steps=1)
    for position, index in enumerate([3, 0, 1]):
        assert torch.equal(together[position], sampler.sample(7, [index], steps=1)[0]), index


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As a user's process has, and the tests' have not: torch divides its work among them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_decoded_volumes_do_not_depend_on_their_batch_either() -> None:
    sampler = sampler_of(tiny.config(**FLOW))
    alone = [sampler.sample(1, [i], steps=2) for i in range(3)]
    assert torch.equal(sampler.sample(1, [0, 1, 2], steps=2), torch.cat(alone))


def test_every_seed_and_index_gives_another_volume() -> None:
    sampler = latents_of(tiny.config(**FLOW))
    volumes = [*sampler.sample(0, range(4), steps=1), *sampler.sample(1, range(4), steps=1)]
    for i, one in enumerate(volumes):
        for other in volumes[:i]:
            assert (one - other).abs().mean() > 0.5


@pytest.mark.parametrize(("settings", "steps"), [(FLOW, 2), (FEW, None)], ids=["rflow", "ddpm"])
def test_the_global_random_state_is_neither_used_nor_changed(settings: dict[str, Any], steps: int | None) -> None:
    sampler = latents_of(tiny.config(**settings))
    scheduler = "ddpm" if steps is None else None
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(sampler.sample(5, [0, 1], scheduler, steps))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


def test_noise_on_the_way_belongs_to_the_volume() -> None:
    """ddpm adds it, ddim does not."""
    sampler = latents_of(tiny.config(**FEW))
    one, other = sampler.sample(5, [0, 1], "ddpm")
    again = sampler.sample(5, [1, 0], "ddpm")
    assert torch.equal(again[0], other)
    assert torch.equal(again[1], one)
    assert not torch.equal(sampler.sample(5, [0], "ddim", 4)[0], one)


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, -(2**70)])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed {seed}: must be between 0 and 9223372036854775807"):
        sampler_of(tiny.config(**FLOW)).sample(seed, [0], steps=1)


def test_random_streams_of_seeds_and_indices_have_nothing_in_common() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 11), (11, 1), (111, 0), (LARGEST_SEED, 0), (LARGEST_SEED - 1, 1)]
    streams = [bits(*pair) for pair in pairs]
    assert len(set().union(*streams)) == sum(map(len, streams)) == 1000 * len(pairs)
    assert [bits(*pair) for pair in pairs] == streams


def bits(seed: int, index: int) -> set[int]:
    """Random numbers of so many bits that one is never drawn twice."""
    return set(torch.randint(2**62, (1000,), generator=volume_generator(seed, index)).tolist())


def test_requests_of_the_past_keep_their_random_numbers() -> None:
    drawn = torch.randn(2000, generator=volume_generator(1, 11))
    torch.testing.assert_close(drawn[:3], torch.tensor([-0.0081, 1.1996, 0.2321]), atol=1e-4, rtol=0)


def test_a_single_small_sample_is_not_convolved_by_the_slow_kernel() -> None:
    sampler = latents_of(tiny.config(**FLOW))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        sampler.sample(0, [0], steps=1)
    kernels = {event.key for event in seen.key_averages()}
    assert "aten::mkldnn_convolution" in kernels
    assert "aten::slow_conv3d_forward" not in kernels


def test_invariance_changes_rounding_only() -> None:
    network, latent = tiny.unet(), torch.randn(3, 3, 8, 8, 8)
    timesteps = torch.tensor([1.0, 500.0, 999.0])
    with torch.inference_mode():
        expected = network(latent, timesteps=timesteps)
        with BatchInvariant():
            torch.testing.assert_close(network(latent, timesteps=timesteps), expected, atol=1e-5, rtol=1e-5)


# What comes out


def test_volumes_are_float32_in_range_on_the_cpu() -> None:
    volumes = sampler_of(tiny.config(**FLOW)).sample(0, [4, 2], steps=2)
    assert volumes.shape == (2, 1, 16, 16, 16)
    assert volumes.dtype == torch.float32
    assert volumes.device == tiny.CPU
    assert volumes.min() >= 0
    assert volumes.max() <= 1
    assert volumes.std() > 0.01
    assert not volumes.requires_grad


def test_values_are_clipped_to_the_range_of_the_weights() -> None:
    sampler = sampler_of(tiny.config(**FLOW))
    sampler.card = sampler.card.model_copy(update={"intensity_range": (0.2, 0.25)})
    volume = sampler.sample(0, [0], steps=2)
    assert volume.min().item() == pytest.approx(0.2)
    assert volume.max().item() == pytest.approx(0.25)


class ExactFlow(nn.Module):
    """Goes straight to a latent that it knows."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def forward(self, latent: Tensor, timesteps: Tensor) -> Tensor:
        s = (timesteps / 1000).view(-1, 1, 1, 1, 1)
        return self.target - (latent - (1 - s) * self.target) / s


@pytest.mark.parametrize("patchify", [1, 2])
@pytest.mark.parametrize("centred", [False, True])
def test_scale_and_centre_are_taken_back_before_decoding(centred: bool, patchify: int) -> None:
    """A denoiser that finds the normalised latent of a volume gives the autoencoder's reconstruction of it."""
    cfg = tiny.config(autoencoder_def={"patchify": patchify}, **FLOW)
    network, image = tiny.autoencoder(cfg), tiny.images(1)
    if patchify > 1:
        network.start_with_principal_components(tiny.images(4))
    encoded, _ = network.encode(image)
    mean = encoded[0] + torch.randn(encoded[0].shape) if centred else NO_MEAN
    statistics = LatentStatistics(mean, 3.7)
    sampler = Sampler(
        network, ExactFlow(statistics.normalise(encoded)[0]), statistics, tiny.diffusion_card(cfg), tiny.CPU
    )
    reconstruction = network.reconstruct(image).clamp(0, 1)
    assert reconstruction.std() > 0.01
    for steps in (1, 4):
        torch.testing.assert_close(sampler.sample(0, [0], steps=steps), reconstruction, atol=1e-4, rtol=1e-4)


def test_steps_are_counted_and_the_defaults_taken() -> None:
    sampler = latents_of(tiny.config(**FLOW, diffusion_def={"attention_levels": [False, False]}))
    done: list[int] = []
    sampler.sample(0, [0], on_step=done.append)
    assert done == list(range(1, 31))
    assert torch.equal(sampler.sample(0, [0]), sampler.sample(0, [0], "rflow", 30))


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"), [("ddim", None, "sampled with rflow"), (None, 0, "steps 0: must be between")]
)
def test_settings_that_do_not_fit(scheduler: str | None, steps: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler_of(tiny.config(**FLOW)).sample(0, [0], scheduler, steps)


def test_networks_are_put_into_evaluation_mode() -> None:
    sampler = sampler_of(tiny.config(**FLOW), unet=tiny.unet().train())
    assert not sampler.unet.training
    assert not sampler.autoencoder.training


# Published weights


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Path]:
    cfg = tiny.config(**FLOW)
    save_weights(tmp_path / AUTOENCODER, tiny.autoencoder(cfg).state_dict(), tiny.autoencoder_card(cfg))
    card = tiny.diffusion_card(cfg, sha256(tmp_path / AUTOENCODER), scale_factor=0.8)
    mean = torch.full(cfg.latent_shape, 0.5)
    save_weights(tmp_path / UNET, tiny.unet(cfg).state_dict() | {LATENT_MEAN: mean}, card)
    yield tmp_path


def test_published_weights_sample_like_the_networks_they_are(published: Path) -> None:
    cfg = tiny.config(**FLOW)
    loaded = Sampler.from_folder(published, tiny.CPU)
    expected = sampler_of(cfg, LatentStatistics(torch.full(cfg.latent_shape, 0.5), 0.8))
    assert torch.equal(loaded.sample(3, [0, 1], steps=2), expected.sample(3, [0, 1], steps=2))
    assert loaded.digests == {name: sha256(published / name) for name in (AUTOENCODER, UNET)}


def test_an_autoencoder_that_the_unet_was_not_trained_with(published: Path) -> None:
    cfg = tiny.config(**FLOW)
    save_weights(published / AUTOENCODER, tiny.autoencoder(cfg, seed=1).state_dict(), tiny.autoencoder_card(cfg))
    with pytest.raises(WeightsError) as refused:
        Sampler.from_folder(published, tiny.CPU)
    assert "was trained on the latents of another autoencoder.safetensors than the one beside it" in str(refused.value)


@pytest.mark.parametrize("name", [AUTOENCODER, UNET])
def test_one_of_the_two_is_missing(published: Path, name: str) -> None:
    (published / name).unlink()
    with pytest.raises(WeightsError, match=f"{name}: no such weights"):
        Sampler.from_folder(published, tiny.CPU)
