"""What users run: each script by its command line, from data to metrics; stopped, killed, resumed, on two processes."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scripts import CONFIG, NUM_CASES, NUM_TRAIN, STEPS_PER_EPOCH, Desk, Result, tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import equal_states

from ldm3d.cases import find_cases
from ldm3d.config import load_config
from ldm3d.files import sha256
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.nifti import read_volume, spacing_of
from ldm3d.reference_profile import read_profile
from ldm3d.splits import split_cases

STAGE_1, STAGE_2, STAGE_3 = "train_autoencoder.py", "train_diffusion.py", "inference.py"
SECTION = {STAGE_1: "autoencoder_train", STAGE_2: "diffusion_train"}
STATE = {STAGE_1: "autoencoder_last.pt", STAGE_2: "diffusion_last.pt"}
WEIGHTS = {STAGE_1: ("autoencoder.safetensors", "discriminator.safetensors"), STAGE_2: ("diffusion_unet.safetensors",)}
PROFILE = "reference_profile.json"
EPOCHS = CONFIG["autoencoder_train"]["max_epochs"]
Run = Callable[..., Result]

both_stages = pytest.mark.parametrize("script", [STAGE_1, STAGE_2])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def card(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["ldm3d"])


def events(folder: Path) -> EventAccumulator:
    """The run's events as TensorBoard reads them."""
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def require_same_training(desk: Desk, trained: Desk, script: str) -> None:
    """Published weights, with what stands beside them, and the whole training state agree bit for bit."""
    for name in WEIGHTS[script]:
        assert equal_states(tensors(desk.model / name), tensors(trained.model / name)), name
        assert card(desk.model / name) == card(trained.model / name), name
    if script == STAGE_2:  # then stage 2 has added the latents
        assert (desk.model / PROFILE).read_bytes() == (trained.model / PROFILE).read_bytes()
    one, other = (torch.load(d.model / STATE[script], weights_only=True) for d in (desk, trained))
    assert equal_states(one, other)


def require_same_volumes(folder: Path, other: Path, names: Iterable[str]) -> None:
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def volumes(seed: int, count: int) -> list[str]:
    return [f"synimg_{seed}_{index}.nii.gz" for index in range(count)]


def give_autoencoder(desk: Desk, trained: Desk, script: str) -> None:
    """Stage 2 needs stage 1's weights, and the split that it has stored."""
    if script == STAGE_2:
        desk.model.mkdir()
        for name in ("autoencoder.safetensors", "split.json"):
            shutil.copy(trained.model / name, desk.model)


# ---------------------------------------------------------------- fresh runs, by hand


def test_every_script_says_what_it_did(said: dict[str, Result], trained: Desk) -> None:
    stderr = {script: result.stderr for script, result in said.items()}
    for result in said.values():
        assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert f"{NUM_CASES} volumes prepared" in stderr[STAGE_1]
    assert f"{NUM_TRAIN} to train on, 1 to validate with" in stderr[STAGE_1]
    assert f"latents of {NUM_TRAIN} volumes are in" in stderr[STAGE_2] and "scale factor" in stderr[STAGE_2]
    for script in SECTION:
        assert re.findall(r"^epoch (\d)/4: loss .* validation .* left$", stderr[script], re.M) == list("1234")
    assert str(trained.results / "montage.png") in said[STAGE_3].stdout


def test_everything_is_written_where_the_environment_says(trained: Desk) -> None:
    """Scripts run with a current folder, a home and a temporary folder of their own, in which they leave nothing."""
    assert {path.name for path in trained.folder.iterdir()} == {
        *("config.json", "environment.json", "said.json", "home"),
        *("model", "runs", "results", "data"),
    }
    assert tree(trained.home, trained.temporary) == {}
    assert {path.name for path in trained.model.iterdir()} == {
        *("autoencoder.safetensors", "discriminator.safetensors", "diffusion_unet.safetensors"),
        *("autoencoder_last.pt", "diffusion_last.pt", "split.json", PROFILE, ".lock"),
    }
    assert {path.name for path in trained.data.iterdir()} == {"Task01_BrainTumour", "cache"}


def test_weights_describe_themselves(trained: Desk) -> None:
    autoencoder, unet = (
        card(trained.model / name) for name in ("autoencoder.safetensors", "diffusion_unet.safetensors")
    )
    for described in (autoencoder, unet):
        assert (described["spacing"], described["channel"], described["num_train"]) == ([6, 6, 6], 0, NUM_TRAIN)
        assert described["format_version"] == 1 and re.fullmatch("[0-9a-f]{16}", described["trained_on"])
        assert described["step"] <= EPOCHS * STEPS_PER_EPOCH and described["validation"]
    assert autoencoder["definition"]["channels"] == [8, 8] and autoencoder["definition"]["patchify"] == 2
    assert unet["schedule"]["type"] == "rflow" and unet["latent_shape"] == [4, 6, 8, 6]
    assert unet["autoencoder_sha256"] == sha256(trained.model / "autoencoder.safetensors")


def test_the_profile_is_of_these_data_and_these_weights(trained: Desk) -> None:
    profile = read_profile(trained.model)
    described = card(trained.model / "autoencoder.safetensors")
    assert (profile.trained_on, profile.num_train) == (described["trained_on"], NUM_TRAIN)
    assert (list(profile.spacing), list(profile.size)) == ([6, 6, 6], CONFIG["diffusion_train"]["patch_size"])
    assert len(profile.features["noise"]) == NUM_TRAIN and "BRATS" not in (trained.model / PROFILE).read_text()
    assert profile.latents and profile.latents.autoencoder_sha256 == sha256(trained.model / "autoencoder.safetensors")
    assert [len(row) for row in profile.latents.rows] == [2 * CONFIG["latent_channels"]] * NUM_TRAIN


def test_tensorboard_shows_what_is_promised(trained: Desk) -> None:
    one, two = events(trained.runs / "autoencoder"), events(trained.runs / "diffusion")
    terms = ("reconstruction", "kl", "adversarial")
    performance = {f"performance/{name}" for name in ("volumes_per_second", "data_wait_share", "peak_gib")}
    assert set(one.Tags()["scalars"]) == {
        *(f"{group}/{term}" for group in ("train", "share") for term in terms),
        *("train/loss", "train/discriminator", "train/gradient_norm", "train/learning_rate"),
        *("validation/l1", "validation/psnr_db", "validation/ssim"),
        *performance,
    }
    assert set(two.Tags()["scalars"]) == {
        *("train/loss", "train/gradient_norm", "train/learning_rate", "validation/loss"),
        *(f"validation/level_{level}" for level in range(1, 9)),
        *performance,
    }
    every_epoch = [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
    for found in (one, two):
        assert [event.step for event in found.Scalars("train/loss")] == every_epoch
        assert [event.value for event in found.Scalars("train/learning_rate")] == pytest.approx([1e-3] * EPOCHS)
        assert '"max_epochs": 4' in str(found.Tensors("config/text_summary")[0].tensor_proto.string_val)
    for stage, found in (("autoencoder", one), ("diffusion", two)):
        by_volumes = events(trained.runs / stage / "by_volumes")
        names = {f"by_volumes/{name.replace('/', '_')}" for name in found.Tags()["scalars"]}
        assert set(by_volumes.Tags()["scalars"]) == names
        seen = [event.step for event in by_volumes.Scalars("by_volumes/train_loss")]
        assert seen == [CONFIG[f"{stage}_train"]["batch_size"] * step for step in every_epoch]
    shares = [sum(one.Scalars(f"share/{term}")[-1].value for term in terms)]
    assert shares == pytest.approx([1])
    assert [event.step for event in one.Images("validation/reconstruction")] == every_epoch
    assert [event.step for event in two.Images("generated")] == every_epoch[1::2]
    picture = two.Images("generated")[0]
    assert picture.width > 100 and picture.height > 100


def test_volumes_lie_where_a_viewer_expects_them(trained: Desk) -> None:
    for name in volumes(5, 3):
        volume, affine = read_volume(trained.results / name)
        assert volume.shape == (24, 32, 24) and volume.min() >= 0 and volume.max() <= 1
        assert spacing_of(affine) == (6, 6, 6)
        assert np.linalg.det(affine[:3, :3]) > 0 and (np.diag(affine)[:3] > 0).all()
        assert affine @ [11.5, 15.5, 11.5, 1] == pytest.approx([0, 0, 0, 1])
    assert np.asarray(Image.open(trained.results / "montage.png")).std() > 10


def test_sidecar_says_how_a_volume_was_made(trained: Desk) -> None:
    for index, name in enumerate(volumes(5, 3)):
        found = json.loads((trained.results / name.replace(".nii.gz", ".json")).read_text())
        assert (found["seed"], found["index"], found["scheduler"], found["steps"]) == (5, index, "rflow", 4)
        assert found["spacing_mm"] == [6, 6, 6] and found["intensity_range"] == [0, 1]
        assert found["weights_sha256"] == {
            name: sha256(trained.model / name) for name in ("autoencoder.safetensors", "diffusion_unet.safetensors")
        }
        assert found["scale_factor"] == card(trained.model / "diffusion_unet.safetensors")["scale_factor"]
        assert (found["device"], found["threads"]) == ("cpu", 1)
        assert {"precision", "code_version", "torch_version", "time"} <= found.keys()


def test_evaluate_and_visualize(trained: Desk, desk: Desk, model: Path) -> None:
    """The last two commands of the README's sequence."""
    output = desk.results / "metrics.json"
    done = desk.run_cold("evaluate.py", *desk.files, "--synthetic", trained.results, "--output", output)
    assert done.code == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"psnr_db", "sharpness", "copies"} <= found["metrics"].keys()
    assert found["volumes"]["synthetic"] == [name.removesuffix(".nii.gz") for name in volumes(5, 3)]
    picture = desk.folder / "look.png"
    done = desk.run_cold("visualize_image.py", trained.results / volumes(5, 1)[0], "--output", picture)
    assert done.code == 0, done.stderr
    for path in (output.with_suffix(".png"), picture):
        assert np.asarray(Image.open(path)).std() > 10


# ---------------------------------------------------------------- again, and otherwise


@both_stages
def test_second_run_uses_the_caches_and_gives_the_same(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    cache = tree(trained.data)
    done = run(script)
    assert done.code == 0, done.stderr
    assert "prepared" not in done.stderr and "latents of" not in done.stderr
    assert tree(trained.data) == cache
    require_same_training(desk, trained, script)


@both_stages
def test_dry_run_writes_no_weights_and_decides_no_split(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    before = tree(desk.model)
    done = run(script, "--dry-run")
    assert done.code == 0 and "dry run: one step" in done.stderr, done.stderr
    assert tree(desk.model).keys() == before.keys()


@both_stages
def test_set_and_seed_replace_the_configurations(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    done = run(script, "--set", f"{SECTION[script]}.max_epochs=1", "--seed", "7")
    assert done.code == 0 and "epoch 1/1" in done.stderr, done.stderr
    state = torch.load(desk.model / STATE[script], weights_only=True)
    assert (state["epoch"], state["step"], state["fingerprint"]["seed"]) == (1, STEPS_PER_EPOCH, 7)
    name = WEIGHTS[script][0]
    assert not equal_states(tensors(desk.model / name), tensors(trained.model / name))


@both_stages
def test_init_from_begins_with_the_given_weights(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    """With steps too small to change a number, what comes out is what went in, the normalisation of latents too."""
    give_autoencoder(desk, trained, script)
    given = Path(shutil.copytree(trained.model, desk.folder / "given"))
    unet = given / WEIGHTS[STAGE_2][0]
    description = json.dumps(card(unet) | {"scale_factor": 0.5})
    save_file(tensors(unet), unet, metadata={"format": "pt", "ldm3d": description})
    tiny_steps = [f"--set={SECTION[script]}.{setting}" for setting in ("max_epochs=1", "lr=1e-30")]
    done = run(script, "--init-from", given, *tiny_steps)
    assert done.code == 0 and f"from the weights in {given}" in done.stderr, done.stderr
    for name in WEIGHTS[script]:
        assert equal_states(tensors(desk.model / name), tensors(given / name))
    if script == STAGE_2:
        assert card(desk.model / unet.name)["scale_factor"] == 0.5


# ---------------------------------------------------------------- stopped, killed, resumed


def resume(run: Run, script: str) -> Result:
    done = run(script, "--resume")
    assert done.code == 0, done.stderr
    return done


@both_stages
def test_resumed_is_the_same_as_undisturbed(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    assert run(script, "--set", f"{SECTION[script]}.max_epochs=2").code == 0
    desk.write_environment(resume_ckpt=True)  # the same as --resume
    done = run(script)
    assert f"epoch 2, step {2 * STEPS_PER_EPOCH}" in done.stderr, done.stderr
    assert re.findall(r"^epoch (\d)/4", done.stderr, re.M) == ["3", "4"]
    require_same_training(desk, trained, script)


@both_stages
def test_best_weights_stay_published_when_resumed_training_is_worse(
    script: str, trained: Desk, desk: Desk, run: Run
) -> None:
    give_autoencoder(desk, trained, script)
    assert run(script, "--set", f"{SECTION[script]}.max_epochs=2", faults=[("validation_says", 0.1, 0.3)]).code == 0
    assert run(script, "--resume", faults=[("validation_says", 0.2, 0.4)]).code == 0
    assert card(desk.model / WEIGHTS[script][0])["step"] == STEPS_PER_EPOCH


STOPS = {
    "in the middle of an epoch": 2 * STEPS_PER_EPOCH + 1,
    "in the first step": 0,
    "in the last step of an epoch": 2 * STEPS_PER_EPOCH - 1,
    "in the last step of all": EPOCHS * STEPS_PER_EPOCH - 1,
}


@both_stages
@pytest.mark.parametrize("stop", STOPS)
def test_interrupted_and_resumed_is_the_same_as_undisturbed(
    stop: str, script: str, trained: Desk, desk: Desk, run: Run
) -> None:
    """Ctrl-C reaches the processes that load data, too, of which the undisturbed run had none."""
    give_autoencoder(desk, trained, script)
    done = run(script, "--set", "data.num_workers=1", faults=[("signal_at_step", "SIGINT", STOPS[stop])])
    assert (done.code, done.last_line) == (130, "interrupted; go on with --resume"), done.stderr
    assert "Traceback" not in done.stderr
    done = resume(run, script)
    assert f"epoch {STOPS[stop] // STEPS_PER_EPOCH}, step {STOPS[stop] + 1}" in done.stderr
    require_same_training(desk, trained, script)


def test_interrupted_before_training_stops_at_once(desk: Desk, run: Run) -> None:
    done = run(STAGE_1, faults=[("interrupt_while_preparing",)])
    assert done.code == 130 and "Traceback" not in done.stderr, done.stderr
    assert "epoch" not in done.stderr


def test_interrupted_sampling_leaves_whole_files(desk: Desk, model: Path, trained: Desk, run: Run) -> None:
    done = run(STAGE_3, "--num", 3, "--seed", 5, faults=[("interrupt_while_writing", 2)])
    assert (done.code, done.last_line) == (130, "interrupted"), done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in desk.results.iterdir()} == {"synimg_5_0.nii.gz", "synimg_5_0.json"}
    require_same_volumes(desk.results, trained.results, volumes(5, 1))


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batch_size_never_changes_a_volume(batch_size: int, trained: Desk, desk: Desk, model: Path, run: Run) -> None:
    done = run(STAGE_3, "--num", 3, "--seed", 5, "--batch-size", batch_size)
    assert done.code == 0, done.stderr
    require_same_volumes(desk.results, trained.results, volumes(5, 3))


def test_int16_reads_back_as_the_same_volume(trained: Desk, desk: Desk, model: Path, run: Run) -> None:
    other = desk.folder / "elsewhere" / "int16"
    done = run(STAGE_3, "--seed", 5, "--dtype", "int16", "--output", other)
    assert done.code == 0 and not desk.results.exists(), done.stderr
    (name,) = volumes(5, 1)
    (stored, affine), (exact, other_affine) = read_volume(other / name), read_volume(trained.results / name)
    assert np.abs(stored - exact).max() <= 0.5001 / 32767 and (affine == other_affine).all()
    assert (other / name).stat().st_size < (trained.results / name).stat().st_size


def test_seeds_and_steps_change_volumes(trained: Desk, desk: Desk, model: Path, run: Run) -> None:
    assert run(STAGE_3, "--seed", 6).code == 0
    assert run(STAGE_3, "--seed", 5, "--steps", 3).code == 0
    original = read_volume(trained.results / volumes(5, 1)[0])[0]
    for seed in (5, 6):
        assert np.abs(read_volume(desk.results / volumes(seed, 1)[0])[0] - original).mean() > 1e-3


# ---------------------------------------------------------------- the tutorial's weights


@pytest.fixture
def tutorial(desk: Desk) -> Desk:
    """`autoencoder.pt` and `diffusion_unet.pt`, which know nothing of themselves."""
    desk.write_config(
        autoencoder_def={"patchify": 1}, diffusion_train={"patch_size": [24, 32, 24]}, NoiseScheduler={"type": "ddpm"}
    )
    cfg = load_config(desk.config)
    desk.model.mkdir()
    torch.manual_seed(0)
    torch.save(build_autoencoder(cfg.autoencoder_def).state_dict(), desk.model / "autoencoder.pt")
    torch.save(build_unet(cfg.diffusion_def).state_dict(), desk.model / "diffusion_unet.pt")
    return desk


def test_tutorial_weights_with_a_given_and_a_measured_scale_factor(tutorial: Desk, run: Run) -> None:
    measured = run(STAGE_3, "--steps", 2)
    assert measured.code == 0, measured.stderr
    (said,) = re.findall(rf"scale factor (.*), measured on {NUM_TRAIN} volumes", measured.stderr)
    sidecar = json.loads((tutorial.results / "synimg_0_0.json").read_text())
    assert sidecar["scheduler"] == "ddim" and f"{sidecar['scale_factor']:.4g}" == said
    assert sidecar["scale_factor"] == pytest.approx(expected_scale_factor(tutorial), rel=1e-3)

    exact = repr(sidecar["scale_factor"])
    given = run(STAGE_3, "--steps", 2, "--scale-factor", exact, "--output", "given")
    assert given.code == 0 and "as given" in given.stderr and "measured" not in given.stderr, given.stderr
    require_same_volumes(tutorial.results, tutorial.folder / "given", volumes(0, 1))


def expected_scale_factor(desk: Desk) -> float:
    """1 / standard deviation of latents drawn from the training volumes' posteriors, with NumPy."""
    cfg = load_config(desk.config)
    network = build_autoencoder(cfg.autoencoder_def)
    network.load_state_dict(torch.load(desk.model / "autoencoder.pt", weights_only=True))
    cases = find_cases(desk.data, cfg.data, cfg.channel)
    random, drawn = np.random.default_rng(0), []
    for case in split_cases(cases, cfg.data.val_fraction, cfg.data.split_seed).train:
        volume = read_volume(case.image, 0)[0]
        scaled = np.clip(volume / np.percentile(volume, 99.5), 0, 1).astype(np.float32)
        with torch.no_grad():
            mean, sigma = network.eval().encode(torch.from_numpy(scaled)[None, None])
        drawn.append(random.normal(mean.numpy(), sigma.numpy()))
    return float(1 / np.std(drawn))


@pytest.mark.parametrize(("scheduler", "steps"), [("ddpm", 20), ("pndm", 10)])
def test_other_schedulers_of_ddpm_training(scheduler: str, steps: int, tutorial: Desk, run: Run) -> None:
    short = ("--set", "NoiseScheduler.num_train_timesteps=20", "--steps", steps)
    done = run(STAGE_3, "--scheduler", scheduler, "--scale-factor", 1, *short)
    assert done.code == 0, done.stderr
    sidecar = json.loads((tutorial.results / "synimg_0_0.json").read_text())
    assert (sidecar["scheduler"], sidecar["steps"]) == (scheduler, steps)


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def pair(trained: Desk, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Both stages trained on two processes; 3 volumes of `trained`'s weights sampled on two."""
    return Desk(tmp_path_factory.mktemp("pair") / "desk", trained.data).furnish()


def test_training_on_two_processes(pair: Desk) -> None:
    for script in SECTION:
        done = pair.run_parallel(script, *pair.files, "--set", f"{SECTION[script]}.max_epochs=2")
        assert done.code == 0, done.stderr
        assert "2 process(es)" in done.stderr
        # Each thing is said once, by one of the two.
        assert re.findall(r"^epoch (\d)/2", done.stderr, re.M) == ["1", "2"]
        state = torch.load(pair.model / STATE[script], weights_only=True)
        assert (state["epoch"], state["step"]) == (2, 2 * (NUM_TRAIN // 4))
        assert state["fingerprint"]["processes"] == 2
    assert card(pair.model / "diffusion_unet.safetensors")["autoencoder_sha256"]


def test_an_error_on_two_processes_is_said_once(pair: Desk) -> None:
    done = pair.run_parallel(STAGE_2, *pair.files, "--overwrite", "--set", "data.layout=brats")
    assert done.code != 0
    assert len(re.findall(r"^error: ", done.stderr, re.M)) == 1
    assert "no cases found" in done.stderr


def test_volumes_of_two_processes_are_those_of_one(desk: Desk, model: Path, trained: Desk) -> None:
    done = desk.run_parallel(STAGE_3, *desk.files, "-n", 3, "--seed", 5)
    assert done.code == 0, done.stderr
    require_same_volumes(desk.results, trained.results, volumes(5, 3))
    assert (desk.results / "montage.png").read_bytes() == (trained.results / "montage.png").read_bytes()
