"""ldm3d.checkpoint: a training that was saved and loaded goes on as if nothing had happened, bit for bit."""

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_weights import no_file_larger_than

from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.checkpoint import Checkpoints, read_state
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.errors import CheckpointError, OutputError
from ldm3d.latents import LatentStatistics
from ldm3d.progress import Position
from ldm3d.schema import Config

TOTAL = 8
RISING_AND_FALLING = {"lr_schedule": "cosine", "warm_up_steps": 2, "weight_decay": 0.01, "max_grad_norm": 0.5}
FINGERPRINT = {"seed": 0, "autoencoder_def": {"channels": (8, 16)}}


def config(**changes: Any) -> Config:
    return tiny.config(autoencoder_train=RISING_AND_FALLING, diffusion_train=RISING_AND_FALLING, **changes)


def checkpoints(path: Path, keep_last: int = 1) -> Checkpoints:
    return Checkpoints(path, keep_last, every_minutes=10)


def autoencoder_stage(cfg: Config) -> AutoencoderStage:
    return AutoencoderStage(cfg, tiny.CPU, TOTAL)


def diffusion_stage(cfg: Config, scale: float = 1.5) -> DiffusionStage:
    return DiffusionStage(cfg, tiny.CPU, TOTAL, LatentStatistics(torch.zeros(1, 1, 1, 1), scale))


def step_one(stage: AutoencoderStage, step: int) -> dict[str, Any]:
    return stage.train_step(tiny.batch(seed=step), tiny.random(step), adversarial=step >= 2)


def step_two(stage: DiffusionStage, step: int) -> dict[str, Any]:
    random = tiny.random(step)
    return stage.train_step({"latent": random.normal(stage.cfg.latent_shape), "case": ["a", "b"]}, random)


def run(stage: Any, step: Callable[..., Any], first: int, last: int) -> list[dict[str, Any]]:
    """Train as the scripts do; what each step returned."""
    said = []
    for number in range(first, last):
        said.append(step(stage, number))
    return said


STAGES = {
    "autoencoder": (autoencoder_stage, step_one, config()),
    "patchified": (autoencoder_stage, step_one, config(autoencoder_def={"patchify": 2})),
    "rectified flow": (diffusion_stage, step_two, config(NoiseScheduler={"type": "rflow"})),
    "ddpm": (diffusion_stage, step_two, config()),
    "recomputed": (diffusion_stage, step_two, config(use_checkpointing=True)),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("saved_after", [1, 4])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, name: str, saved_after: int) -> None:
    build, step, cfg = STAGES[name]
    undisturbed = build(cfg)
    expected = run(undisturbed, step, 0, 6)

    interrupted = build(cfg)
    said = run(interrupted, step, 0, saved_after)
    position = Position(epoch=1, step=saved_after, best=0.25)
    checkpoints(tmp_path / "last.pt").save(position.state(interrupted.state_dict(), FINGERPRINT))
    run(interrupted, step, saved_after, 6)  # what it does afterwards does not reach the file
    torch.manual_seed(999)  # nor does the random state of another process

    state = checkpoints(tmp_path / "last.pt").load(FINGERPRINT)
    assert (state["epoch"], state["step"], state["best"]) == (1, saved_after, 0.25)
    resumed = build(cfg)
    assert not tiny.equal_states(resumed.state_dict(), state["stage"])
    resumed.load_state_dict(state["stage"])
    said += run(resumed, step, saved_after, 6)
    assert tiny.equal_states(said, expected)
    assert tiny.equal_states(resumed.state_dict(), undisturbed.state_dict())


def test_normalisation_is_resumed_too(tmp_path: Path) -> None:
    """The scale factor is that of the interrupted run, not one that was measured anew."""
    stage = diffusion_stage(tiny.config(), scale=1.5)
    stage.statistics = LatentStatistics(torch.randn(stage.cfg.latent_shape), 1.5)
    checkpoints(tmp_path / "last.pt").save(Position().state(stage.state_dict(), FINGERPRINT))
    resumed = diffusion_stage(tiny.config(), scale=9.0)
    resumed.load_state_dict(checkpoints(tmp_path / "last.pt").load(FINGERPRINT)["stage"])
    assert resumed.statistics.scale_factor == 1.5
    assert torch.equal(resumed.statistics.mean, stage.statistics.mean)


def saved(path: Path, **changes: Any) -> Path:
    state = Position(2, 7, 0.5).state({"weights": torch.ones(2000)}, {**FINGERPRINT, **changes})
    checkpoints(path).save(state)
    return path


def test_another_training_is_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt", seed=1)
    with pytest.raises(CheckpointError) as refused:
        checkpoints(path).load(FINGERPRINT)
    assert str(refused.value) == f"{path}: belongs to another training: seed was 1, is 0"
    with pytest.raises(CheckpointError, match=r"autoencoder_def.channels was \(8, 16\), is \(8, 32\)"):
        checkpoints(saved(path)).load({**FINGERPRINT, "autoencoder_def": {"channels": (8, 32)}})
    with pytest.raises(CheckpointError, match="processes was None, is 2"):
        checkpoints(path).load({**FINGERPRINT, "processes": 2})


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint to resume from; start without --resume"):
        checkpoints(tmp_path / "last.pt").load(FINGERPRINT)


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_state(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path / "last.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"last\.pt: cannot be loaded: "):
        checkpoints(path).load(FINGERPRINT)


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], torch.ones(2)])
def test_another_file_by_that_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="is not a training state"):
        checkpoints(tmp_path / "last.pt").load(FINGERPRINT)


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    from test_tutorial import Malicious

    torch.save({"fingerprint": Malicious(f"touch '{tmp_path / 'was here'}'")}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="could run code when loaded"):
        checkpoints(tmp_path / "last.pt").load(FINGERPRINT)
    assert not (tmp_path / "was here").exists()


def test_resuming_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "last.pt")
    checkpoints(path).load(FINGERPRINT)
    assert capsys.readouterr().err == f"resuming from {path}: epoch 2, step 7\n"


def test_previous_state_survives_a_disk_that_fills(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt")
    before = path.read_bytes()
    with (
        no_file_larger_than(len(before) // 2),
        pytest.raises(OutputError, match=r"last\.pt: cannot be written: .*File too large"),
    ):
        saved(path, seed=5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    checkpoints(path).load(FINGERPRINT)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_previous_state_survives_half_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise failure

    path = saved(tmp_path / "last.pt")
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
        saved(path, seed=5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    stage = diffusion_stage(tiny.config())
    run(stage, step_two, 0, 1)
    before = copy.deepcopy(stage.state_dict())
    checkpoints(tmp_path / "last.pt").save(Position().state(stage.state_dict(), FINGERPRINT))
    assert tiny.equal_states(before, stage.state_dict())


def numbered(folder: Path) -> dict[str, int]:
    """The step of each state in a folder."""
    return {path.name: read_state(path)["step"] for path in sorted(folder.iterdir())}


def save_steps(states: Checkpoints, steps: range) -> None:
    for step in steps:
        states.save(Position(step=step).state({"weights": torch.ones(2000)}, FINGERPRINT))


def test_the_newest_states_are_kept_in_order(tmp_path: Path) -> None:
    states = checkpoints(tmp_path / "last.pt", keep_last=3)
    assert not states.exist()
    save_steps(states, range(2))
    assert numbered(tmp_path) == {"last.pt": 1, "last.1.pt": 0}
    save_steps(states, range(2, 14))
    assert numbered(tmp_path) == {"last.pt": 13, "last.1.pt": 12, "last.2.pt": 11}
    assert states.exist()
    save_steps(checkpoints(tmp_path / "last.pt", keep_last=2), range(14, 15))
    assert numbered(tmp_path) == {"last.pt": 14, "last.1.pt": 13}
    states.clear()
    assert list(tmp_path.iterdir()) == [] and not states.exist()


def test_states_are_numbered_as_numbers_not_as_text(tmp_path: Path) -> None:
    states = checkpoints(tmp_path / "last.pt", keep_last=12)
    save_steps(states, range(12))
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.1.pt").unlink()
    assert states.load(FINGERPRINT)["step"] == 9


def test_saving_is_due_after_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = checkpoints(tmp_path / "last.pt")
    begun = states.saved_at
    for seconds, due in ((0, False), (599, False), (600, True)):
        monkeypatch.setattr("time.monotonic", lambda s=seconds: begun + s)
        assert states.due() == due
    save_steps(states, range(1))
    assert not states.due()
    assert Checkpoints(tmp_path / "last.pt", 1, every_minutes=0).due()
