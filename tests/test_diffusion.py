"""ldm3d.diffusion: known integrals, agreement with MONAI's own schedulers and inferer, nothing clipped."""

import math
from typing import Any

import pytest
import tiny
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler
from torch import Tensor

from ldm3d.diffusion import (
    Denoise,
    GaussianDiffusion,
    RectifiedFlow,
    build_diffusion,
    sample_latent,
)
from ldm3d.errors import ConfigError
from ldm3d.samplers import choose_sampler
from ldm3d.sections import DdpmSchedule, RFlowSchedule, Schedule

FLOW = RFlowSchedule(type="rflow")
KINDS = ("linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine")
PREDICTIONS = ("epsilon", "v_prediction")
# Of the Gaussian data whose perfect denoisers are known; far from the standard normal noise that they start as.
MEAN, SPREAD = 1.5, 0.4


def noise(count: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, side, generator=torch.Generator().manual_seed(seed))


def generators(count: int, seed: int = 100) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def posterior_means(noisy: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Expected data and noise, given signal * data + sigma * noise, for the Gaussian data."""
    variance = (signal * SPREAD) ** 2 + sigma**2
    rest = noisy - signal * MEAN
    return MEAN + signal * SPREAD**2 / variance * rest, sigma / variance * rest


def perfect_flow(noisy: Tensor, timesteps: Tensor) -> Tensor:
    s = per_sample(timesteps / FLOW.num_train_timesteps)
    data, noise = posterior_means(noisy, 1 - s, s)
    return data - noise


def perfect_ddpm(schedule: DdpmSchedule) -> Denoise:
    alphas = GaussianDiffusion(schedule).scheduler.alphas_cumprod.double()

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        alpha = per_sample(alphas[timesteps])
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        data, noise = posterior_means(noisy.double(), signal, sigma)
        return (noise if schedule.prediction_type == "epsilon" else signal * noise - sigma * data).float()

    return denoise


def towards(target: Tensor, schedule: DdpmSchedule) -> Denoise:
    """The denoiser that knows the data."""
    alphas = GaussianDiffusion(schedule).scheduler.alphas_cumprod.double()

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        alpha = per_sample(alphas[timesteps])
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        noise = (noisy.double() - signal * target) / sigma
        return (noise if schedule.prediction_type == "epsilon" else signal * noise - sigma * target).float()

    return denoise


# Rectified flow


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_exact_velocity_arrives_in_any_number_of_steps(steps: int) -> None:
    target = 3 * noise(seed=1)  # most of it beyond 1

    def velocity(latent: Tensor, timesteps: Tensor) -> Tensor:
        s = per_sample(timesteps / FLOW.num_train_timesteps)
        return target - (latent - (1 - s) * target) / s

    finished: list[int] = []
    arrived = sample_latent(velocity, noise(), [], FLOW, "rflow", steps, finished.append)
    torch.testing.assert_close(arrived, target, atol=1e-4, rtol=1e-5)
    assert finished == list(range(1, steps + 1))


def test_flow_of_gaussian_data_has_its_mean_and_spread() -> None:
    drawn = sample_latent(perfect_flow, noise(4, 16), [], FLOW, "rflow", 100)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.02)


@pytest.mark.parametrize("steps", [1, 4, 5, 8, 10, 40])
def test_flow_agrees_with_monai(steps: int) -> None:
    """For numbers of steps whose timesteps MONAI, which keeps them as float16, does not round."""
    scheduler = RFlowScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    network = Recorded()
    expected = DiffusionInferer(scheduler).sample(noise(), network, verbose=False)
    expected_timesteps, network.timesteps = network.timesteps, []
    drawn = sample_latent(network.denoise, noise(), [], FLOW, "rflow", steps)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    assert network.timesteps == expected_timesteps


class Recorded:
    """The tiny U-Net behind MONAI's interface and ours; notes the timesteps that it is asked for."""

    def __init__(self) -> None:
        self.network, self.timesteps = tiny.unet(), []

    def __call__(self, x: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
        return self.denoise(x, timesteps)

    @torch.inference_mode()
    def denoise(self, latent: Tensor, timesteps: Tensor) -> Tensor:
        self.timesteps.append(float(timesteps[0]))
        return self.network(latent, timesteps=timesteps.float().expand(len(latent)))


def test_noised_flow_agrees_with_monai() -> None:
    clean, eps = noise(seed=1), noise(seed=2)
    timesteps = torch.tensor([125.0, 800.0])
    flow = RectifiedFlow(FLOW)
    expected = RFlowScheduler(num_train_timesteps=1000).add_noise(clean, eps, timesteps)
    torch.testing.assert_close(flow.add_noise(clean, eps, timesteps), expected)
    assert torch.equal(flow.target(clean, eps, timesteps), clean - eps)
    ends = flow.add_noise(clean, eps, torch.tensor([0.0, 1000.0]))
    assert torch.equal(ends[0], clean[0])
    assert torch.equal(ends[1], eps[1])


# Denoising diffusion


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 20), ("ddim", 20), ("pndm", 20), ("pndm", 10)])
def test_ddpm_samplers_agree_with_monai(sampler: Any, steps: int, prediction: str) -> None:
    schedule = DdpmSchedule(num_train_timesteps=20, prediction_type=prediction)
    arguments = {"num_train_timesteps": 20, "schedule": "scaled_linear_beta", "prediction_type": prediction}
    arguments |= {"beta_start": 0.0015, "beta_end": 0.0195}
    kinds = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "pndm": PNDMScheduler}
    own = {"skip_prk_steps": True} if sampler == "pndm" else {"clip_sample": False}
    scheduler = kinds[sampler](**arguments, **own)
    scheduler.set_timesteps(steps)
    network = Recorded()
    torch.manual_seed(100)  # MONAI draws from the global state what we draw from the sample's own generator
    expected = DiffusionInferer(scheduler).sample(noise(1), network, verbose=False)
    expected_timesteps, network.timesteps = network.timesteps, []
    finished: list[int] = []
    drawn = sample_latent(network.denoise, noise(1), generators(1), schedule, sampler, steps, finished.append)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-4)
    assert network.timesteps == expected_timesteps
    assert finished == list(range(1, steps + 1))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddim_with_a_perfect_prediction_recovers_the_data(steps: int, prediction: Any) -> None:
    target = 3 * noise(seed=1)
    assert target.abs().max() > 8
    schedule = DdpmSchedule(prediction_type=prediction)
    drawn = sample_latent(towards(target, schedule), noise(), [], schedule, "ddim", steps)
    torch.testing.assert_close(drawn, target, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [
        ("ddim", 50, 0.1),
        ("ddim", 300, 0.03),
        # MONAI's own steps do not meet their grid here, and leave most of the noise.
        ("ddim", 600, 0.03),
        ("ddim", 1000, 0.03),
        ("ddpm", 1000, 0.03),
        ("pndm", 50, 0.1),
        ("pndm", 200, 0.05),
    ],
)
def test_gaussian_data_keep_mean_and_spread(sampler: Any, steps: int, tolerance: float, prediction: Any) -> None:
    schedule = DdpmSchedule(prediction_type=prediction)
    drawn = sample_latent(perfect_ddpm(schedule), noise(2), generators(2), schedule, sampler, steps)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=tolerance)


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 30, 50])
def test_few_ddim_steps_leave_no_noise_behind(steps: int) -> None:
    """They may miss some of the data's spread, but not add to it."""
    schedule = DdpmSchedule()
    drawn = sample_latent(perfect_ddpm(schedule), noise(), [], schedule, "ddim", steps)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert drawn.std().item() < SPREAD


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "pndm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_schedule_samples_finite_values_beyond_one(sampler: Any, kind: Any, prediction: Any) -> None:
    schedule = DdpmSchedule(schedule=kind, num_train_timesteps=100, prediction_type=prediction)
    drawn = sample_latent(perfect_ddpm(schedule), noise(), generators(2), schedule, sampler, 100)
    assert torch.isfinite(drawn).all()
    assert (drawn > 1).float().mean() > 0.5


def test_ddpm_draws_for_each_sample_from_its_own_generator() -> None:
    schedule = DdpmSchedule(num_train_timesteps=20)
    denoise = perfect_ddpm(schedule)
    together = sample_latent(denoise, noise(3), generators(3), schedule, "ddpm", 20)
    for i in range(3):
        alone = sample_latent(denoise, noise(3)[i : i + 1], [generators(3)[i]], schedule, "ddpm", 20)
        assert torch.equal(together[i], alone[0])
    other = sample_latent(denoise, noise(3), generators(3, seed=200), schedule, "ddpm", 20)
    assert not torch.equal(together, other)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_target_of_ddpm(kind: Any, prediction: Any) -> None:
    schedule = DdpmSchedule(schedule=kind, prediction_type=prediction)
    diffusion = build_diffusion(schedule)
    assert isinstance(diffusion, GaussianDiffusion)
    clean, eps, timesteps = 3 * noise(seed=1), noise(seed=2), torch.tensor([10, 800])
    alpha = per_sample(diffusion.scheduler.alphas_cumprod[timesteps])
    noisy = diffusion.add_noise(clean, eps, timesteps)
    torch.testing.assert_close(noisy, alpha.sqrt() * clean + (1 - alpha).sqrt() * eps)
    target = diffusion.target(clean, eps, timesteps)
    expected = eps if prediction == "epsilon" else alpha.sqrt() * eps - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(target, expected)


def test_beta_schedule_follows_the_config() -> None:
    betas = GaussianDiffusion(DdpmSchedule(schedule="linear_beta", beta_start=0.002, beta_end=0.01)).scheduler.betas
    torch.testing.assert_close(betas, torch.linspace(0.002, 0.01, 1000))


# Which sampler, how many steps


@pytest.mark.parametrize(
    ("schedule", "name", "steps", "chosen"),
    [
        (FLOW, None, None, ("rflow", 30)),
        (FLOW, "rflow", 1, ("rflow", 1)),
        (FLOW, "rflow", 1000, ("rflow", 1000)),
        (RFlowSchedule(type="rflow", num_train_timesteps=10), None, None, ("rflow", 10)),
        (DdpmSchedule(), None, None, ("ddim", 50)),
        (DdpmSchedule(), None, 7, ("ddim", 7)),
        (DdpmSchedule(), "ddim", 600, ("ddim", 600)),
        (DdpmSchedule(), "ddpm", None, ("ddpm", 1000)),
        (DdpmSchedule(), "ddpm", 1000, ("ddpm", 1000)),
        (DdpmSchedule(), "pndm", None, ("pndm", 50)),
        (DdpmSchedule(), "pndm", 10, ("pndm", 10)),
        (DdpmSchedule(), "pndm", 1000, ("pndm", 1000)),
        (DdpmSchedule(num_train_timesteps=20), "ddim", None, ("ddim", 20)),
        (DdpmSchedule(num_train_timesteps=1), "pndm", None, ("pndm", 1)),
    ],
)
def test_allowed_samplers(schedule: Schedule, name: str | None, steps: int | None, chosen: tuple[str, int]) -> None:
    assert choose_sampler(schedule, name, steps) == chosen


@pytest.mark.parametrize(
    ("schedule", "name", "steps", "message"),
    [
        (FLOW, "ddpm", None, "weights trained with rflow are sampled with rflow"),
        (FLOW, "ddim", None, "weights trained with rflow are sampled with rflow"),
        (FLOW, "pndm", 10, "weights trained with rflow are sampled with rflow"),
        (DdpmSchedule(), "rflow", None, "weights trained with ddpm are sampled with ddim or ddpm or pndm"),
        (DdpmSchedule(), "euler", None, "'euler': weights trained with ddpm are sampled with ddim or ddpm or pndm"),
        (FLOW, None, 0, "steps 0: must be between 1 and 1000"),
        (FLOW, None, -3, "steps -3: must be between 1 and 1000"),
        (FLOW, None, 1001, "steps 1001: must be between 1 and 1000"),
        (DdpmSchedule(), None, 1001, "steps 1001: must be between 1 and 1000"),
        (DdpmSchedule(), "ddpm", 50, "steps 50: ddpm takes all 1000 steps; fewer need ddim or pndm"),
        (DdpmSchedule(), "pndm", 600, "steps 600: pndm would begin at timestep 599 of 1000; use 500 steps, or ddim"),
        (DdpmSchedule(), "pndm", 1, "steps 1: pndm would begin at timestep 0 of 1000; use 10 steps, or ddim"),
    ],
)
def test_refused_samplers(schedule: Schedule, name: str | None, steps: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_sampler(schedule, name, steps)
    assert message in str(refused.value)


@pytest.mark.parametrize("timesteps", [1, 10, 49, 51, 64, 70, 97, 100, 128, 1000, 4000])
def test_default_steps_are_allowed_for_every_length_of_schedule(timesteps: int) -> None:
    schedule = DdpmSchedule(num_train_timesteps=timesteps)
    for name in ("ddim", "ddpm", "pndm"):
        sampler, steps = choose_sampler(schedule, name, None)
        assert choose_sampler(schedule, name, steps) == (sampler, steps)


# Timesteps of training and validation


def test_grids_are_even_and_within_the_schedule() -> None:
    assert RectifiedFlow(FLOW).grid(4).tolist() == [125, 375, 625, 875]
    grid = GaussianDiffusion(DdpmSchedule()).grid(8)
    assert grid.dtype == torch.long
    assert grid.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]


def test_logit_normal_timesteps() -> None:
    drawn = RectifiedFlow(FLOW).draw_timesteps(tiny.random(0, 20_000)) / 1000
    assert 0 < drawn.min() < drawn.max() < 1
    logits = drawn.logit()
    assert logits.mean().abs() < 0.03
    assert logits.std().item() == pytest.approx(1, abs=0.03)


def test_uniform_timesteps() -> None:
    drawn = RectifiedFlow(RFlowSchedule(type="rflow", timesteps="uniform")).draw_timesteps(tiny.random(0, 20_000))
    assert distance_from_uniform(drawn / 1000) < 0.015


def distance_from_uniform(values: Tensor) -> float:
    """Kolmogorov and Smirnov's, of values in [0, 1]."""
    ranks = (torch.arange(len(values)) + 0.5) / len(values)
    return (values.sort().values - ranks).abs().max().item()


def test_ddpm_timesteps_are_all_of_them_equally() -> None:
    drawn = GaussianDiffusion(DdpmSchedule(num_train_timesteps=10)).draw_timesteps(tiny.random(0, 10_000))
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 1000 - 5 * math.sqrt(900)
    assert counts.max() < 1000 + 5 * math.sqrt(900)


def test_timesteps_are_those_of_the_step() -> None:
    for schedule in (FLOW, DdpmSchedule()):
        diffusion = build_diffusion(schedule)
        first = diffusion.draw_timesteps(tiny.random(3))
        assert not torch.equal(diffusion.draw_timesteps(tiny.random(4)), first)
        assert torch.equal(diffusion.draw_timesteps(tiny.random(3)), first)
