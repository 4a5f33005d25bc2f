"""ldm3d.weights: what is published describes itself, and what is damaged or foreign is refused."""

import errno
import json
import math
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from nifti_files import make_cases
from safetensors import safe_open
from safetensors.torch import save_file

from ldm3d import weights
from ldm3d.cache import VolumeCache
from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard, DiffusionCard, DiscriminatorCard
from ldm3d.checkpoint import write_state
from ldm3d.definitions import DiscriminatorDef
from ldm3d.errors import OutputError, WeightsError
from ldm3d.latents import build_latent_cache
from ldm3d.nifti import write_volume
from ldm3d.sections import DdpmSchedule
from ldm3d.tutorial import read_tutorial_weights
from ldm3d.weights import (
    LATENT_MEAN,
    check_definition,
    load_autoencoder,
    load_into,
    load_unet,
    read_weights,
    save_weights,
)

CFG = tiny.config()


def published(folder: Path) -> Path:
    """A folder with both networks."""
    mean = {LATENT_MEAN: torch.randn(CFG.latent_shape, generator=torch.Generator().manual_seed(1))}
    save_weights(folder / AUTOENCODER, tiny.autoencoder().state_dict(), tiny.autoencoder_card(CFG))
    save_weights(folder / UNET, tiny.unet().state_dict() | mean, tiny.diffusion_card(CFG))
    return folder


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["ldm3d"])


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description in a weights file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = change(metadata(path))
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(tensors, path, metadata={"format": "pt", "ldm3d": text})


def with_value(tensors: dict[str, torch.Tensor], name: str, value: float) -> dict[str, torch.Tensor]:
    """With one value of one tensor replaced."""
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed[name].view(-1)[2] = value
    return changed


# Round trips


def test_autoencoder_is_rebuilt_from_its_file_alone(tmp_path: Path) -> None:
    network, card = load_autoencoder(published(tmp_path))
    assert card == tiny.autoencoder_card(CFG)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    images = tiny.images(2)
    assert tiny.equal_states(network.encode(images), tiny.autoencoder().encode(images))


def test_unet_is_rebuilt_from_its_file_alone(tmp_path: Path) -> None:
    network, mean, card = load_unet(published(tmp_path))
    assert card == tiny.diffusion_card(CFG)
    assert torch.equal(mean, torch.randn(CFG.latent_shape, generator=torch.Generator().manual_seed(1)))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    latent, timesteps = torch.randn(2, *CFG.latent_shape), torch.tensor([3.0, 900.0])
    assert torch.equal(network(latent, timesteps=timesteps), tiny.unet()(latent, timesteps=timesteps))


def test_patchified_autoencoder_keeps_the_scale_of_its_channels(tmp_path: Path) -> None:
    cfg = tiny.config(autoencoder_def={"patchify": 2})
    network = tiny.autoencoder(cfg)
    network.start_with_principal_components(tiny.images(4))
    save_weights(tmp_path / AUTOENCODER, network.state_dict(), tiny.autoencoder_card(cfg))
    loaded, _ = load_autoencoder(tmp_path)
    assert not torch.equal(loaded.latent_scale, torch.ones_like(loaded.latent_scale))
    assert tiny.equal_states(loaded.encode(tiny.images(2)), network.encode(tiny.images(2)))


def test_latents_that_were_not_centred_have_no_mean(tmp_path: Path) -> None:
    save_weights(tmp_path / UNET, tiny.unet().state_dict(), tiny.diffusion_card(CFG))
    _, mean, _ = load_unet(tmp_path)
    assert torch.equal(mean, torch.zeros(1, 1, 1, 1))


def test_discriminator_card(tmp_path: Path) -> None:
    card = DiscriminatorCard(definition=DiscriminatorDef(channels=8), **tiny.FACTS)
    save_weights(tmp_path / "d.safetensors", {"a": torch.ones(2)}, card)
    tensors, read = read_weights(tmp_path / "d.safetensors", DiscriminatorCard)
    assert read == card
    assert torch.equal(tensors["a"], torch.ones(2))


def test_description_holds_all_that_use_needs(tmp_path: Path) -> None:
    """A reader without this code finds everything by name."""
    published(tmp_path)
    description = metadata(tmp_path / UNET)
    common = {"format_version": 1, "num_train": 6, "step": 3, "channel": 0, "spacing": [3, 3, 3]}
    assert common.items() <= description.items()
    assert description["intensity_range"] == [0, 1]
    assert description["scale_factor"] == 1.25
    assert description["latent_shape"] == [3, 8, 8, 8]
    assert description["autoencoder_sha256"] == "b" * 64
    assert description["trained_on"] == "a" * 64
    assert description["conditioning"] == {}
    assert description["ema_decay"] == 0.999
    assert description["schedule"]["type"] == "ddpm"
    assert description["schedule"]["beta_end"] == 0.0195
    assert description["definition"]["channels"] == [16, 32]
    assert description["definition"]["include_fc"] is True  # defaults too: MONAI's have changed before
    autoencoder = metadata(tmp_path / AUTOENCODER)
    assert common.items() <= autoencoder.items()
    assert autoencoder["definition"]["channels"] == [8, 16]
    assert "code_version" in autoencoder


def test_views_and_transposed_tensors_are_saved_whole(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    save_weights(tmp_path / AUTOENCODER, {"t": tensor.T, "row": tensor[1]}, tiny.autoencoder_card(CFG))
    tensors, _ = read_weights(tmp_path / AUTOENCODER, AutoencoderCard)
    assert torch.equal(tensors["t"], tensor.T)
    assert torch.equal(tensors["row"], tensor[1])


# Damaged and foreign files


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weights; train them first, or name their folder as model_dir"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    path = published(tmp_path) / UNET
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=r"diffusion_unet\.safetensors: not a whole safetensors file"):
        load_unet(tmp_path)


def test_random_bytes(tmp_path: Path) -> None:
    (tmp_path / AUTOENCODER).write_bytes(torch.rand(1000, generator=torch.Generator().manual_seed(0)).numpy().tobytes())
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_autoencoder(tmp_path)


def test_a_pickle_by_that_name(tmp_path: Path) -> None:
    torch.save(tiny.autoencoder().state_dict(), tmp_path / AUTOENCODER)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("foreign", [None, {"format": "pt"}])
def test_safetensors_of_another_project(tmp_path: Path, foreign: dict[str, str] | None) -> None:
    save_file(tiny.autoencoder().state_dict(), tmp_path / AUTOENCODER, metadata=foreign)
    with pytest.raises(WeightsError, match="has no description of its network; it was not written by this project"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("description", ["rubbish", "[1, 2]", "null", "{}"])
def test_a_description_that_is_none(tmp_path: Path, description: str) -> None:
    rewrite(published(tmp_path) / UNET, lambda _: description)
    with pytest.raises(WeightsError, match="format version None; this code reads version 1"):
        load_unet(tmp_path)


def test_a_newer_format(tmp_path: Path) -> None:
    rewrite(published(tmp_path) / UNET, lambda card: card | {"format_version": 2, "novelty": 1})
    with pytest.raises(WeightsError, match="format version 2; this code reads version 1"):
        load_unet(tmp_path)


def test_a_card_of_the_wrong_kind(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(WeightsError, match="is not AutoencoderCard"):
        read_weights(tmp_path / UNET, AutoencoderCard)
    with pytest.raises(WeightsError, match="is not DiffusionCard"):
        read_weights(tmp_path / AUTOENCODER, DiffusionCard)


def test_an_incomplete_card(tmp_path: Path) -> None:
    def without_scale(card: dict[str, Any]) -> dict[str, Any]:
        del card["scale_factor"]
        return card

    rewrite(published(tmp_path) / UNET, without_scale)
    with pytest.raises(WeightsError, match=r"scale_factor.*required"):
        load_unet(tmp_path)


def test_tensors_of_another_architecture(tmp_path: Path) -> None:
    """The description says one network, the tensors are of another."""

    def wider(card: dict[str, Any]) -> dict[str, Any]:
        card["definition"]["channels"] = [16, 64]
        return card

    rewrite(published(tmp_path) / UNET, wider)
    with pytest.raises(WeightsError) as refused:
        load_unet(tmp_path)
    assert "weights of another architecture: 0 tensors missing, 0 unknown, " in str(refused.value)
    assert "of another shape (first: " in str(refused.value)
    assert "use the config that they were trained with" in str(refused.value)


def test_missing_and_unknown_tensors_are_counted_and_nothing_is_loaded() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    tensors["extra"] = tensors.pop("1.bias")
    tensors["0.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError, match=r"1 tensors missing, 1 unknown, 1 of another shape \(first: 0\.bias\)"):
        load_into(network, tensors, Path("file"))
    assert tiny.equal_states(before, network.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bias"), "1 tensors missing, 0 unknown, 0 of another shape"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "0 tensors missing, 1 unknown, 0 of another shape"),
        (lambda tensors: tensors.update(bias=torch.ones(1)), "0 tensors missing, 0 unknown, 1 of another shape"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_one_tensor_that_does_not_fit_is_enough(change: Callable[[Any], Any], message: str) -> None:
    network = torch.nn.Linear(2, 2)
    tensors = dict(network.state_dict())
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        load_into(network, tensors, Path("file"))


def test_a_config_that_contradicts_the_weights() -> None:
    stored, path = CFG.diffusion_def, Path("file")
    check_definition(path, stored, CFG.diffusion_def.model_copy(), "diffusion_def")
    other = tiny.config(diffusion_def={"channels": [16, 64], "num_res_blocks": 2}).diffusion_def
    with pytest.raises(WeightsError) as refused:
        check_definition(path, stored, other, "diffusion_def")
    message = str(refused.value)
    assert "file: diffusion_def of the config contradicts the weights: " in message
    assert "channels is (16, 64) but the weights have (16, 32)" in message
    assert "num_res_blocks is 2 but the weights have 1" in message
    assert "attention_levels" not in message


def test_another_kind_of_schedule_contradicts_the_weights() -> None:
    flow = tiny.config(NoiseScheduler={"type": "rflow"}).noise_schedule
    for stored, configured in ((DdpmSchedule(), flow), (flow, DdpmSchedule())):
        with pytest.raises(WeightsError, match=f"type is {configured.type} but the weights have {stored.type}"):
            check_definition(Path("file"), stored, configured, "NoiseScheduler")


# Writing


@contextmanager
def no_file_larger_than(nbytes: int) -> Iterator[None]:
    """The system refuses to let files grow further, in the very call that finds a disk full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_previous_weights_survive_a_disk_that_fills(tmp_path: Path) -> None:
    path = published(tmp_path) / UNET
    before = path.read_bytes()
    other = tiny.unet(seed=5).state_dict()
    with (
        no_file_larger_than(len(before) // 2),
        pytest.raises(OutputError, match=r"diffusion_unet\.safetensors: cannot be written: .*File too large"),
    ):
        save_weights(path, other, tiny.diffusion_card(CFG))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([AUTOENCODER, UNET])
    save_weights(path, other, tiny.diffusion_card(CFG))
    assert path.read_bytes() != before


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_previous_weights_survive_half_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    path = published(tmp_path) / UNET
    before = path.read_bytes()
    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
        save_weights(path, tiny.unet(seed=5).state_dict(), tiny.diffusion_card(CFG))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([AUTOENCODER, UNET])


def test_weights_are_written_under_another_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published(tmp_path) / UNET
    written: list[Path] = []

    def noted(tensors: Any, target: Path, **more: Any) -> None:
        written.append(Path(target))
        save_file(tensors, target, **more)

    monkeypatch.setattr(weights, "save_file", noted)
    save_weights(path, tiny.unet().state_dict(), tiny.diffusion_card(CFG))
    assert written[0] != path
    assert written[0].parent == path.parent


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    name = "decoder.blocks.1.conv1.conv.weight"
    tensors = with_value(tiny.autoencoder().state_dict(), name, value)
    save_weights(tmp_path / AUTOENCODER, tensors, tiny.autoencoder_card(CFG))
    with pytest.raises(WeightsError, match=f"1 of {len(tensors)} tensors hold NaN or infinity .first: {name}, 1 of "):
        load_autoencoder(tmp_path)
    torch.save(tensors, tmp_path / "autoencoder.pt")
    with pytest.raises(WeightsError, match=f"autoencoder.pt: 1 of .* NaN or infinity .first: {name}, 1 of "):
        read_tutorial_weights(tmp_path / "autoencoder.pt", tiny.autoencoder())


def test_a_latent_mean_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors, card = read_weights(published(tmp_path) / UNET, DiffusionCard)
    save_weights(tmp_path / UNET, with_value(tensors, LATENT_MEAN, math.nan), card)
    with pytest.raises(WeightsError, match="first: latent_mean, 1 of 1536 values"):
        load_unet(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_service_of_another_user_may_read_them_as_the_umask_says(umask: int, mode: int, tmp_path: Path) -> None:
    """And so it is with all else that a training and a sampling leave."""
    before = os.umask(umask)
    try:
        save_weights(tmp_path / AUTOENCODER, {"t": torch.zeros(2)}, tiny.autoencoder_card(CFG))
        write_state(tmp_path / "autoencoder_last.pt", {"t": torch.zeros(2)})
        write_volume(tmp_path / "volume.nii.gz", np.zeros((4, 4, 4)), (1, 1, 1), sidecar={})
        VolumeCache(tmp_path / "cache", (1, 1, 1)).build(make_cases(tmp_path / "data", 1))
        volumes = tiny.Volumes(tiny.images(1, side=8))
        build_latent_cache(tmp_path / "cache", tiny.autoencoder(), "", volumes, [""], False, tiny.CPU).statistics(False)
    finally:
        os.umask(before)
    written = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.suffix for path in written} == {".safetensors", ".pt", ".gz", ".json", ".volume", ".npy", ""}
    assert {path.name for path in written if written[path] != mode} == set()
