"""ldm3d.tracking: TensorBoard's events by step and by volumes, what a resumed run hides, who writes."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm3d import distributed
from ldm3d.config import load_config
from ldm3d.errors import ConfigError, OutputError
from ldm3d.profiling import StepProfiler
from ldm3d.schema import Environment
from ldm3d.tracking import Tracker, open_tracker


def tracker(folder: Path, volumes_per_step: int = 6, mlflow: Any = None) -> Tracker:
    return Tracker(folder, volumes_per_step, StepProfiler(None, folder, tiny.CPU), mlflow)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), purge_orphaned_data=True).Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_events_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with tracker(tmp_path / "run") as run:
        assert not (tmp_path / "run").exists()  # nothing to say, nothing written
        run.scalars("train", {"loss": 0.5, "kl": 0.25}, 3)
        run.text("config", "{}")
        assert scalars(tmp_path / "run", "train/loss") == [(3, 0.5)]
        assert scalars(tmp_path / "run", "train/kl") == [(3, 0.25)]
        run.image("picture", np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4), 4)
    (image,) = events(tmp_path / "run").Images("picture")
    assert (image.step, image.height, image.width) == (4, 3, 4)


def test_scalars_stand_by_volumes_in_a_run_and_a_section_of_their_own(tmp_path: Path) -> None:
    with tracker(tmp_path, volumes_per_step=6) as run:
        run.scalars("train", {"loss": 0.5}, 3)
        run.scalars("validation", {"l1": 0.25}, 5)
    assert events(tmp_path).Tags()["scalars"] == ["train/loss", "validation/l1"]
    by_volumes = tmp_path / "by_volumes"
    assert events(by_volumes).Tags()["scalars"] == ["by_volumes/train_loss", "by_volumes/validation_l1"]
    assert scalars(by_volumes, "by_volumes/train_loss") == [(18, 0.5)]
    assert scalars(by_volumes, "by_volumes/validation_l1") == [(30, 0.25)]


@pytest.mark.parametrize(
    ("folder", "name", "unit"), [("", "train/loss", 1), ("by_volumes", "by_volumes/train_loss", 6)]
)
def test_a_resumed_run_hides_what_it_does_again(folder: str, name: str, unit: int, tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        for step in range(6):
            run.scalars("train", {"loss": float(step)}, step)
    with tracker(tmp_path) as run:
        run.resume_at(4)
        run.scalars("train", {"loss": 10.0}, 4)
    assert scalars(tmp_path / folder, name) == [(unit * step, value) for step, value in enumerate([0, 1, 2, 3, 10])]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with tracker(tmp_path / "run") as run:
        run.scalars("train", {"loss": 1.0}, 0)
        run.image("picture", np.zeros((1, 3, 4)), 0)
        run.text("config", "{}")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracker(tmp_path) as run:
        run.scalars("train", {"loss": 1.0}, 0)
        assert run._by_step._file is not None
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(run._by_step, "_file", full)
            with pytest.raises(OutputError, match="events cannot be written: No space left on device"):
                run.scalars("train", {"loss": 2.0}, 1)


def test_a_folder_for_events_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with tracker(tmp_path / "file" / "run") as run, pytest.raises(OutputError, match="events cannot be written"):
        run.scalars("train", {"loss": 1.0}, 0)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(model_dir=tmp_path, tfevent_path=tmp_path / "runs", output_dir=tmp_path, data_base_dir=tmp_path)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_stage_counts_the_volumes_of_its_own_batches(
    stage: str, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    cfg = tiny.config(autoencoder_train={"batch_size": 3}, diffusion_train={"batch_size": 5})
    with open_tracker(cfg, environment, stage, tiny.CPU) as run:
        run.scalars("train", {"loss": 0.5}, 2)
    batch_size = {"autoencoder": 3, "diffusion": 5}[stage]
    by_volumes = environment.tfevent_path / stage / "by_volumes"
    assert scalars(by_volumes, "by_volumes/train_loss") == [(2 * batch_size * 4, 0.5)]


def test_mlflow_that_is_not_installed_is_said(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    cfg = tiny.config(tracking={"mlflow_uri": "http://127.0.0.1:5000"})
    with pytest.raises(ConfigError, match="not installed: pip install mlflow"):
        open_tracker(cfg, environment, "diffusion", tiny.CPU).__enter__()


def test_a_password_in_the_address_is_refused() -> None:
    config = Path(__file__).parents[1] / "config" / "config_demo.json"
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load_config(config, ["tracking.mlflow_uri=http://me:secret@server:5000/path"])
    assert load_config(config, ["tracking.mlflow_uri=http://server:5000/@me"]).tracking.mlflow_uri


def test_mlflow_gets_what_tensorboard_gets(tmp_path: Path) -> None:
    told: list[Any] = []
    mlflow = SimpleNamespace(
        metrics=lambda series: told.append(series), image=lambda *given: told.append(given), close=told.append
    )
    picture = np.zeros((1, 3, 4), np.float32)
    with pytest.raises(KeyboardInterrupt), tracker(tmp_path, volumes_per_step=6, mlflow=mlflow) as run:
        run.scalars("train", {"loss": 0.5}, 3)
        run.image("picture", picture, 3)
        raise KeyboardInterrupt
    assert told == [
        *([({"train/loss": 0.5}, 3), ({"by_volumes/train_loss": 0.5}, 18)], ("picture", picture, 3), KeyboardInterrupt),
    ]


def test_a_dry_run_has_nothing_to_profile(environment: Environment) -> None:
    tracking = open_tracker(tiny.config(), environment, "diffusion", tiny.CPU, dry_run=True, profile=3)
    with pytest.raises(ConfigError, match="--profile excludes --dry-run"), tracking:
        pass
