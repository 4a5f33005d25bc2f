"""ldm3d.memory: what is predicted is what is measured, what is advised fits, and nothing of it can stop a training."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from ldm3d import autoencoder_stage, losses, memory, memory_advice
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.config import load_config
from ldm3d.live_bytes import LiveBytes, autocast_as_on_cuda, stand_ins
from ldm3d.memory_advice import GIB, crude_bound, largest_batch, largest_patch, largest_peak, needed, warn_if_too_large
from ldm3d.memory_phases import TRACED, TracedAutoencoder, TracedDiffusion
from ldm3d.perceptual_shape import PerceptualShape
from ldm3d.schema import Config

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"autoencoder": TracedAutoencoder, "diffusion": TracedDiffusion}
MODES = [(precision, mode) for precision in (False, True) for mode in (False, "norms", "blocks")]


def small(**changes: Any) -> Config:
    """Large enough that activations, not weights, make the peak."""
    return tiny.config(**{"diffusion_train": {"patch_size": [32, 32, 32]}, **changes})


def test_live_storages_are_counted_once_and_until_they_are_gone() -> None:
    with LiveBytes() as counter:
        a = torch.ones(1024)
        view = a.view(32, 32)[3:]
        b = a + 1
        del a
        assert counter.now == 2 * 4096
        del view
        c = b * 2 + 3
        assert (counter.now, counter.peak) == (2 * 4096, 3 * 4096)
        counter.start_over()
        del b, c
        assert (counter.now, counter.peak) == (0, 2 * 4096)


@pytest.mark.parametrize("stage", STAGES)
def test_stand_ins_need_what_real_tensors_need(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN, which a CPU validates with, has layouts of its own.
    monkeypatch.setattr(autoencoder_stage, "batch_invariant", lambda device: nullcontext())
    cfg = tiny.config()
    with TRACED[stage](cfg, True) as traced:
        predicted = peaks(traced)
    with autocast_as_on_cuda(), LiveBytes() as counter:
        measured = peaks(STAGES[stage](cfg, counter, True))
    assert measured == pytest.approx(predicted, rel=0.01)
    assert len(set(measured)) > 4  # the modes differ


def peaks(traced: Any) -> list[int]:
    found = []
    for autocast, checkpointing in MODES:
        traced.set_up(autocast, checkpointing)
        found.append(traced.train_step())
    return [*found, traced.activations(), traced.validate()]


def test_the_perceptual_network_needs_what_a_real_one_needs() -> None:
    loss, x = PerceptualShape("squeeze"), torch.rand(1, 1, 32, 32, 32)
    with LiveBytes() as real:
        loss(x.clone().requires_grad_(), x).backward()
    with stand_ins() as counter:
        x = torch.rand(1, 1, 32, 32, 32)
        loss = PerceptualShape("squeeze")
        counter.now = counter.peak = 0
        loss(x.clone().requires_grad_(), x).backward()
    assert counter.peak == pytest.approx(real.peak, rel=0.01)


def test_recomputing_lowers_the_configured_peak() -> None:
    by_setting = {}
    for setting in (False, "norms", "blocks", True):
        cfg = tiny.config(use_checkpointing=setting, autoencoder_train={"patch_size": [32, 32, 32]})
        with TRACED["autoencoder"](cfg, True) as traced:
            by_setting[setting] = traced.train_step()
    assert by_setting[True] == by_setting["blocks"] < by_setting[False]
    assert by_setting["norms"] < by_setting[False]


@pytest.mark.parametrize("setting", ["norms", "blocks"])
def test_it_recomputes_as_training_does(setting: str) -> None:
    cfg = tiny.config(use_checkpointing=setting)
    with TRACED["autoencoder"](cfg, False) as traced:
        predicted = traced.train_step()
    with stand_ins() as counter:
        stage, image = AutoencoderStage(cfg, tiny.CPU, 2), torch.rand(2, 1, 16, 16, 16)
        for _ in range(2):
            counter.start_over()
            stage.train_step({"image": image, "case": ["", ""]}, tiny.random(), True)
    assert counter.peak == predicted


def test_attention_keeps_no_matrix_where_it_is_told_not_to() -> None:
    kept = []
    for flash in (True, False):
        with TRACED["diffusion"](small(diffusion_def={"use_flash_attention": flash}), False) as traced:
            kept.append(traced.activations())
    tokens, heads, batch = 8**3, 2, 2
    assert kept[1] - kept[0] > tokens**2 * heads * batch * 4


def test_nothing_of_the_stand_ins_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "PerceptualLoss", None)  # no weights are asked for
    before = F.group_norm, nn.Module.to, nn.init.ones_, torch.get_rng_state()
    cfg = tiny.config(autoencoder_train={"perceptual_weight": 0.1, "patch_size": [32, 32, 32]})
    with TRACED["autoencoder"](cfg, True) as traced:
        assert traced.stage.loss.perceptual is not None
        assert F.group_norm is not before[0]
    assert (F.group_norm, nn.Module.to, nn.init.ones_) == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert type(torch.ones(1)) is torch.Tensor


def test_values_of_stand_ins_are_never_bad() -> None:
    with stand_ins():
        x = torch.rand(3)
        assert torch.isfinite(x).all()
        assert x.sum().item() == 1.0
        assert x.tolist() == [1.0] * 3


def test_largest_batch_and_patch() -> None:
    tried: list[int] = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return 100 + 10 * batch

    assert largest_batch(peak, 64, 165) == 6
    assert len(tried) < 5
    assert largest_batch(peak, 4, 165) == 4
    assert largest_batch(peak, 64, 109) == 0
    assert largest_batch(lambda n: 10 * n * n, 64, 90) == 3  # not in proportion: still one that fits

    def volume(size: Any) -> int:
        return size[0] * size[1] * size[2]

    assert largest_patch(volume, (40, 80, 40), 4, 8 * 16 * 8) == (8, 16, 8)
    assert largest_patch(volume, (40, 80, 40), 4, 1) is None
    assert largest_patch(volume, (40, 80, 40), 4, 1e9) == (40, 80, 40)


def test_what_a_gpu_holds_is_what_a_peak_needs() -> None:
    assert needed(int(largest_peak(16 * GIB))) == pytest.approx(0.9 * 16 * GIB)


# What only this test may be slow for: the promise of the two files.
@pytest.mark.parametrize("gib", [16, 32])
def test_a_config_that_names_a_card_fits_it(gib: int) -> None:
    cfg = load_config(ROOT / "config" / f"config_train_{gib}g.json")
    for stage in STAGES:
        with TRACED[stage](cfg, True) as traced:
            peak = traced.train_step()
        assert needed(peak) / GIB <= 0.9 * gib
        assert crude_bound(cfg, stage) > peak


@pytest.mark.parametrize("stage", STAGES)
def test_the_crude_bound_is_above_the_peak(stage: str) -> None:
    for cfg in (
        small(diffusion_def={"use_flash_attention": False}),
        load_config(ROOT / "config" / "config_demo.json"),
    ):
        with TRACED[stage](cfg, False) as traced:
            assert crude_bound(cfg, stage) > traced.train_step()


def run(monkeypatch: pytest.MonkeyPatch, cfg: Config, tmp_path: Path, *arguments: str) -> int:
    path = tmp_path / "config.json"
    path.write_text(cfg.model_dump_json(by_alias=True))
    monkeypatch.setattr("sys.argv", ["memory", "-c", str(path), *arguments])
    return memory.main()


def test_table_and_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    train = {"batch_size": 6, "patch_size": [32, 32, 32]}
    cfg = tiny.config(autoencoder_train={"val_patch_size": [16, 16, 16]}, diffusion_train=train)
    assert run(monkeypatch, cfg, tmp_path, "--gpu-gib", "24") == 0
    shown = capsys.readouterr().out
    assert "fits 24 GiB with 10% to spare" in shown
    rows = "parameters", "EMA", "activations, autocast, checkpointing norms", "peak: decoding in pieces"
    for row in rows:
        assert re.search(rf"^{re.escape(row)} .*\d\.\d\d$", shown, re.MULTILINE), row
    assert "peak: decoding whole, U-Net on the host" in shown
    assert run(monkeypatch, cfg, tmp_path, "--gpu-gib", "1.17") == 1
    shown = capsys.readouterr().out
    assert "does not fit 1.17 GiB" in shown
    assert "training step of stage 2" in shown


def test_what_cannot_be_read_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["memory", "-c", "nowhere.json"])
    assert memory.main() == 2
    assert capsys.readouterr().err.startswith("error: nowhere.json: cannot be read")


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_advised_fits(stage: str) -> None:
    cfg = small(autoencoder_train={"batch_size": 4}, diffusion_train={"batch_size": 4, "patch_size": [32] * 3})
    with TRACED[stage](cfg, False) as traced:
        limit = 0.6 * traced.train_step() + 0.4 * traced.train_step(1)
        advice = memory_advice.suggest_training(traced, limit)
    assert any("batch_size=" in line for line in advice)
    for line in advice:
        changed = with_setting(cfg, line)
        with TRACED[stage](changed, False) as traced:
            assert traced.train_step() <= limit, line


def with_setting(cfg: Config, line: str) -> Config:
    """`a.b=value` as `--set` takes it."""
    content = json.loads(cfg.model_dump_json(by_alias=True))
    key, value = line.split("=")
    *sections, last = key.split(".")
    target = content
    for section in sections:
        target = target[section]
    target[last] = json.loads(value)
    return Config.model_validate_json(json.dumps(content))


def said(monkeypatch: pytest.MonkeyPatch, cfg: Config, stage: str, ram: int | None) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(memory_advice, "log", lines.append)
    monkeypatch.setattr(memory_advice, "free_bytes", lambda device: ram)
    warn_if_too_large(cfg, stage, tiny.CPU)
    return lines


@pytest.mark.parametrize("stage", STAGES)
def test_training_warns_of_what_will_not_fit(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(memory_advice, "crude_bound", lambda cfg, stage: 2.0**60)
    cfg = small(autoencoder_train={"batch_size": 4}, diffusion_train={"batch_size": 4, "patch_size": [32, 32, 32]})
    with TRACED[stage](cfg, False) as traced:
        between = (traced.train_step() + traced.train_step(1)) // 2
    (line,) = said(monkeypatch, cfg, stage, int(needed(between)))
    assert line.startswith(f"warning: a step of {stage}_train will take about ")
    assert re.search(r"GiB, but cpu has 1.0 GiB; it would fit with \S+=", line)
    assert said(monkeypatch, cfg, stage, 4 * GIB) == []


def test_much_room_needs_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_advice, "TRACED", {})
    assert said(monkeypatch, small(), "autoencoder", 64 * GIB) == []
    assert said(monkeypatch, small(), "autoencoder", None) == []


def test_a_failing_prediction_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such operation\nmore")

    monkeypatch.setattr(memory_advice, "TRACED", {"diffusion": fail})
    (line,) = said(monkeypatch, small(), "diffusion", 1)
    assert line == "notice: memory cannot be predicted (RuntimeError: no such operation)"
