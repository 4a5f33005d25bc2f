"""ldm3d.training and what is told of it: steps, rates, averages, random numbers, progress, events."""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ldm3d import distributed
from ldm3d.errors import NonFiniteLoss, OutputError
from ldm3d.progress import EpochLog, Position, rounded
from ldm3d.schema import AutoencoderTrain, Optimization
from ldm3d.tracking import Tracker
from ldm3d.training import (
    EMA,
    Optimizer,
    Precision,
    checked_step,
    learning_rate_factor,
    require_finite,
    seed_step,
)


def settings(**changes: Any) -> Optimization:
    return AutoencoderTrain(batch_size=1, patch_size=(16, 16, 16), max_epochs=1, **{"lr": 0.01, **changes})


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))


def optimizer(net: nn.Module, total_steps: int = 10, **changes: Any) -> Optimizer:
    return Optimizer(net.parameters(), settings(**changes), total_steps, Precision(True, tiny.CPU))


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


# Learning rate


def test_constant_rate_after_a_linear_warm_up() -> None:
    factors = [learning_rate_factor(step, settings(warm_up_steps=4), 10) for step in range(7)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert learning_rate_factor(0, settings(), 10) == 1


def test_cosine_falls_from_the_warm_up_to_zero() -> None:
    train = settings(warm_up_steps=10, lr_schedule="cosine")
    factors = [learning_rate_factor(step, train, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[110] == pytest.approx(0)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert learning_rate_factor(500, train, 110) == pytest.approx(0)  # past the end it does not rise again


def test_a_training_that_is_all_warm_up() -> None:
    train = settings(warm_up_steps=10, lr_schedule="cosine")
    assert [learning_rate_factor(step, train, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_steps_use_the_scheduled_rate() -> None:
    net = network()
    steps = optimizer(net, total_steps=10, warm_up_steps=2, lr_schedule="cosine")
    for step in range(10):
        expected = 0.01 * learning_rate_factor(step, settings(warm_up_steps=2, lr_schedule="cosine"), 10)
        assert steps.learning_rate == pytest.approx(expected)
        assert steps.adamw.param_groups[0]["lr"] == pytest.approx(expected)
        steps.step(loss_of(net, step))


# The gradient step


def test_a_step_is_adamw_on_clipped_gradients() -> None:
    net, reference = network(), network()
    steps = optimizer(net, max_grad_norm=0.1, weight_decay=0.05)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.05)
    for step in range(3):
        norm = steps.step(loss_of(net, step))
        adamw.zero_grad()
        loss_of(reference, step).backward()
        gradients = [p.grad for p in reference.parameters()]
        unclipped = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm.item() == pytest.approx(unclipped.item())
        assert unclipped > 0.1
        for g in gradients:
            g *= 0.1 / unclipped
        adamw.step()
    torch.testing.assert_close(dict(net.named_parameters()), dict(reference.named_parameters()))


def test_small_gradients_are_not_clipped() -> None:
    net = network()
    norm = optimizer(net, max_grad_norm=1000).step(loss_of(net, 0))
    kept = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert kept.item() == pytest.approx(norm.item())


def test_frozen_parameters_are_left_alone() -> None:
    net = network()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    optimizer(net, weight_decay=0.5).step(loss_of(net, 0))
    assert tiny.equal_states(net[0].state_dict(), {k: before[f"0.{k}"] for k in ("weight", "bias")})
    assert not torch.equal(net[2].weight, before["2.weight"])


def test_state_gives_the_identical_next_step() -> None:
    net = network()
    steps = optimizer(net, warm_up_steps=2, lr_schedule="cosine")
    for step in range(4):
        steps.step(loss_of(net, step))
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(steps.state_dict())
    again = network(seed=9)
    again.load_state_dict(weights)
    resumed = optimizer(again, warm_up_steps=2, lr_schedule="cosine")
    resumed.load_state_dict(state)
    for step in range(4, 8):
        assert resumed.learning_rate == steps.learning_rate
        assert torch.equal(steps.step(loss_of(net, step)), resumed.step(loss_of(again, step)))
        assert tiny.equal_states(net.state_dict(), again.state_dict())
    assert tiny.equal_states(steps.state_dict(), resumed.state_dict())


def test_precision_on_a_cpu_is_float32() -> None:
    precision = Precision(True, tiny.CPU)
    assert not precision.enabled
    assert not precision.scaler.is_enabled()
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.rand(2, 4)).dtype == torch.float32


# Bad numbers


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_cases() -> None:
    terms = {"reconstruction": torch.tensor(0.5), "kl": torch.tensor(math.nan)}
    with pytest.raises(NonFiniteLoss) as stopped:
        require_finite(sum(terms.values()), terms, 17, ["case_a", "case_b"])
    assert stopped.value.step == 17
    assert stopped.value.cases == ["case_a", "case_b"]
    assert stopped.value.terms["reconstruction"] == 0.5
    message = str(stopped.value)
    for part in ("step 17", "reconstruction = 0.5", "kl = nan", "case_a, case_b"):
        assert part in message
    require_finite(torch.tensor(1.0), {}, 0, [])
    with pytest.raises(NonFiniteLoss, match="kl = inf"):
        require_finite(torch.tensor(math.inf), {"kl": torch.tensor(math.inf)}, 0, ["a"])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_number_reaches_no_weight(bad: str) -> None:
    net = network()
    steps = optimizer(net)
    checked_step(steps, loss_of(net, 0), {}, 0, ["a"])
    before = copy.deepcopy((net.state_dict(), steps.state_dict()))
    loss = loss_of(net, 1)
    if bad == "loss":
        loss = loss + math.nan  # its gradients are finite
    else:
        net[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match="step 1.*other" if bad == "loss" else "gradient_norm = inf") as stopped:
        checked_step(steps, loss, {"other": torch.tensor(2.0)}, 1, ["a"])
    assert stopped.value.terms["other"] == 2
    assert tiny.equal_states(before, (net.state_dict(), steps.state_dict()))


# Running average


def test_running_average_follows_its_formula_from_a_quick_start() -> None:
    net = network()
    ema = EMA(net, 0.5)
    average = {name: p.detach().clone().double() for name, p in net.named_parameters()}
    used = []
    for step in range(20):
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        ema.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        used.append(decay)
        for name, p in net.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    assert used[0] == 0.1
    assert used[-1] == 0.5
    for name, p in ema.network.named_parameters():
        torch.testing.assert_close(p, average[name].float(), atol=1e-5, rtol=1e-5)


def test_running_average_is_a_frozen_copy() -> None:
    net = network()
    ema = EMA(net, 0.9)
    assert not ema.network.training
    assert not any(p.requires_grad for p in ema.network.parameters())
    before = copy.deepcopy(ema.network.state_dict())
    optimizer(net).step(loss_of(net, 0))
    assert tiny.equal_states(before, ema.network.state_dict())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_decay_zero_keeps_the_last_weights() -> None:
    net = network()
    ema = EMA(net, 0)
    for step in range(3):
        optimizer(net).step(loss_of(net, step))
        ema.update(net, step)
    assert tiny.equal_states(net.state_dict(), ema.network.state_dict())


# Random numbers


def numbers(seed: int, step: int) -> torch.Tensor:
    seed_step(seed, step)
    return torch.rand(4)


def test_random_numbers_are_a_function_of_seed_step_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(numbers(1, 2), numbers(1, 2))
    drawn = {tuple(numbers(seed, step).tolist()) for seed in range(4) for step in range(50)}
    assert len(drawn) == 200
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    others = {tuple(numbers(seed, step).tolist()) for seed in range(4) for step in range(50)}
    assert len(drawn | others) == 400


@pytest.mark.parametrize("seed", [2**31, 2**40, 2**62])
def test_large_seeds(seed: int) -> None:
    assert torch.equal(numbers(seed, 5), numbers(seed, 5))
    assert not torch.equal(numbers(seed, 5), numbers(seed, 6))
    assert not torch.equal(numbers(seed, 5), numbers(seed + 1, 5))


# What is told


def test_epoch_log_averages_and_shares() -> None:
    log = EpochLog()
    log.add({"l1": torch.tensor(1.0), "kl": torch.tensor(0.5), "gradient_norm": torch.tensor(9.0)}, volumes=2)
    log.add({"l1": torch.tensor(2.0), "kl": torch.tensor(-1.5), "discriminator": torch.tensor(7.0)}, volumes=3)
    assert log.volumes == 5
    # A term that only some steps have is averaged over these.
    assert log.averages() == {"l1": 1.5, "kl": -0.5, "gradient_norm": 9, "discriminator": 7}
    assert log.shares() == {"l1": 0.75, "kl": 0.25}


def test_epoch_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = EpochLog()
    log.add({"l1": torch.tensor(3.0), "kl": torch.tensor(1.0)}, volumes=2)
    log.report(2, 5, 4.0, {"loss": 0.25, "level_1": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("epoch 2/5: loss 4.0000 (l1 75%, kl 25%); validation loss 0.25; ")
    assert line.endswith(" left")
    assert "level_1" not in line
    assert rounded({"a": torch.tensor(1.23456), "b": 2.0}) == "a 1.235, b 2"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5.4, "5 s"), (89, "89 s"), (100, "2 min"), (3000, "50 min"), (3725, "1 h 2 min")]
)
def test_time_left(
    seconds: float, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EpochLog()
    monkeypatch.setattr("time.monotonic", lambda: log.start + seconds)
    log.report(1, 2, 0.0, {})
    assert capsys.readouterr().err.endswith(f" {shown} left\n")


def test_position_is_stored_beside_the_stage() -> None:
    state = Position(3, 40, 0.5).state({"weights": 1}, {"seed": 2})
    assert state == {"epoch": 3, "step": 40, "best": 0.5, "stage": {"weights": 1}, "fingerprint": {"seed": 2}}
    assert Position().best == math.inf


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_events_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run") as tracker:
        assert not (tmp_path / "run").exists()  # nothing to say, nothing written
        tracker.scalars("train", {"loss": 0.5, "kl": 0.25}, 3)
        tracker.text("config", "{}")
        read = events(tmp_path / "run")
        assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(3, 0.5)]
        assert [(e.step, e.value) for e in read.Scalars("train/kl")] == [(3, 0.25)]
        tracker.image("picture", np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4), 4)
    (image,) = events(tmp_path / "run").Images("picture")
    assert (image.step, image.height, image.width) == (4, 3, 4)


def test_a_resumed_run_hides_what_it_does_again(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(6):
            tracker.scalars("train", {"loss": float(step)}, step)
    with Tracker(tmp_path) as tracker:
        tracker.first_step = 4
        tracker.scalars("train", {"loss": 10.0}, 4)
    scalars = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in scalars] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 10)]


def test_other_ranks_write_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with Tracker(tmp_path / "run") as tracker:
        tracker.scalars("train", {"loss": 1.0}, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.scalars("train", {"loss": 1.0}, 0)
        assert tracker._file is not None
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(tracker, "_file", full)
            with pytest.raises(OutputError, match="events cannot be written: No space left on device"):
                tracker.scalars("train", {"loss": 2.0}, 1)


def test_a_folder_for_events_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Tracker(tmp_path / "file" / "run") as tracker, pytest.raises(OutputError, match="events cannot be written"):
        tracker.scalars("train", {"loss": 1.0}, 0)
