"""ldm3d.losses: each term against its definition, and the perceptual term where its weights are not to be had."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from ldm3d import losses
from ldm3d.losses import AutoencoderLoss, kl_divergence, load_perceptual
from ldm3d.sections import AutoencoderTrain


def train(**changes: Any) -> AutoencoderTrain:
    return AutoencoderTrain(batch_size=1, patch_size=(16, 16, 16), lr=1e-3, max_epochs=1, **changes)


def posterior(shape: tuple[int, ...] = (2, 3, 4, 4, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) * 2 + 0.01


def test_kl_is_the_mean_of_the_exact_divergence() -> None:
    mean, sigma = posterior()
    expected = exact_kl(Normal(mean, sigma), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, sigma), expected)
    assert kl_divergence(torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)) == 0


def test_kl_does_not_depend_on_patch_size_or_channels() -> None:
    mean, sigma = posterior()
    larger = (part.repeat(1, 3, 2, 3, 4) for part in (mean, sigma))
    torch.testing.assert_close(kl_divergence(*larger), kl_divergence(mean, sigma))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kl_stays_finite_where_sigma_has_underflowed(dtype: torch.dtype) -> None:
    mean = torch.zeros(1, 1, 2, 2, 2, dtype=dtype, requires_grad=True)
    sigma = torch.full((1, 1, 2, 2, 2), 1e-30 if dtype == torch.float32 else 1e-9).to(dtype).requires_grad_()
    if dtype == torch.float16:
        assert not sigma.any()
    value = kl_divergence(mean, sigma)
    value.backward()
    assert value.dtype == torch.float32
    assert 40 < value < 50
    assert torch.isfinite(sigma.grad).all()
    assert torch.isfinite(mean.grad).all()


def test_half_precision_does_not_overflow() -> None:
    mean = torch.full((1, 1, 2, 2, 2), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert kl_divergence(mean, torch.ones_like(mean)) == 45000


@pytest.mark.parametrize(("kind", "expected"), [("l1", 0.25), ("l2", 0.125)])
def test_terms_are_weighted(kind: str, expected: float) -> None:
    loss = AutoencoderLoss(train(recon_loss=kind, kl_weight=0.5, adv_weight=0.25))
    image = torch.zeros(2, 1, 4, 4, 4)
    reconstruction = image.clone()
    reconstruction[..., 0] = 0.5
    reconstruction[..., 1] = -0.5
    expected = {"l1": 0.25, "l2": 0.125}[kind]
    mean, sigma = posterior()
    verdict = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    terms = loss.generator(image, reconstruction, mean, sigma, verdict)
    assert {name: pytest.approx(value.item()) for name, value in terms.items()} == {
        "reconstruction": expected,
        "kl": 0.5 * kl_divergence(mean, sigma).item(),
        "adversarial": 0.25 * (9 + 1 + 0 + 4) / 4,
    }


def test_no_verdict_no_adversarial_term() -> None:
    image = torch.zeros(1, 1, 4, 4, 4)
    assert set(AutoencoderLoss(train()).generator(image, image, *posterior(), None)) == {"reconstruction", "kl"}


def test_adversarial_term_is_least_squares_without_activation() -> None:
    loss = AutoencoderLoss(train(adv_weight=1))
    image = torch.zeros(1, 1, 4, 4, 4)
    for value in (-3.0, -0.5, 0.0, 0.5, 1.0, 2.0):
        verdict = torch.full((1, 1, 2, 2, 2), value)
        terms = loss.generator(image, image, *posterior(), verdict)
        assert terms["adversarial"].item() == pytest.approx((value - 1) ** 2)


def test_discriminator_wants_zero_for_fakes_and_one_for_reals() -> None:
    loss = AutoencoderLoss(train())
    fake, real = torch.tensor([-1.0, 0.5]), torch.tensor([1.0, -2.0])
    assert loss.discriminator(fake, real).item() == pytest.approx(0.5 * ((1 + 0.25) / 2 + (0 + 9) / 2))
    assert loss.discriminator(torch.zeros(3), torch.ones(3)) == 0


def test_formula_names_weights_and_start() -> None:
    assert AutoencoderLoss(train(kl_weight=0.002, adv_weight=0)).formula() == "l1 + 0.002 kl"
    formula = AutoencoderLoss(train(recon_loss="l2", adv_weight=0.01, adv_warm_up_epochs=5)).formula()
    assert formula == "l2 + 0.001 kl + 0.01 adversarial from epoch 6"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download is refused at once, as on a machine without a network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["squeeze", "radimagenet_resnet50", "medicalnet_resnet10_23datasets"])
def test_without_perceptual_weights_there_is_a_notice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    start = time.monotonic()
    loss = AutoencoderLoss(train(perceptual_weight=0.1, perceptual_network=name))
    assert time.monotonic() - start < 60
    notice = capsys.readouterr().err
    assert loss.perceptual is None
    assert notice.startswith("notice: no perceptual loss")
    assert name in notice
    assert "autoencoder_train.perceptual_weights" in notice
    assert notice.count("\n") == 1
    image = torch.zeros(1, 1, 4, 4, 4)
    assert "perceptual" not in loss.generator(image, image, *posterior(), None)


@pytest.mark.usefixtures("offline")
def test_a_folder_of_perceptual_weights_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_perceptual(train(perceptual_weight=0.1, perceptual_weights=tmp_path / "nowhere")) is None
    assert f"{tmp_path / 'nowhere'} is not a folder" in capsys.readouterr().err


def test_no_weight_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "PerceptualLoss", None)
    assert AutoencoderLoss(train(perceptual_weight=0)).perceptual is None


class FakePerceptual(nn.Module):
    """Stands for a network whose weights are at hand."""

    def __init__(self, **arguments: Any):
        super().__init__()
        self.arguments = arguments
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * (x - y).square().mean()


def test_no_process_has_a_perceptual_term_that_another_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(losses, "PerceptualLoss", FakePerceptual)
    monkeypatch.setattr(losses.distributed, "gather_objects", lambda mine: [mine, "URLError: no network"])
    assert load_perceptual(train(perceptual_weight=0.1)) is None
    assert "cannot be loaded (URLError: no network)" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "is_3d"), [("squeeze", False), ("medicalnet_resnet10_23datasets", True)])
def test_perceptual_term_is_weighted_and_its_network_frozen(
    name: str, is_3d: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PerceptualLoss", FakePerceptual)
    settings = train(perceptual_weight=0.5, perceptual_network=name, perceptual_weights=tmp_path)
    loss = AutoencoderLoss(settings)
    assert isinstance(loss.perceptual, FakePerceptual)
    expected = {"is_fake_3d": not is_3d, "channel_wise": is_3d, "cache_dir": str(tmp_path), "network_type": name}
    assert expected.items() <= loss.perceptual.arguments.items()
    assert not loss.perceptual.factor.requires_grad
    assert not loss.perceptual.training
    image = torch.zeros(1, 1, 4, 4, 4)
    terms = loss.generator(image, image + 2, *posterior(), None)
    assert terms["perceptual"].item() == pytest.approx(0.5 * 3 * 4)
    assert "0.5 perceptual" in loss.formula()
