"""mlops.deployment.export: exported networks make the project's volumes, and run without the project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch

from ldm3d import sampling
from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.diffusion import sample_latent
from ldm3d.errors import ConfigError, WeightsError
from ldm3d.files import sha256
from ldm3d.samples import file_name, write_sample
from ldm3d.sampling import Sampler, VolumeId
from ldm3d.sections import DdpmSchedule, RFlowSchedule
from ldm3d.weights import LATENT_MEAN, save_weights
from mlops.deployment import export as exporting
from mlops.deployment import run_exported
from mlops.deployment.export import LARGEST_DIFFERENCE, export, sampling_steps
from mlops.deployment.run_exported import CARD, DECODER, CannotRun, Exported

FLOW = {"NoiseScheduler": {"type": "rflow"}, "autoencoder_def": {"patchify": 2}}
# Everything that a device of this kind need not have, and this project itself.
ABSENT = ("ldm3d", "mlops", "utils", "monai", "safetensors", "pydantic", "scipy", "einops", "nilearn", "tqdm")


def publish(folder: Path, settings: dict[str, Any]) -> Path:
    cfg = tiny.config(**settings)
    save_weights(folder / AUTOENCODER, tiny.shaken(tiny.autoencoder(cfg)).state_dict(), tiny.autoencoder_card(cfg))
    mean = torch.randn(cfg.latent_shape, generator=torch.Generator().manual_seed(1)) / 10
    card = tiny.diffusion_card(cfg, sha256(folder / AUTOENCODER))
    save_weights(folder / UNET, tiny.unet(cfg).state_dict() | {LATENT_MEAN: mean}, card)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and what the command makes of them."""
    folder = tmp_path_factory.mktemp("exported")
    weights, output = publish(folder / "weights", FLOW), folder / "exported"
    done = program("-m", "mlops.deployment.export", "--model-dir", weights, "--output", output, "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["max_difference"] <= LARGEST_DIFFERENCE
    return folder


@pytest.fixture(scope="module")
def runner(exported: Path) -> Exported:
    return Exported(exported / "exported")


@pytest.fixture(scope="module")
def sampler(exported: Path) -> Sampler:
    return Sampler.from_folder(exported / "weights", tiny.CPU, amp=False)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported / "exported", tmp_path / "exported")


def program(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


# The same volumes


def agree(runner: Exported, sampler: Sampler, steps: int) -> None:
    for seed, index in ((0, 0), (7, 3)):
        ours = sampler.sample(seed, [index], steps=steps)[0, 0]
        assert float((ours - runner.sample(seed, index)).abs().max()) <= LARGEST_DIFFERENCE
        assert float(ours.std()) > 0.05, "nothing to compare"
    assert not torch.equal(runner.sample(0, 0), runner.sample(0, 1))


def test_the_whole_chain_gives_the_volumes_of_the_project(runner: Exported, sampler: Sampler) -> None:
    agree(runner, sampler, 3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_so_it_does_with_ddim(exported: Path, prediction: Any) -> None:
    """The same networks, as if another training had made them."""
    schedule = DdpmSchedule(type="ddpm", prediction_type=prediction)
    runner, sampler = Exported(exported / "exported"), Sampler.from_folder(exported / "weights", tiny.CPU, amp=False)
    runner.card["steps"] = sampling_steps(schedule, "ddim", 7)
    sampler.card = sampler.card.model_copy(update={"schedule": schedule})
    agree(runner, sampler, 7)


def test_each_network_by_itself(runner: Exported, sampler: Sampler) -> None:
    latent = torch.randn(1, *sampler.card.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for time in (0.0, 12.5, 999.0):
            timestep = torch.tensor([time])
            expected = sampler.unet(latent, timesteps=timestep)
            torch.testing.assert_close(runner.unet(latent, timestep), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runner.decoder(latent), sampler.decode(latent), atol=1e-5, rtol=0)


def test_convolutions_are_onednn_s_where_torch_has_it(
    runner: Exported, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convolutions(runner: Exported) -> set[Any]:
        calls = (node.target for node in runner.unet.graph.nodes if node.op == "call_function")
        return {target for target in calls if "convolution" in str(target) or "conv3d" in str(target)}

    assert convolutions(runner) == {torch.ops.aten.mkldnn_convolution.default}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = Exported(exported / "exported")
    assert convolutions(plain) == {torch.ops.aten.conv3d.default}
    torch.testing.assert_close(runner.sample(0, 0), plain.sample(0, 0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("kind", ["rflow", "epsilon", "v_prediction"])
def test_the_table_of_steps_is_the_sampler(kind: str, count: int) -> None:
    flow = kind == "rflow"
    schedule = RFlowSchedule(type="rflow") if flow else DdpmSchedule(type="ddpm", prediction_type=kind)  # type: ignore
    sampler = "rflow" if flow else "ddim"
    noise = torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    latent = noise
    for step in sampling_steps(schedule, sampler, count):  # type: ignore[arg-type]
        latent = step["keep"] * latent + step["add"] * torch.tanh(latent + step["timestep"] / 1000)
    expected = sample_latent(
        lambda z, t: torch.tanh(z + t.view(-1, 1, 1, 1, 1) / 1000),
        noise,
        [],
        schedule,
        sampler,
        count,  # type: ignore
    )
    torch.testing.assert_close(latent, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "pndm"])
def test_other_samplers_are_refused(sampler: Any) -> None:
    with pytest.raises(ConfigError, match="rflow or ddim"):
        sampling_steps(DdpmSchedule(type="ddpm"), sampler, 10)


def test_noise_is_that_of_inference() -> None:
    for seed, index in ((0, 0), (5, 2), (run_exported.LARGEST_SEED, 9)):
        ours, theirs = sampling.volume_generator(seed, index), run_exported.volume_generator(seed, index)
        assert ours.initial_seed() == theirs.initial_seed()
    assert run_exported.LARGEST_SEED == sampling.LARGEST_SEED


# As a user


def test_it_runs_without_the_project(exported: Path, sampler: Sampler, tmp_path: Path) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in ABSENT)
    (tmp_path / "run.py").write_text(
        f"import runpy, sys\n{blocked}del sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = (exported / "exported", "--num", 2, "--seed", 4, "--output", tmp_path / "made")
    done = program(tmp_path / "run.py", exported / "exported/run_exported.py", *arguments)
    assert done.returncode == 0, done.stderr
    for volume, values in zip([VolumeId(4, 0), VolumeId(4, 1)], sampler.sample(4, [0, 1], steps=3), strict=True):
        write_sample(tmp_path / "ours" / file_name(volume), sampler, volume, values, "rflow", 3)
        ours, theirs = (nib.load(tmp_path / folder / file_name(volume)) for folder in ("ours", "made"))
        assert np.abs(ours.get_fdata() - theirs.get_fdata()).max() <= LARGEST_DIFFERENCE
        assert np.array_equal(ours.affine, theirs.affine)
        assert ours.header["xyzt_units"] == theirs.header["xyzt_units"]
        sidecar = json.loads((tmp_path / "made" / file_name(volume, "json")).read_text())
        assert sidecar["weights_sha256"] == sampler.digests
        assert (sidecar["seed"], sidecar["index"], sidecar["steps"]) == (4, volume.number, 3)
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == [
        f"synimg_4_{i}.{end}" for i in (0, 1) for end in ("json", "nii.gz")
    ]


def test_what_is_known_of_the_weights_travels_with_them(exported: Path) -> None:
    card = json.loads((exported / "exported" / CARD).read_text())
    assert card["weights_sha256"] == {name: sha256(exported / "weights" / name) for name in (AUTOENCODER, UNET)}
    assert card["cards"]["diffusion_unet"]["schedule"]["type"] == "rflow"
    assert card["cards"]["diffusion_unet"]["scale_factor"] == 1.25
    assert card["cards"]["autoencoder"]["definition"]["channels"] == [8, 16]
    assert card["latent_shape"] == [3, 4, 4, 4]


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such weights"):
        export(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# As an enemy


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: damage(folder / DECODER), "damaged"),
        (lambda folder: (folder / DECODER).unlink(), "no such file"),
        (lambda folder: (folder / CARD).unlink(), "cannot be read"),
        (lambda folder: (folder / CARD).write_text("{"), "cannot be read"),
        (lambda folder: (folder / CARD).write_text("[]"), "cannot be read"),
        (lambda folder: (folder / CARD).write_text('{"format_version": 2}'), "format version 2"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(copy: Path, harm: Any, said: str) -> None:
    harm(copy)
    with pytest.raises(CannotRun, match=said):
        Exported(copy)


def test_files_that_this_torch_cannot_read_are_refused(copy: Path) -> None:
    (copy / DECODER).write_bytes(b"PK another format")
    card = json.loads((copy / CARD).read_text())
    card["files"][DECODER] = sha256(copy / DECODER)
    (copy / CARD).write_text(json.dumps(card))
    with pytest.raises(CannotRun, match="cannot read what torch"):
        Exported(copy)


@pytest.mark.parametrize("option", [("--num", "0"), ("--seed", "-1"), ("--seed", str(2**63)), ("--num", "two")])
def test_wrong_arguments(copy: Path, option: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run_exported.py", str(copy), *option])
    with pytest.raises(SystemExit) as ended:
        run_exported.main()
    assert ended.value.code == 2
    assert "is not a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"), [(0.9, "make another volume"), (1.1, "make another volume"), (1e300, "NaN or infinity")]
)
def test_an_export_that_makes_something_else_is_not_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, said: str
) -> None:
    steps = sampling_steps(RFlowSchedule(type="rflow"), "rflow", 2)
    monkeypatch.setattr(exporting, "sampling_steps", lambda *_: [s | {"add": s["add"] * wrong} for s in steps])
    monkeypatch.setattr(
        exporting, "_save", lambda _, __, path: Path(shutil.copyfile(exported / "exported" / path.name, path))
    )
    with pytest.raises(WeightsError, match=said):
        export(exported / "weights", tmp_path, steps=2)
    assert not (tmp_path / CARD).exists()


def test_volumes_that_are_not_numbers_are_refused(copy: Path) -> None:
    runner = Exported(copy)
    runner.card["steps"][0]["add"] = float("nan")
    with pytest.raises(CannotRun, match="NaN or infinity"):
        runner.sample(0, 0)
