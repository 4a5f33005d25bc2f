"""ldm3d.training: steps, rates, averages, random numbers."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from ldm3d import distributed
from ldm3d.errors import NonFiniteLoss
from ldm3d.sections import AutoencoderTrain, Optimization
from ldm3d.training import (
    EMA,
    Optimizer,
    Precision,
    guarded_step,
    learning_rate_factor,
    scaled_learning_rate,
    value_range,
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


def step_of(steps: Optimizer, loss: torch.Tensor, number: int = 0, **terms: float) -> torch.Tensor:
    """One whole step; the gradients' norm."""
    steps.backward(loss)
    (norm,) = guarded_step(
        [steps], [loss], lambda norms: NonFiniteLoss(number, terms | {"gradient_norm": norms[0]}, ["a", "b"])
    )
    return norm


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
        step_of(steps, loss_of(net, step))


# The gradient step


def test_a_step_is_adamw_on_clipped_gradients() -> None:
    net, reference = network(), network()
    steps = optimizer(net, max_grad_norm=0.1, weight_decay=0.05)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.05)
    for step in range(3):
        norm = step_of(steps, loss_of(net, step))
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
    steps = optimizer(net, max_grad_norm=1000)
    steps.backward(loss_of(net, 0))
    norm = steps.clip()
    kept = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert kept.item() == pytest.approx(norm.item())


def test_frozen_parameters_are_left_alone() -> None:
    net = network()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    step_of(optimizer(net, weight_decay=0.5), loss_of(net, 0))
    assert tiny.equal_states(net[0].state_dict(), {k: before[f"0.{k}"] for k in ("weight", "bias")})
    assert not torch.equal(net[2].weight, before["2.weight"])


def test_state_gives_the_identical_next_step() -> None:
    net = network()
    steps = optimizer(net, warm_up_steps=2, lr_schedule="cosine")
    for step in range(4):
        step_of(steps, loss_of(net, step))
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(steps.state_dict())
    again = network(seed=9)
    again.load_state_dict(weights)
    resumed = optimizer(again, warm_up_steps=2, lr_schedule="cosine")
    resumed.load_state_dict(state)
    for step in range(4, 8):
        assert resumed.learning_rate == steps.learning_rate
        assert torch.equal(step_of(steps, loss_of(net, step)), step_of(resumed, loss_of(again, step)))
        assert tiny.equal_states(net.state_dict(), again.state_dict())
    assert tiny.equal_states(steps.state_dict(), resumed.state_dict())


def test_precision_on_a_cpu_is_float32() -> None:
    precision = Precision(True, tiny.CPU)
    assert not precision.enabled
    assert not precision.scaler.is_enabled()
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.rand(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_a_gpu_that_only_emulates_bfloat16_uses_float16(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has_units or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    precision = Precision(True, torch.device("cuda"))
    assert precision.dtype == (torch.bfloat16 if has_units else torch.float16)


# Bad numbers


def test_the_message_names_step_terms_cases_and_ranges() -> None:
    error = NonFiniteLoss(17, {"reconstruction": 0.5, "kl": math.nan}, ["case_a", "case_b"], {"image": "0 to 1"})
    message = str(error)
    for part in ("step 17", "reconstruction = 0.5", "kl = nan", "case_a, case_b", "image 0 to 1", "NaN_FIX_GUIDE.md"):
        assert part in message
    assert "--replay" not in message
    error.replay = "kept.pt"
    assert "--replay kept.pt" in str(error)
    assert math.isnan(error.loss) and NonFiniteLoss(0, {"a": 1.0, "gradient_norm": math.inf}, []).loss == 1


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_number_reaches_no_weight(bad: str) -> None:
    net = network()
    steps = optimizer(net)
    step_of(steps, loss_of(net, 0))
    before = copy.deepcopy((net.state_dict(), steps.state_dict()))
    loss = loss_of(net, 1)
    if bad == "loss":
        loss = loss + math.nan  # its gradients are finite
    else:
        net[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match="step 1.*other" if bad == "loss" else "gradient_norm = inf") as stopped:
        step_of(steps, loss, 1, other=2.0)
    assert stopped.value.terms["other"] == 2
    assert tiny.equal_states(before, (net.state_dict(), steps.state_dict()))


def test_no_weight_changes_where_one_of_two_losses_is_bad() -> None:
    """The first optimizer, whose step is good, must not be ahead of the second."""
    nets = network(), network(1)
    both = [optimizer(net) for net in nets]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    losses = [loss_of(nets[0], 0), loss_of(nets[1], 0) * math.nan]
    for steps, loss in zip(both, losses, strict=True):
        steps.backward(loss)
    with pytest.raises(NonFiniteLoss):
        guarded_step(both, losses, lambda norms: NonFiniteLoss(0, {}, []))
    assert tiny.equal_states([net.state_dict() for net in nets], before)


def scaling(net: nn.Module, max_skipped: int) -> Optimizer:
    """An optimizer with float16's loss scaling."""
    precision = Precision(True, tiny.CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return Optimizer(net.parameters(), settings(), 10, precision, max_skipped)


def test_loss_scaling_skips_some_overflows_and_then_stops(capsys: pytest.CaptureFixture[str]) -> None:
    net = network()
    steps = scaling(net, max_skipped=2)
    before = copy.deepcopy(net.state_dict())
    overflow = net[0].weight.register_hook(lambda gradient: gradient * math.inf)
    for skipped in (1, 2):
        step_of(steps, loss_of(net, 0))
        assert (steps.skipped, steps.scaler.get_scale()) == (skipped, 1024 / 2**skipped)
        said = f"left out, {skipped} in a row of at most 2; loss scale now {1024 // 2**skipped}\n"
        assert capsys.readouterr().err.endswith(said)
    resumed = scaling(net, max_skipped=2)
    resumed.load_state_dict(steps.state_dict())
    for two_in_a_row in (steps, resumed):
        with pytest.raises(NonFiniteLoss):
            step_of(two_in_a_row, loss_of(net, 0))
    assert tiny.equal_states(net.state_dict(), before)
    assert steps.learning_rate == 0.01
    overflow.remove()
    net.zero_grad()
    resumed = scaling(net, max_skipped=2)
    resumed.load_state_dict(steps.state_dict())
    step_of(resumed, loss_of(net, 0))
    assert resumed.skipped == 0 and not tiny.equal_states(net.state_dict(), before)
    assert capsys.readouterr().err == ""


def test_loss_scaling_does_not_excuse_a_bad_loss_with_good_gradients() -> None:
    """Scaling skips on bad gradients only: it would take such a step."""
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFiniteLoss):
        step_of(scaling(net, max_skipped=5), loss_of(net, 0) + math.nan)
    assert tiny.equal_states(net.state_dict(), before)


def test_scaled_gradients_make_the_step_of_unscaled_ones() -> None:
    one, other = network(), network()
    for step in range(3):
        norms = step_of(optimizer(one), loss_of(one, step)), step_of(scaling(other, 0), loss_of(other, step))
        torch.testing.assert_close(*norms)
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", 8**0.5), ("linear", 8)])
def test_learning_rate_follows_the_size_of_a_step(rule: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    train = settings(scale_lr=rule, accumulate_steps=2)
    assert scaled_learning_rate(train) == pytest.approx(0.01 * factor)
    assert Optimizer(network().parameters(), train, 10, Precision(True, tiny.CPU)).learning_rate == pytest.approx(
        0.01 * factor
    )


def test_ranges_of_values_are_told() -> None:
    assert value_range(torch.tensor([0.0, 1.5])) == "0 to 1.5"
    assert value_range(torch.tensor([0.0, math.nan, -2.0, math.inf])) == "-2 to 0, 2 of 4 not finite"
    assert value_range(torch.tensor([math.nan])) == "nowhere finite"


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
    step_of(optimizer(net), loss_of(net, 0))
    assert tiny.equal_states(before, ema.network.state_dict())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_decay_zero_keeps_the_last_weights() -> None:
    net = network()
    ema = EMA(net, 0)
    for step in range(3):
        step_of(optimizer(net), loss_of(net, step))
        ema.update(net, step)
    assert tiny.equal_states(net.state_dict(), ema.network.state_dict())
