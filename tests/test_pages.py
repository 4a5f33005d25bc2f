"""Tables in documents are what was measured, and what the weights say of themselves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from documents import ROOT
from monai.networks.schedulers import DDPMScheduler
from safetensors import safe_open
from torch import Tensor

from benchmarks.demo_model import DemoModel, roots
from benchmarks.effects_of_sampling import clean_latents
from benchmarks.effects_of_training import far
from benchmarks.measure import RESULTS, table
from benchmarks.reference import BETAS
from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard, DiffusionCard, read_card
from ldm3d.weights import LATENT_MEAN

DOCS, DEMO = ROOT / "docs", ROOT / "checkpoints" / "demo"


def shown(page: str, name: str) -> str:
    """The table between the marks `<!-- NAME table -->`."""
    return (DOCS / page).read_text().split(f"<!-- {name} table -->\n")[1].split(f"<!-- /{name} table -->")[0].strip()


def rows_of(result: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{result}.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("page", "name", "result"),
    [
        ("MONAI_TUTORIAL.md", "effects", "tutorial_effects"),
        ("EXPERIMENTS.md", "loss", "loss"),
        ("EXPERIMENTS.md", "quality", "quality"),
    ],
)
def test_tables_are_what_was_measured(page: str, name: str, result: str) -> None:
    assert shown(page, name) == table(rows_of(result))


def test_the_effects_are_as_the_page_says() -> None:
    """Of each difference, which side the figures favour."""
    rows = {row["measured"]: row for row in rows_of("tutorial_effects")}

    def row(words: str) -> dict[str, Any]:
        (found,) = [value for name, value in rows.items() if words in name]
        return found

    for better in ("PSNR of phantoms whose", "PSNR of the phantoms decoded", "spread of the phantoms"):
        assert row(better)["here"] > row(better)["tutorial"], better
    for worse in ("MMD", "10 steps", "largest difference"):
        assert row(worse)["tutorial"] > row(worse)["here"], worse
    assert row("way that 30 steps")["here"] == "1.0000"
    assert row("from validation to validation")["here"] == "0.00%"
    assert row("distance of the weights")["here"] == 0 < row("distance of the weights")["tutorial"]


def test_a_velocity_network_predicts_the_noise_of_a_ddpm() -> None:
    """The change of variables by which the demo's network is sampled with DDIM, on a network that knows the answer."""
    clean, noise = torch.randn(2, 3, 1, 4, 4, 4).unbind()
    alphas = DDPMScheduler(1000, **BETAS).alphas_cumprod
    times = torch.tensor([1, 400, 999])

    def velocity(point: Tensor, timesteps: Tensor) -> Tensor:
        s = (timesteps / 1000).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(point, (1 - s) * clean + s * noise)
        return clean - noise

    model: Any = DemoModel(SimpleNamespace(unet=velocity), clean, clean, noise)  # type: ignore[arg-type]
    signal, share = (root.view(-1, 1, 1, 1, 1) for root in roots(alphas[times]))
    predicted = model.noise_predictor(alphas)(signal * clean + share * noise, times)
    torch.testing.assert_close(predicted, noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("clip", "spread"), [(True, 0.718), (False, 1.0)])
def test_monais_scheduler_clips_normal_latents(clip: bool, spread: float) -> None:
    normal = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    assert float(clean_latents(normal, clip).std()) == pytest.approx(spread, abs=0.01)


def test_runs_that_end_alike_are_no_distance_apart() -> None:
    start, end = torch.zeros(4), torch.ones(4)
    assert (far(end, end, start), far(end, start, start)) == (0, 1)


def parameters(path: Path, *others: str) -> str:
    with safe_open(path, "np") as file:
        count = sum(np.prod(file.get_slice(name).get_shape()) for name in file.keys() if name not in others)  # noqa: SIM118
    return f"{count / 1e6:.2f} M"


def by(numbers: Any) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def test_the_model_card_says_what_the_weights_say() -> None:
    first, second = read_card(DEMO / AUTOENCODER, AutoencoderCard), read_card(DEMO / UNET, DiffusionCard)
    image = [n * first.definition.downsampling for n in second.latent_shape[1:]]
    rows = [
        ("parameters of the autoencoder", parameters(DEMO / AUTOENCODER)),
        ("parameters of the diffusion network", parameters(DEMO / UNET, LATENT_MEAN)),
        ("volumes", f"{by(image)} voxels of {by(second.spacing)} mm, channel {second.channel}"),
        ("values", "{:g} to {:g}".format(*second.intensity_range)),
        ("latents", f"{second.latent_shape[0]} channels of {by(second.latent_shape[1:])}"),
        ("scale factor", f"{second.scale_factor:.4f}"),
        ("schedule", f"{second.schedule.type}, running average {second.ema_decay:g}"),
        ("training volumes", f"{second.num_train}, digest {second.trained_on}"),
        ("steps", f"{first.step} and {second.step}"),
        ("validation", f"L1 {first.validation['l1']:.4f}; loss {second.validation['loss']:.3f}"),
    ]
    assert shown("MODEL_CARD.md", "weights") == table([{"what": what, "value": value} for what, value in rows])


def test_the_data_card_says_what_the_profile_says() -> None:
    features = json.loads((DEMO / "reference_profile.json").read_text())["features"]
    assert len(features["brain_volume_ml"]) == 256
    rows = [
        {"what": what, "lowest": min(values), "median": float(np.median(values)), "highest": max(values)}
        for what, values in (
            ("volume of the brain, ml", features["brain_volume_ml"]),
            ("median intensity of the brain, where 1 is white", features["intensity_p50"]),
            ("standard deviation of the noise, where 1 is white", features["noise"]),
            ("standard deviation of the shading", features["shading"]),
        )
    ]
    assert shown("DATA_CARD.md", "profile") == table(rows)
