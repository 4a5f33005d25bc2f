"""Both stages: what a step changes, what it leaves alone, what validation and publication say."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm3d import training
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.cards import AUTOENCODER, DISCRIMINATOR, UNET
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.errors import NonFiniteLoss, NonFiniteValidation, WeightsError
from ldm3d.latents import LatentCache, LatentStatistics
from ldm3d.schema import Config
from ldm3d.weights import load_autoencoder, load_unet

NO_MEAN = torch.zeros(1, 1, 1, 1)
FLOW = {"NoiseScheduler": {"type": "rflow"}}


def stage_one(**changes: Any) -> AutoencoderStage:
    return AutoencoderStage(tiny.config(**changes), tiny.CPU, 100)


def stage_two(cfg: Config | None = None, statistics: LatentStatistics | None = None) -> DiffusionStage:
    statistics = statistics or LatentStatistics(NO_MEAN, 1.5)
    return DiffusionStage(cfg or tiny.config(**FLOW), tiny.CPU, 100, statistics)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def at(number: int, value: float, tensor: Tensor) -> Tensor:
    """With one other value."""
    changed = tensor.clone()
    changed.view(-1)[number] = value
    return changed


# Stage 1


def test_one_step_changes_every_weight_of_the_autoencoder() -> None:
    stage = stage_one()
    before = snapshot(stage.autoencoder), snapshot(stage.discriminator)
    terms = stage.train_step(tiny.batch(), tiny.random(), adversarial=False)
    assert set(terms) == {"reconstruction", "kl", "gradient_norm"}
    assert all(not term.requires_grad and term.ndim == 0 for term in terms.values())
    assert changed(stage.autoencoder, before[0]) == set(before[0])
    assert not changed(stage.discriminator, before[1])


def test_after_the_warm_up_both_learn() -> None:
    stage = stage_one()
    before = snapshot(stage.autoencoder), snapshot(stage.discriminator)
    terms = stage.train_step(tiny.batch(), tiny.random(), adversarial=True)
    assert set(terms) == {"reconstruction", "kl", "adversarial", "discriminator", "gradient_norm"}
    assert changed(stage.autoencoder, before[0]) == set(before[0])
    assert {n for n in before[1] if n.endswith("weight")} <= changed(stage.discriminator, before[1])


def test_the_warm_up_leaves_out_the_adversarial_gradient() -> None:
    weights = []
    for adversarial in (False, True):
        stage = stage_one(autoencoder_train={"adv_weight": 1.0})
        stage.train_step(tiny.batch(), tiny.random(), adversarial)
        weights.append(snapshot(stage.autoencoder))
    assert not tiny.equal_states(*weights)


def test_each_network_learns_in_its_own_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of autoencoder and discriminator after each of the two backward passes."""
    stage, seen = stage_one(), []

    def noted(optimizer: training.Optimizer, loss: Tensor) -> None:
        backward(optimizer, loss)
        networks = (stage.autoencoder, stage.discriminator)
        seen.append([[None if p.grad is None else p.grad.clone() for p in net.parameters()] for net in networks])

    backward = training.Optimizer.backward
    monkeypatch.setattr(training.Optimizer, "backward", noted)
    stage.train_step(tiny.batch(), tiny.random(), adversarial=True)
    (generator, idle), (generator_afterwards, discriminator) = seen
    assert all(g is not None for g in generator)
    assert all(g is None for g in idle)
    assert tiny.equal_states(generator, generator_afterwards)
    assert all(g is not None for g in discriminator)
    assert all(p.requires_grad for p in stage.discriminator.parameters())


def test_adversarial_term_is_the_verdict_on_the_reconstruction() -> None:
    stage = stage_one(autoencoder_train={"adv_weight": 0.5})
    batch, reference = tiny.batch(), copy.deepcopy(stage.discriminator)
    with torch.no_grad():
        noise = tiny.random(3).normal((3, 8, 8, 8))
        reconstructed, _, _ = stage.autoencoder(batch["image"], noise)
        fake, real = reference(reconstructed)[-1], reference(batch["image"])[-1]
    terms = stage.train_step(batch, tiny.random(3), adversarial=True)
    assert terms["adversarial"].item() == pytest.approx(0.5 * (fake - 1).square().mean().item(), rel=1e-5)
    expected = 0.5 * (fake.square().mean() + (real - 1).square().mean())
    assert terms["discriminator"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("adversarial", [False, True])
def test_an_image_that_is_not_finite_changes_nothing(adversarial: bool) -> None:
    stage, batch = stage_one(), tiny.batch()
    batch["image"][1, 0, 3, 3, 3] = math.nan
    before = copy.deepcopy(stage.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"step 5: .*reconstruction = nan.* on cases case0, case1"):
        stage.train_step(batch, tiny.random(5), adversarial)
    assert tiny.equal_states(before, stage.state_dict())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    stage = stage_one()
    next(stage.autoencoder.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = copy.deepcopy(stage.state_dict())
    with pytest.raises(NonFiniteLoss, match="gradient_norm = nan"):
        stage.train_step(tiny.batch(), tiny.random(), adversarial=False)
    assert tiny.equal_states(before, stage.state_dict())


def test_a_discriminator_that_fails_keeps_its_weights() -> None:
    stage = stage_one()
    next(stage.discriminator.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = snapshot(stage.discriminator)
    with pytest.raises(NonFiniteLoss, match=r"discriminator = .*gradient_norm = nan"):
        stage.train_step(tiny.batch(), tiny.random(), adversarial=True)
    assert not changed(stage.discriminator, before)
    assert all(torch.isfinite(p).all() for p in stage.autoencoder.parameters())


def test_the_autoencoder_learns() -> None:
    stage = stage_one(autoencoder_train={"lr": 5e-3}, autoencoder_def={"patchify": 2})
    losses = [
        stage.train_step(tiny.batch(4), tiny.random(step, 4), step > 20)["reconstruction"].item() for step in range(40)
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_a_good_start_is_for_networks_that_know_how() -> None:
    plain = stage_one()
    before = snapshot(plain.autoencoder)
    plain.start_fresh(lambda: pytest.fail("the volumes were read for nothing"))
    assert not changed(plain.autoencoder, before)
    errors = []
    for informed in (False, True):
        stage = stage_one(autoencoder_def={"patchify": 2})
        if informed:
            stage.start_fresh(lambda: tiny.images(4))
        errors.append((stage.reconstruct(tiny.images(2)) - tiny.images(2)).abs().mean().item())
    assert errors[1] < 0.25 * errors[0]


@pytest.fixture
def validation_set() -> list[dict[str, Any]]:
    return [tiny.batch(1, seed=seed) for seed in range(3)]


def test_validation_is_the_same_on_every_run(validation_set: list[dict[str, Any]]) -> None:
    stage = stage_one()
    before = copy.deepcopy(stage.state_dict())
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(stage.validate(iter(validation_set)))
        assert stage.autoencoder.training
    assert results[0][0] == results[1][0]
    assert tiny.equal_states(before, stage.state_dict())


def test_validation_measures_the_reconstruction_of_the_mean(validation_set: list[dict[str, Any]]) -> None:
    stage = stage_one(autoencoder_def={"patchify": 2})
    stage.start_fresh(lambda: tiny.images(4))
    measures, shown = stage.validate(validation_set)
    copies = [stage.autoencoder.reconstruct(b["image"]).detach().clamp(0, 1) for b in validation_set]
    differences = [(b["image"] - c).numpy() for b, c in zip(validation_set, copies, strict=True)]
    assert measures["l1"] == pytest.approx(np.mean([np.abs(d).mean() for d in differences]), rel=1e-5)
    psnr = np.mean([-10 * np.log10(np.square(d).mean()) for d in differences])
    assert measures["psnr_db"] == pytest.approx(psnr, rel=1e-5)
    assert 0 < measures["ssim"] <= 1
    assert shown is not None
    assert torch.equal(shown[0], validation_set[0]["image"][0, 0])
    torch.testing.assert_close(shown[1], copies[0][0, 0])


def test_a_reconstruction_that_is_not_finite_is_not_the_best(validation_set: list[dict[str, Any]]) -> None:
    """Its measures are None, which is not 0."""
    bad = {**validation_set[1], "image": at(5, math.nan, validation_set[1]["image"])}
    with pytest.raises(NonFiniteValidation, match=f"l1 on cases {bad['case'][0]};"):
        stage_one().validate([validation_set[0], bad])


def test_published_weights_begin_another_training(tmp_path: Path) -> None:
    stage = stage_one()
    stage.train_step(tiny.batch(), tiny.random(), adversarial=True)
    stage.publish(tmp_path, tiny.FACTS, {"psnr_db": 12.5})
    network, card = load_autoencoder(tmp_path)
    assert card.validation == {"psnr_db": 12.5}
    assert card.definition == stage.cfg.autoencoder_def
    assert tiny.equal_states(network.state_dict(), stage.autoencoder.state_dict())
    other = stage_one(seed=7)
    assert changed(other.autoencoder, stage.autoencoder.state_dict())
    other.start_from(tmp_path)
    assert not changed(other.autoencoder, stage.autoencoder.state_dict())
    assert not changed(other.discriminator, stage.discriminator.state_dict())
    (tmp_path / DISCRIMINATOR).unlink()
    another = stage_one(seed=8)
    fresh = snapshot(another.discriminator)
    another.start_from(tmp_path)
    assert not changed(another.autoencoder, stage.autoencoder.state_dict())
    assert not changed(another.discriminator, fresh)


def test_no_adversarial_term_no_published_discriminator(tmp_path: Path) -> None:
    stage_one(autoencoder_train={"adv_weight": 0}).publish(tmp_path, tiny.FACTS, {})
    assert [path.name for path in tmp_path.iterdir()] == [AUTOENCODER]


@pytest.mark.parametrize("section", ["autoencoder_def", "discriminator_def"])
def test_weights_of_another_architecture_begin_nothing(tmp_path: Path, section: str) -> None:
    stage_one().publish(tmp_path, tiny.FACTS, {})
    channels = {"autoencoder_def": [8, 32], "discriminator_def": 16}[section]
    with pytest.raises(WeightsError, match=f"{section} of the config contradicts the weights: channels is"):
        stage_one(**{section: {"channels": channels}}).start_from(tmp_path)


def test_seeds_give_different_beginnings_and_the_same_one_the_same() -> None:
    assert not changed(stage_one(seed=1).autoencoder, stage_one(seed=1).autoencoder.state_dict())
    assert changed(stage_one(seed=1).autoencoder, stage_one(seed=2).autoencoder.state_dict())


# Stage 2


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    generator = torch.Generator().manual_seed(4)
    posteriors = torch.randn(3, 1, 2, 3, 8, 8, 8, generator=generator)
    posteriors[:, :, 1] = 0.1
    np.save(tmp_path / "posteriors.npy", posteriors.half().numpy())
    (tmp_path / "index.json").write_text('{"cases": ["a", "b", "c"]}')
    return LatentCache(tmp_path)


def named(latent: Tensor) -> dict[str, Any]:
    return {"latent": latent, "case": ["a", "b"]}


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_one_step_changes_network_and_running_average() -> None:
    stage = stage_two()
    before = snapshot(stage.unet)
    assert tiny.equal_states(before, stage.ema.network.state_dict())
    terms = stage.train_step(named(latents()), tiny.random(0))
    assert set(terms) == {"loss", "gradient_norm"}
    assert not terms["loss"].requires_grad
    moved = changed(stage.unet, before)
    assert "out.2.conv.weight" in moved
    for name in moved:  # of the first step the average takes nine tenths
        torch.testing.assert_close(
            stage.ema.network.state_dict()[name], 0.1 * before[name] + 0.9 * stage.unet.state_dict()[name]
        )


def test_decay_zero_follows_the_weights() -> None:
    stage = stage_two(tiny.config(diffusion_train={"ema_decay": 0}, **FLOW))
    for step in range(3):
        stage.train_step(named(latents(step)), tiny.random(step))
    assert not changed(stage.ema.network, stage.unet.state_dict())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("schedule", ["rflow", "epsilon"])
def test_loss_is_the_error_on_normalised_latents(centred: bool, schedule: str) -> None:
    """A fresh network predicts zero, so that the first loss is the mean square of its target."""
    mean = latents(9)[0] if centred else NO_MEAN
    stage = stage_two(tiny.config(**FLOW) if schedule == "rflow" else tiny.config(), LatentStatistics(mean, 2.5))
    loss = stage.train_step(named(latents()), tiny.random(11))["loss"].item()
    noise = tiny.random(11).normal((3, 8, 8, 8))
    target = (latents() - mean) * 2.5 - noise if schedule == "rflow" else noise
    assert loss == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_every_step_draws_other_noise() -> None:
    losses = []
    for step in (0, 0, 1):
        stage = stage_two()
        losses.append(stage.train_step(named(latents()), tiny.random(step))["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_latents_that_are_not_finite_change_nothing() -> None:
    stage, bad = stage_two(), latents()
    bad[1, 0, 0, 0, 0] = math.inf
    before = copy.deepcopy(stage.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"step 4: .*on cases a, b; latent .*, 1 of \d+ not finite; normalised"):
        stage.train_step(named(bad), tiny.random(4))
    assert tiny.equal_states(before, stage.state_dict())


def test_a_network_that_is_not_finite_spoils_neither_weights_nor_average() -> None:
    stage = stage_two()
    stage.unet.out[2].conv.weight.register_hook(lambda gradient: gradient * math.nan)
    before = copy.deepcopy(stage.state_dict())
    with pytest.raises(NonFiniteLoss, match="gradient_norm = nan"):
        stage.train_step(named(latents()), tiny.random(0))
    assert tiny.equal_states(before, stage.state_dict())


def test_the_unet_learns() -> None:
    stage = stage_two(tiny.config(diffusion_train={"lr": 5e-3}, **FLOW))
    losses = []
    for step in range(40):
        losses.append(stage.train_step(named(torch.ones(2, 3, 8, 8, 8)), tiny.random(step))["loss"].item())
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize("settings", [FLOW, {}], ids=["rflow", "ddpm"])
def test_validation_of_noise_levels_is_the_same_on_every_run(settings: dict[str, Any], cache: LatentCache) -> None:
    stage = stage_two(tiny.config(**settings))
    tiny.shaken(stage.ema.network)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(stage.validate(cache))
    assert results[0] == results[1]
    assert list(results[0]) == ["loss", *(f"level_{i}" for i in range(1, 9))]
    levels = [results[0][f"level_{i}"] for i in range(1, 9)]
    assert len(set(levels)) == 8
    assert results[0]["loss"] == pytest.approx(np.mean(levels))


def test_a_validation_that_is_not_finite_stops(cache: LatentCache) -> None:
    stage = stage_two()
    stage.validate(cache)
    cache.posteriors = np.array(cache.posteriors)  # in memory, where it may be changed
    cache.posteriors[1, 0, 0, 0, 3, 3, 3] = np.inf
    with pytest.raises(NonFiniteValidation, match=f"loss on cases {cache.cases[1]};"):
        stage.validate(cache)


def test_validation_judges_the_running_average(cache: LatentCache) -> None:
    stage = stage_two()
    before = stage.validate(cache)
    tiny.shaken(stage.unet)
    assert stage.validate(cache) == before
    tiny.shaken(stage.ema.network)
    assert stage.validate(cache) != before


def test_validation_goes_from_least_to_most_noise(cache: LatentCache) -> None:
    """Where the network predicts zero for latents of spread 3, its error in v grows with the noise."""
    stage = stage_two(tiny.config(NoiseScheduler={"type": "ddpm", "prediction_type": "v_prediction"}))
    stage.statistics = LatentStatistics(NO_MEAN, 3.0)
    measures = stage.validate(cache)
    levels = [measures[f"level_{i}"] for i in range(1, 9)]
    alphas = stage.diffusion.scheduler.alphas_cumprod[stage.diffusion.grid(8)]
    # v = sqrt(alpha) noise - sqrt(1 - alpha) latent
    expected = alphas + (1 - alphas) * 9
    assert levels == pytest.approx(expected.tolist(), rel=0.15)
    assert levels == sorted(levels)


def test_validation_uses_means_not_samples_and_the_statistics(cache: LatentCache) -> None:
    stage = stage_two(statistics=LatentStatistics(NO_MEAN, 2.0))
    measures = stage.validate(cache)
    expected = []
    for index in range(3):
        noise = torch.randn(8, 3, 8, 8, 8, generator=torch.Generator().manual_seed(1234 + index))
        expected.append((cache.mean(index, tiny.CPU) * 2.0 - noise).square().mean().item())
    assert measures["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


FACTS = {**tiny.FACTS, "autoencoder_sha256": "c" * 64}


@pytest.fixture
def trained() -> Iterator[DiffusionStage]:
    mean = latents(5)[0]
    stage = stage_two(statistics=LatentStatistics(mean, 0.75))
    for step in range(2):
        stage.train_step(named(latents(step)), tiny.random(step))
    yield stage


def test_the_running_average_is_published(tmp_path: Path, trained: DiffusionStage) -> None:
    trained.publish(tmp_path, FACTS, {"loss": 0.5})
    network, mean, card = load_unet(tmp_path)
    assert tiny.equal_states(network.state_dict(), trained.ema.network.state_dict())
    assert changed(network, trained.unet.state_dict())
    assert torch.equal(mean, trained.statistics.mean)
    assert card.scale_factor == 0.75
    assert card.latent_shape == (3, 8, 8, 8)
    assert card.schedule == trained.cfg.noise_schedule
    assert card.validation == {"loss": 0.5}
    assert card.autoencoder_sha256 == "c" * 64
    assert card.ema_decay == 0.999


def test_published_weights_bring_their_normalisation(tmp_path: Path, trained: DiffusionStage) -> None:
    trained.publish(tmp_path, FACTS, {})
    stage = stage_two(statistics=LatentStatistics(NO_MEAN, 99.0))
    stage.start_from(tmp_path)
    assert stage.statistics.scale_factor == 0.75
    assert torch.equal(stage.statistics.mean, trained.statistics.mean)
    for network in (stage.unet, stage.ema.network):
        assert not changed(network, trained.ema.network.state_dict())
    assert all(p.requires_grad for p in stage.unet.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (FLOW | {"diffusion_def": {"channels": [16, 16]}}, "diffusion_def of the config contradicts the weights"),
        ({}, "NoiseScheduler of the config contradicts the weights: type is ddpm but the weights have rflow"),
        (FLOW | {"diffusion_train": {"patch_size": [32, 16, 16]}}, r"is centred on latents of \(3, 8, 8, 8\), but"),
    ],
    ids=["architecture", "schedule", "latent shape"],
)
def test_weights_that_cannot_begin_this_training(
    tmp_path: Path, trained: DiffusionStage, changes: dict[str, Any], message: str
) -> None:
    trained.publish(tmp_path, FACTS, {})
    with pytest.raises(WeightsError, match=message):
        stage_two(tiny.config(**changes)).start_from(tmp_path)


def test_weights_of_uncentred_latents_begin_trainings_of_any_size(tmp_path: Path) -> None:
    stage_two(statistics=LatentStatistics(NO_MEAN, 0.5)).publish(tmp_path, FACTS, {})
    larger = stage_two(tiny.config(diffusion_train={"patch_size": [32, 16, 16]}, **FLOW))
    larger.start_from(tmp_path)
    assert larger.statistics.scale_factor == 0.5
    assert (tmp_path / UNET).is_file()
