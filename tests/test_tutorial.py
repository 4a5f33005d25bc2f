"""ldm3d.tutorial: `.pt` files made with `monai` and `monai-generative` give the same outputs here; code is not run."""

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import Tensor, nn

from ldm3d.errors import WeightsError
from ldm3d.files import sha256
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.schema import Config
from ldm3d.tutorial import (
    AUTOENCODER,
    UNET,
    has_tutorial_weights,
    load_tutorial_autoencoder,
    measured_scale_factor,
    read_tutorial_weights,
    tutorial_sampler,
)

CFG = tiny.config()
ATTENTION = tiny.config(
    autoencoder_def={
        "attention_levels": [False, True],
        "with_encoder_nonlocal_attn": True,
        "with_decoder_nonlocal_attn": True,
    },
    diffusion_def={"attention_levels": [True, True], "num_head_channels": [8, 16]},
)
# The older package calculates no projection behind its attention, though its files have one.
NO_PROJECTION = tiny.config(
    autoencoder_def={**ATTENTION.autoencoder_def.model_dump(mode="json"), "include_fc": False},
    diffusion_def={**ATTENTION.diffusion_def.model_dump(mode="json"), "include_fc": False},
)


@pytest.fixture(scope="module")
def generative() -> Any:
    """Networks of the older package, the reference for its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("generative.networks.nets")
        except ImportError as error:
            pytest.skip(f"monai-generative is not installed ({error}); pip install --no-deps monai-generative==0.2.3")


def older_arguments(definition: Any) -> dict[str, Any]:
    """A definition with the older package's names, and without what it does not know."""
    arguments = definition.model_dump()
    for name in ("patchify", "include_fc", "use_combined_linear", "dropout_cattn", "use_flash_attention"):
        arguments.pop(name, None)
    arguments["num_channels"] = arguments.pop("channels")
    if isinstance(arguments["num_res_blocks"], int):
        arguments["num_res_blocks"] = (arguments["num_res_blocks"],) * len(arguments["num_channels"])
    return arguments


def saved(path: Path, network: nn.Module, prefix: str = "") -> Path:
    torch.save({prefix + name: tensor for name, tensor in network.state_dict().items()}, path)
    return path


def inputs(cfg: Config) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *cfg.latent_shape), torch.tensor([1.0, 800.0])


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# What loads


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "of DistributedDataParallel"])
@pytest.mark.parametrize("cfg", [CFG, ATTENTION], ids=["convolutions", "attention"])
def test_weights_of_monai(tmp_path: Path, cfg: Config, prefix: str) -> None:
    theirs = tiny.shaken(AutoencoderKL(**cfg.autoencoder_def.model_dump(exclude={"patchify"}))).eval()
    saved(tmp_path / AUTOENCODER, theirs, prefix)
    ours = load_tutorial_autoencoder(tmp_path, cfg)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    assert tiny.equal_states(ours.encode(tiny.images(1)), theirs.encode(tiny.images(1)))
    denoiser = tiny.shaken(DiffusionModelUNet(**cfg.diffusion_def.model_dump())).eval()
    loaded = read_tutorial_weights(saved(tmp_path / UNET, denoiser, prefix), build_unet(cfg.diffusion_def)).eval()
    latent, timesteps = inputs(cfg)
    assert torch.equal(loaded(latent, timesteps=timesteps), denoiser(latent, timesteps=timesteps))


def test_a_state_dict_inside_a_checkpoint(tmp_path: Path) -> None:
    theirs = tiny.unet(CFG)
    torch.save({"epoch": 3, "state_dict": theirs.state_dict()}, tmp_path / UNET)
    loaded = read_tutorial_weights(tmp_path / UNET, build_unet(CFG.diffusion_def))
    assert tiny.equal_states(loaded.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "of DistributedDataParallel"])
@pytest.mark.parametrize("cfg", [CFG, ATTENTION, NO_PROJECTION], ids=["convolutions", "attention", "no projection"])
def test_autoencoder_of_the_older_package(generative: Any, tmp_path: Path, cfg: Config, prefix: str) -> None:
    theirs = tiny.shaken(generative.AutoencoderKL(**older_arguments(cfg.autoencoder_def)), seed=3).eval()
    ours = read_tutorial_weights(saved(tmp_path / AUTOENCODER, theirs, prefix), build_autoencoder(cfg.autoencoder_def))
    images = tiny.images(2)
    with torch.inference_mode():
        close(ours.eval().encode(images), theirs.encode(images))
        latent, _ = inputs(cfg)
        close(ours.decode(latent), theirs.decode(latent))


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "of DistributedDataParallel"])
@pytest.mark.parametrize(
    "cfg",
    [
        CFG,
        ATTENTION,
        NO_PROJECTION,
        tiny.config(diffusion_def={"attention_levels": [False, False], "resblock_updown": True}),
    ],
    ids=["attention below", "attention", "no projection", "convolutions"],
)
def test_unet_of_the_older_package(generative: Any, tmp_path: Path, cfg: Config, prefix: str) -> None:
    theirs = tiny.shaken(generative.DiffusionModelUNet(**older_arguments(cfg.diffusion_def)), seed=3).eval()
    ours = read_tutorial_weights(saved(tmp_path / UNET, theirs, prefix), build_unet(cfg.diffusion_def)).eval()
    latent, timesteps = inputs(cfg)
    with torch.inference_mode():
        expected = theirs(latent, timesteps=timesteps)
        assert expected.std() > 0.1
        close(ours(latent, timesteps=timesteps), expected)


def test_sampler_of_tutorial_weights(tmp_path: Path) -> None:
    cfg = tiny.config(channel=2)
    saved(tmp_path / AUTOENCODER, tiny.autoencoder(cfg))
    assert not has_tutorial_weights(tmp_path)
    saved(tmp_path / UNET, tiny.unet(cfg))
    assert has_tutorial_weights(tmp_path)
    sampler = tutorial_sampler(tmp_path, cfg, load_tutorial_autoencoder(tmp_path, cfg), 0.7, tiny.CPU)
    assert sampler.statistics.scale_factor == sampler.card.scale_factor == 0.7
    assert not sampler.statistics.mean.any()
    assert sampler.card.channel == 2
    assert sampler.card.latent_shape == cfg.latent_shape
    assert sampler.digests == {name: sha256(tmp_path / name) for name in (AUTOENCODER, UNET)}
    assert sampler.card.autoencoder_sha256 == sha256(tmp_path / AUTOENCODER)
    assert sampler.sample(0, [0], steps=2).shape == (1, 1, 16, 16, 16)


def test_measured_scale_factor_is_one_over_the_deviation_of_latents() -> None:
    network, images = tiny.autoencoder(), tiny.images(5)
    mean, sigma = network.encode(images)
    variance = mean.double().var(correction=0) + sigma.double().square().mean()
    measured = measured_scale_factor(network, iter(images), tiny.CPU)
    assert measured == pytest.approx(variance.rsqrt().item(), rel=1e-6)
    torch.manual_seed(0)
    drawn = torch.stack([network.sampling(mean, sigma) for _ in range(20)])
    assert (drawn * measured).std().item() == pytest.approx(1, abs=0.01)


# What does not


class Malicious:
    """A pickle that runs a command when it is loaded as pickles are."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["whole", "among tensors"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "was here"
    bomb = Malicious(f"touch '{mark}'")
    content = bomb if place == "whole" else tiny.unet(CFG).state_dict() | {"extra": bomb}
    torch.save(content, tmp_path / UNET)
    torch.load(tmp_path / UNET, weights_only=False)
    assert mark.exists()  # it is armed
    mark.unlink()
    with pytest.raises(WeightsError, match=r"diffusion_unet\.pt: cannot be loaded: .*could run code when loaded"):
        read_tutorial_weights(tmp_path / UNET, build_unet(CFG.diffusion_def))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"rubbish" * 100])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / UNET).write_bytes(content)
    with pytest.raises(WeightsError, match=r"diffusion_unet\.pt: cannot be loaded: "):
        read_tutorial_weights(tmp_path / UNET, build_unet(CFG.diffusion_def))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = saved(tmp_path / UNET, tiny.unet(CFG))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"diffusion_unet\.pt: cannot be loaded: "):
        read_tutorial_weights(path, build_unet(CFG.diffusion_def))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"autoencoder\.pt: no such file"):
        load_tutorial_autoencoder(tmp_path, CFG)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.ones(3), {"state_dict": [torch.ones(1)]}])
def test_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / UNET)
    with pytest.raises(WeightsError, match="does not hold a state dict of tensors"):
        read_tutorial_weights(tmp_path / UNET, build_unet(CFG.diffusion_def))


OTHERS = {
    "wider": {"channels": [16, 64]},
    "more blocks": {"num_res_blocks": 2},
    "deeper": {"channels": [16, 32, 32], "attention_levels": [False, True, True]},
    "less attention": {"attention_levels": [False, False]},
    "more attention": {"attention_levels": [True, True]},
}


def refused(path: Path, network: Any) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match="weights of another architecture"):
        read_tutorial_weights(path, network)
    assert tiny.equal_states(before, network.state_dict())  # nothing was loaded, not even in part


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture(tmp_path: Path, name: str) -> None:
    other = tiny.config(diffusion_def=OTHERS[name]).diffusion_def
    refused(saved(tmp_path / UNET, tiny.unet(CFG)), build_unet(other))


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_of_the_older_package(generative: Any, tmp_path: Path, name: str) -> None:
    theirs = generative.DiffusionModelUNet(**older_arguments(CFG.diffusion_def))
    refused(saved(tmp_path / UNET, theirs), build_unet(tiny.config(diffusion_def=OTHERS[name]).diffusion_def))


def test_another_autoencoder_of_the_older_package(generative: Any, tmp_path: Path) -> None:
    for saved_cfg, cfg in ((CFG, ATTENTION), (ATTENTION, CFG)):
        theirs = generative.AutoencoderKL(**older_arguments(saved_cfg.autoencoder_def))
        refused(saved(tmp_path / AUTOENCODER, theirs), build_autoencoder(cfg.autoencoder_def))


def test_part_of_the_tensors_is_not_enough(generative: Any, tmp_path: Path) -> None:
    """MONAI's own loader leaves what the file lacks as it was: random."""
    for theirs, ours in (
        (
            generative.AutoencoderKL(**older_arguments(CFG.autoencoder_def)),
            build_autoencoder(CFG.autoencoder_def),
        ),
        (generative.DiffusionModelUNet(**older_arguments(CFG.diffusion_def)), build_unet(CFG.diffusion_def)),
        (AutoencoderKL(**CFG.autoencoder_def.model_dump(exclude={"patchify"})), build_autoencoder(CFG.autoencoder_def)),
    ):
        state = theirs.state_dict()
        state.pop(next(name for name in state if name.endswith("conv1.conv.weight")))
        torch.save(state, tmp_path / "part.pt")
        refused(tmp_path / "part.pt", ours)


def test_a_tensor_by_an_unknown_name_is_not_left_out(generative: Any, tmp_path: Path) -> None:
    theirs = generative.DiffusionModelUNet(**older_arguments(CFG.diffusion_def)).state_dict()
    theirs["conv_into.conv.weight"] = theirs.pop("conv_in.conv.weight")
    torch.save(theirs, tmp_path / UNET)
    refused(tmp_path / UNET, build_unet(CFG.diffusion_def))


def test_tutorial_files_of_blocks(tmp_path: Path) -> None:
    """A network with `patchify`, which the tutorial does not have, has no tutorial files."""
    cfg = tiny.config(autoencoder_def={"patchify": 2})
    saved(tmp_path / AUTOENCODER, tiny.autoencoder(CFG))
    refused(tmp_path / AUTOENCODER, build_autoencoder(cfg.autoencoder_def))
