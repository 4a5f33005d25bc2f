"""Nothing is lost: trainings that are killed, stopped, locked out, out of disk, or that meet NaN."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import NUM_TRAIN, ROOT, SECONDS, STEPS_PER_EPOCH, Desk, Result, tree
from test_scripts import (
    SECTION,
    STAGE_1,
    STAGE_2,
    STATE,
    WEIGHTS,
    both_stages,
    events,
    give_autoencoder,
    require_same_training,
    tensors,
)
from tiny import equal_states

Run = Callable[..., Result]
EVERY_STEP = ("--set", "checkpoint_every_minutes=0")

# What only validation calls, and what is called when weights are published.
IN_VALIDATION = {
    STAGE_1: "ldm3d.autoencoder_stage:AutoencoderStage.reconstruct",
    STAGE_2: "ldm3d.latents:LatentCache.mean",
}
PUBLISHING = {STAGE_1: "ldm3d.autoencoder_stage:save_weights", STAGE_2: "ldm3d.diffusion_stage:save_weights"}


def kills(script: str) -> dict[str, tuple[Any, ...]]:
    """Faults, one for each start of the same training; each is met a step or more after the one before."""
    return {
        "in a backward pass": ("signal_at_call", "SIGKILL", "ldm3d.training:Optimizer.backward", 2),
        "half a state written": ("kill_while_saving", 2),
        "a state written, not yet named": ("signal_at_call", "SIGKILL", "ldm3d.checkpoint:Checkpoints._make_room", 1),
        "the state before renamed, the new one not yet": (
            "signal_after_call",
            "SIGKILL",
            "ldm3d.checkpoint:Checkpoints._make_room",
            2,
        ),
        "in validation": ("signal_at_call", "SIGKILL", IN_VALIDATION[script], 1),
        "weights about to be published": ("signal_at_call", "SIGKILL", PUBLISHING[script], 1),
        "weights published, not yet saved": ("signal_after_call", "SIGKILL", PUBLISHING[script], 1),
        "between clipping and the update": ("signal_at_call", "SIGKILL", "ldm3d.training:Optimizer.update", 2),
    }


@both_stages
def test_killed_at_any_moment_and_resumed_is_the_same_as_undisturbed(
    script: str, trained: Desk, desk: Desk, run: Run
) -> None:
    give_autoencoder(desk, trained, script)
    for moment, fault in kills(script).items():
        assert run(script, "--resume", "auto", *EVERY_STEP, faults=[fault]).code == -9, moment
    done = run(script, "--resume", *EVERY_STEP)
    assert done.code == 0, done.stderr
    require_same_training(desk, trained, script)
    assert not list(desk.model.glob(".tmp-*"))
    stage = script.removeprefix("train_").removesuffix(".py")
    validations = events(desk.runs / stage).Scalars("validation/" + ("l1" if script == STAGE_1 else "loss"))
    assert [event.step for event in validations] == [STEPS_PER_EPOCH * epoch for epoch in range(1, 5)]


@both_stages
def test_killed_whenever_and_resumed_is_the_same_as_undisturbed(
    script: str, trained: Desk, desk: Desk, run: Run
) -> None:
    """By the clock: what is going on then is another thing on each machine."""
    give_autoencoder(desk, trained, script)
    for seconds in (0.6, 0.9, 0.75, 1.1):
        assert run(script, "--resume", "auto", *EVERY_STEP, faults=[("kill_after", seconds)]).code in (-9, 0)
    assert run(script, "--resume", "auto").code == 0
    require_same_training(desk, trained, script)


def test_killed_while_encoding_goes_on_there(trained: Desk, desk: Desk, run: Run, tmp_path: Path) -> None:
    """Each time one volume is encoded to know the shape of all."""
    give_autoencoder(desk, trained, STAGE_2)
    own_cache = ("--set", f"data.cache_dir={tmp_path / 'cache'}")
    moments = {
        "encoding volume 3 of 9": ("ldm3d.latents:_encode", 1 + 4),
        "volume 4 written, not yet noted": ("ldm3d.encoding:EncodedVolumes.add", 2),
        "all noted": ("ldm3d.latents:write_text", 1),
    }
    for moment, (target, number) in moments.items():
        faults = [("note_each_encoded_volume",), ("signal_at_call", "SIGKILL", target, number)]
        assert run(STAGE_2, *own_cache, faults=faults).code == -9, moment
    done = run(STAGE_2, *own_cache)
    assert done.code == 0, done.stderr
    assert "9 of 9 volumes have been encoded before" in done.stderr
    require_same_training(desk, trained, STAGE_2)


# ---------------------------------------------------------------- stopped


@both_stages
@pytest.mark.parametrize("moment", ["in a step", "in validation", "in the last validation"])
def test_sigterm_saves_and_says_143(moment: str, script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    calls = {"in validation": 1, "in the last validation": 4}
    fault: tuple[Any, ...] = ("signal_at_step", "SIGTERM", 5)
    if moment in calls:
        fault = ("signal_at_call", "SIGTERM", IN_VALIDATION[script], calls[moment])
    done = run(script, faults=[fault])
    assert (done.code, done.last_line) == (143, "interrupted; go on with --resume"), done.stderr
    state = torch.load(desk.model / STATE[script], weights_only=True)
    # Stopped in a validation, it has not counted the epoch whose validation is to be made again.
    assert (state["epoch"], state["step"]) == {
        "in a step": (1, 6),
        "in validation": (0, STEPS_PER_EPOCH),
        "in the last validation": (3, 4 * STEPS_PER_EPOCH),
    }[moment]
    assert run(script, "--resume").code == 0
    require_same_training(desk, trained, script)


@both_stages
def test_stopped_while_the_given_weights_are_judged(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    """Resumed, they are judged all the same: a training that makes them worse publishes nothing."""
    give_autoencoder(desk, trained, script)
    given = Path(shutil.copytree(trained.model, desk.folder / "given"))
    settings = ("--set", f"{SECTION[script]}.max_epochs=1", "--set", f"{SECTION[script]}.lr=0.5")
    fault = ("signal_at_call", "SIGTERM", IN_VALIDATION[script], 1)
    assert run(script, "--init-from", given, *settings, faults=[fault]).code == 143
    assert torch.load(desk.model / STATE[script], weights_only=True)["step"] == 0
    assert run(script, "--resume", *settings).code == 0
    for name in WEIGHTS[script]:
        assert equal_states(tensors(desk.model / name), tensors(given / name))


def test_a_second_signal_of_the_same_request_is_none(desk: Desk, run: Run) -> None:
    """A terminal signals the whole group, and torchrun hands its own on."""
    twice = [("signal_at_step", "SIGINT", 2), ("signal_at_call", "SIGTERM", "ldm3d.training:Optimizer.update", 3)]
    done = run(STAGE_1, faults=twice)
    assert (done.code, done.last_line) == (130, "interrupted; go on with --resume"), done.stderr
    assert torch.load(desk.model / STATE[STAGE_1], weights_only=True)["step"] == 3


# ---------------------------------------------------------------- states that are damaged


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit_of_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(1, 16):
        content[place * len(content) // 16] ^= 1
    path.write_bytes(content)


@both_stages
@pytest.mark.parametrize("damage", [cut, flip_a_bit_of_a_tensor, Path.unlink])
def test_where_the_newest_state_is_damaged_the_one_before_is_used(
    damage: Callable[[Path], Any], script: str, trained: Desk, desk: Desk, run: Run
) -> None:
    give_autoencoder(desk, trained, script)
    stop = ("signal_at_step", "SIGTERM", 2 * STEPS_PER_EPOCH)
    assert run(script, *EVERY_STEP, "--set", "keep_last=3", faults=[stop]).code == 143
    newest = desk.model / STATE[script]
    names = [newest.name, newest.stem + ".1.pt", newest.stem + ".2.pt"]
    assert sorted(path.name for path in desk.model.glob("*_last*")) == sorted(names)
    damage(newest)
    done = run(script, "--resume")
    assert done.code == 0, done.stderr
    (warning,) = re.findall("^warning: (.*)$", done.stderr, re.M)
    assert str(newest) in warning and warning.endswith("; the state before it is used")
    assert f"resuming from {desk.model / names[1]}: epoch 1, step {2 * STEPS_PER_EPOCH}" in done.stderr
    require_same_training(desk, trained, script)


def test_where_all_states_are_damaged_nothing_is_made_up(desk: Desk, run: Run) -> None:
    assert run(STAGE_1, *EVERY_STEP, faults=[("signal_at_step", "SIGTERM", 2)]).code == 143
    for path in desk.model.glob("*_last*"):
        cut(path)
    done = run(STAGE_1, "--resume")
    assert done.code == 2 and "autoencoder_last.1.pt: cannot be loaded" in done.last_line, done.stderr
    assert "Traceback" not in done.stderr


@both_stages
def test_a_full_disk_costs_the_steps_since_the_last_state(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    assert run(script, faults=[("signal_at_step", "SIGTERM", 5)]).code == 143
    done = run(script, "--resume", *EVERY_STEP, faults=[("full_disk_while_saving", 100_000)])
    assert done.code == 2 and "File too large" in done.last_line, done.stderr
    assert run(script, "--resume").code == 0
    require_same_training(desk, trained, script)


def test_states_of_a_larger_keep_last_are_removed(desk: Desk, run: Run) -> None:
    assert run(STAGE_1, *EVERY_STEP, "--set", "keep_last=4", faults=[("signal_at_step", "SIGTERM", 6)]).code == 143
    assert len(list(desk.model.glob("*_last*"))) == 4
    assert run(STAGE_1, "--resume", "--set", "keep_last=1").code == 0
    assert [path.name for path in desk.model.glob("*_last*")] == [STATE[STAGE_1]]


# ---------------------------------------------------------------- two at once


def test_two_trainings_do_not_write_to_one_folder(trained: Desk, desk: Desk, run: Run) -> None:
    """And a lock whose owner was killed is none."""
    long = ("--set", "autoencoder_train.max_epochs=100000")
    first = subprocess.Popen(
        [sys.executable, ROOT / STAGE_1, *desk.files, *long, *EVERY_STEP],
        env=desk.process_environment,
        cwd=desk.folder,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(desk.model / STATE[STAGE_1])
        owner = json.loads((desk.model / ".owner.json").read_text())
        done = run(STAGE_1, "--overwrite")
        assert owner["pid"] == first.pid
        assert done.code == 2 and f"another training (process {first.pid} on " in done.last_line, done.stderr
        assert "is writing here; wait for its end, or take another model_dir" in done.last_line
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    done = run(STAGE_1, "--resume", faults=[("signal_at_step", "SIGTERM", 5 + last_step(desk))])
    assert done.code == 0 or "resuming from" in done.stderr, done.stderr
    assert not (desk.model / ".owner.json").exists()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def last_step(desk: Desk) -> int:
    return int(torch.load(desk.model / STATE[STAGE_1], weights_only=True)["step"])


# ---------------------------------------------------------------- NaN


@both_stages
@pytest.mark.parametrize("where", ["batch", "weight"])
def test_a_step_that_is_not_finite_is_kept_and_replayed(
    where: str, script: str, trained: Desk, desk: Desk, run: Run
) -> None:
    give_autoencoder(desk, trained, script)
    done = run(script, faults=[("not_finite_at_step", 5, where)])
    assert done.code == 2, done.stderr
    assert "training stopped at step 5: not finite (" in done.last_line and " = nan" in done.last_line
    assert ("1 of " in done.last_line) == (where == "batch"), done.last_line
    (kept,) = desk.model.glob("*.replay.pt")
    assert f"--replay {kept}" in done.last_line
    before = tree(desk.folder)
    again = run(script, "--replay", kept)
    assert again.code == 0 and tree(desk.folder) == before, again.stderr
    assert "replaying step 5 on cases BRATS_" in again.stderr
    (first,) = re.findall("^forward pass: (.*)$", again.stderr, re.M)
    if where == "batch":
        assert "weights: all finite, the largest " in again.stderr and "of input that was not finite (" in first
    else:
        (bad,) = re.findall(r"^weights: not finite in (\S+)\.weight$", again.stderr, re.M)
        expected = rf"{bad} made the first output that is not finite, of finite input \(-?[\d.]+ to [\d.]+\)"
        assert re.fullmatch(expected, first), first


def test_a_good_step_replays_as_good(trained: Desk, desk: Desk, run: Run) -> None:
    """What is kept is the whole step: the same numbers come out, and a cure can be tried on it."""
    give_autoencoder(desk, trained, STAGE_2)
    assert run(STAGE_2, faults=[("not_finite_at_step", 5, "batch")]).code == 2
    (path,) = desk.model.glob("*.replay.pt")
    kept = torch.load(path, weights_only=True)
    kept["batch"]["latent"].nan_to_num_(0.0)
    torch.save(kept, path)
    done = run(STAGE_2, "--replay", path)
    assert done.code == 0 and "the step is finite here: loss = " in done.stderr, done.stderr


def test_another_networks_step_is_refused(trained: Desk, desk: Desk, run: Run) -> None:
    assert run(STAGE_1, faults=[("not_finite_at_step", 0, "batch")]).code == 2
    (path,) = desk.model.glob("*.replay.pt")
    done = run(STAGE_1, "--replay", path, "--set", "autoencoder_def.channels=[8, 16]")
    assert done.code == 2 and "is of another network than the configuration describes" in done.last_line, done.stderr


@both_stages
def test_a_validation_that_is_not_finite_publishes_nothing(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    """One step that is far too long: its own loss, of the weights before it, is fine."""
    give_autoencoder(desk, trained, script)
    before = tree(desk.model)
    section = script.removesuffix(".py").removeprefix("train_") + "_train"
    settings = {"lr": 1e25, "batch_size": NUM_TRAIN, "warm_up_steps": 0, "max_epochs": 1}
    done = run(script, *(word for key, value in settings.items() for word in ("--set", f"{section}.{key}={value}")))
    measure = {STAGE_1: "l1", STAGE_2: "loss"}[script]
    assert done.code == 2, done.stderr
    assert done.last_line.startswith(f"error: validation is not finite: {measure} on cases BRATS_"), done.stderr
    assert {name for name in tree(desk.model).keys() - before.keys() if name.endswith(".safetensors")} == set()


def test_a_step_that_only_float16_cannot_hold_replays_as_good_without_it(trained: Desk, desk: Desk, run: Run) -> None:
    """The scale is so large that no ten halvings make the scaled gradients small enough."""
    give_autoencoder(desk, trained, STAGE_2)
    float16 = [("float16_on_the_cpu", 2.0**60)]
    done = run(STAGE_2, "--set", "max_skipped_steps=3", faults=float16)
    assert done.code == 2 and "training stopped at step 3: not finite (loss = " in done.last_line, done.stderr
    notices = re.findall(r"^notice: .* left out, (\d) in a row of at most 3; loss scale now", done.stderr, re.M)
    assert notices == ["1", "2", "3"]
    (kept,) = desk.model.glob("*.replay.pt")
    again = run(STAGE_2, "--replay", kept, faults=float16)
    assert "forward pass: every output is finite" in again.stderr and "in the backward pass: " in again.stderr
    without = run(STAGE_2, "--replay", kept, "--set", "amp=false", faults=float16)
    assert without.code == 0 and "the step is finite here: loss = " in without.stderr, without.stderr
