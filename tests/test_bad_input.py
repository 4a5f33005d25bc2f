"""What users get wrong: one line that says what, where and what would be right; status 2; nothing written or lost."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import Desk, Result, tree

import utils
from ldm3d.errors import DataError, LatentsError, NonFiniteLoss
from ldm3d.nifti import read_volume, write_volume
from ldm3d.tutorial import AUTOENCODER, UNET

SECONDS = 30
"""The promise is 10 seconds on a quiet machine; this one may be shared."""
STAGE_1, STAGE_2, STAGE_3 = "train_autoencoder.py", "train_diffusion.py", "inference.py"
Run = Callable[..., Result]


class RunsCode:
    """A pickle that makes a file when it is loaded with a loader that trusts it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def require_refused(result: Result, *fragments: object) -> None:
    """One line, status 2; the line has every one of the fragments."""
    assert result.code == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert [line.startswith("error: ") for line in result.stderr.splitlines()].index(True) == len(
        result.stderr.splitlines()
    ) - 1, result.stderr
    assert [str(f) for f in fragments if str(f) not in result.last_line] == [], result.last_line
    assert result.seconds < SECONDS


@dataclass(frozen=True)
class Case:
    """A command that cannot work.

    Args:
        script: which one.
        says: what the error must say, besides naming what `prepare` returns.
        more: arguments after configuration and environment.
        config: what the configuration says otherwise; a dictionary replaces single keys of a section.
        prepare: what goes wrong on the desk before; returns what the error must name.
        weights: the desk has the trained weights.
    """

    script: str
    says: tuple[str, ...]
    more: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    prepare: Callable[[Desk], object] = lambda desk: ""
    weights: bool = True


def missing_config(desk: Desk) -> Path:
    desk.config.unlink()
    return desk.config


def malformed_config(desk: Desk) -> Path:
    desk.config.write_text('{"spacing": [6, 6, 6],\n "latent_channels": 4,,}')
    return desk.config


def incomplete_environment(desk: Desk) -> Path:
    content = json.loads(desk.environment.read_text())
    del content["tfevent_path"]
    desk.environment.write_text(json.dumps(content))
    return desk.environment


def missing_environment(desk: Desk) -> Path:
    desk.environment.unlink()
    return desk.environment


def missing_data(desk: Desk) -> Path:
    desk.write_environment(data_base_dir=str(desk.folder / "nowhere"))
    return desk.folder / "nowhere"


def empty_data(desk: Desk) -> Path:
    (desk.folder / "empty").mkdir()
    desk.write_environment(data_base_dir=str(desk.folder / "empty"))
    return desk.folder / "empty"


def corrupt_volume(desk: Desk) -> Path:
    """The data set with one file cut in the middle, as a broken copy leaves it."""
    data = desk.folder / "data"
    shutil.copytree(desk.data, data, ignore=shutil.ignore_patterns("cache"))
    victim = data / "Task01_BrainTumour" / "imagesTr" / "BRATS_004.nii.gz"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    desk.write_environment(data_base_dir=str(data))
    return victim


def contrast_missing(desk: Desk) -> str:
    """BraTS case folders, one of them without the contrast that is asked for."""
    data = desk.folder / "data"
    volume = next((desk.data / "Task01_BrainTumour" / "imagesTr").glob("*.nii.gz"))
    for case, contrasts in {"BraTS_1": ("t1",), "BraTS_2": ("t1", "flair"), "BraTS_3": ("t1", "flair")}.items():
        (data / case).mkdir(parents=True)
        for contrast in contrasts:
            write_volume(data / case / f"{case}_{contrast}.nii.gz", read_volume(volume, 0)[0] / 1e4, (6, 6, 6))
    desk.write_environment(data_base_dir=str(data))
    return "BraTS_1: has no flair"


def without(name: str) -> Callable[[Desk], Path]:
    def remove(desk: Desk) -> Path:
        (desk.model / name).unlink()
        return desk.model / name

    return remove


def truncated(name: str) -> Callable[[Desk], Path]:
    def cut(desk: Desk) -> Path:
        path = desk.model / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return cut


def tutorial_code(desk: Desk) -> Path:
    """Tutorial weights whose autoencoder is a program."""
    shutil.rmtree(desk.model)
    desk.model.mkdir()
    torch.save({"weight": RunsCode(desk.folder / "executed")}, desk.model / AUTOENCODER)
    torch.save({}, desk.model / UNET)
    return desk.model / AUTOENCODER


def code_as_state(name: str) -> Callable[[Desk], Path]:
    def write(desk: Desk) -> Path:
        with open(desk.model / name, "wb") as file:
            pickle.dump({"fingerprint": RunsCode(desk.folder / "executed")}, file)
        return desk.model / name

    return write


def below_a_file(key: str) -> Callable[[Desk], Path]:
    """A folder that nobody can make, root neither."""

    def write(desk: Desk) -> Path:
        (desk.folder / "file").touch()
        desk.write_environment(**{key: str(desk.folder / "file" / "folder")})
        return desk.folder / "file" / "folder"

    return write


ATTENTION = {"attention_levels": [False, True], "num_head_channels": 3}
DEEPER = {"channels": [8, 8, 8], "attention_levels": [False, False, False]}

CASES = {
    "missing config": Case(STAGE_1, ("No such file",), prepare=missing_config),
    "missing config, stage 3": Case(STAGE_3, ("No such file",), prepare=missing_config),
    "malformed config": Case(STAGE_1, ("line 2, column 23", "JSON"), prepare=malformed_config),
    "unknown key": Case(
        STAGE_1,
        ("config.json: autoencoder_train.max_epoch: no such key; did you mean 'max_epochs'?",),
        config={"autoencoder_train": {"max_epoch": 3}},
    ),
    "wrong type": Case(
        STAGE_2,
        ("config.json: diffusion_train.batch_size: 'two'", "valid integer"),
        config={"diffusion_train": {"batch_size": "two"}},
    ),
    "expression": Case(
        STAGE_1,
        ("config.json: autoencoder_train.lr", "__import__", "@name"),
        config={"autoencoder_train": {"lr": "$__import__('pathlib').Path('executed').touch()"}},
    ),
    "patch size of stage 1": Case(
        STAGE_1,
        ("config.json: autoencoder_train.patch_size [16, 18, 16] must be divisible by 4", "[16, 16, 16]"),
        config={"autoencoder_train": {"patch_size": [16, 18, 16]}},
    ),
    "patch size of stage 2": Case(
        STAGE_2,
        ("config.json: diffusion_train.patch_size [24, 28, 24] must be divisible by 8", "[24, 32, 24]"),
        config={"diffusion_train": {"patch_size": [24, 28, 24]}},
    ),
    "attention heads": Case(
        STAGE_2,
        ("config.json: diffusion_def.num_head_channels 3 must divide the 8 channels of level 1",),
        config={"diffusion_def": ATTENTION},
    ),
    "key missing in environment": Case(STAGE_1, ("tfevent_path: is missing",), prepare=incomplete_environment),
    "missing environment": Case(STAGE_3, ("No such file",), prepare=missing_environment),
    "missing data folder": Case(
        STAGE_1, ("there is no such folder", "data_base_dir", "--phantom"), prepare=missing_data, weights=False
    ),
    "missing data folder, stage 2": Case(STAGE_2, ("there is no such folder", "data_base_dir"), prepare=missing_data),
    "no cases": Case(
        STAGE_1, ("no cases found; looked for dataset.json", "--phantom"), prepare=empty_data, weights=False
    ),
    "corrupt volume": Case(
        STAGE_1, ("1 of 10 cases cannot be used", "cut short", "data.on_error"), prepare=corrupt_volume, weights=False
    ),
    "contrast not there": Case(
        STAGE_1,
        ("BraTS_1_flair.nii.gz is not there", "1 of 3 cases", "data.on_error"),
        prepare=contrast_missing,
        weights=False,
    ),
    "missing autoencoder, stage 2": Case(
        STAGE_2, ("no such weights; train them first",), prepare=without("autoencoder.safetensors")
    ),
    "missing autoencoder, stage 3": Case(
        STAGE_3, ("no such weights; train them first",), prepare=without("autoencoder.safetensors")
    ),
    "missing diffusion model": Case(
        STAGE_3, ("no such weights; train them first",), prepare=without("diffusion_unet.safetensors")
    ),
    "nothing trained": Case(STAGE_3, ("autoencoder.safetensors: no such weights; train them first",), weights=False),
    "other autoencoder, stage 2": Case(
        STAGE_2,
        ("autoencoder.safetensors: autoencoder_def", "channels is (8, 8, 8) but the weights have (8, 8)"),
        config={"autoencoder_def": DEEPER, "diffusion_train": {"patch_size": [32, 32, 32]}},
    ),
    "other autoencoder, stage 3": Case(
        STAGE_3,
        ("autoencoder.safetensors: autoencoder_def", "num_res_blocks is 2 but the weights have 1"),
        config={"autoencoder_def": {"num_res_blocks": 2}},
    ),
    "other diffusion model": Case(
        STAGE_3,
        ("diffusion_unet.safetensors: diffusion_def", "num_res_blocks is 2 but the weights have 1"),
        config={"diffusion_def": {"num_res_blocks": 2}},
    ),
    "other architecture resumed": Case(
        STAGE_2,
        ("diffusion_last.pt: belongs to another training", "diffusion_def.num_res_blocks was 1, is 2"),
        more=("--resume",),
        config={"diffusion_def": {"num_res_blocks": 2}},
    ),
    "other architecture to begin with": Case(
        STAGE_1,
        ("autoencoder.safetensors: autoencoder_def", "norm_num_groups is 2 but the weights have 4"),
        more=("--init-from", "model"),
        config={"autoencoder_def": {"norm_num_groups": 2}},
    ),
    "truncated autoencoder, stage 2": Case(
        STAGE_2, ("not a whole safetensors file", "again"), prepare=truncated("autoencoder.safetensors")
    ),
    "truncated diffusion model": Case(
        STAGE_3, ("not a whole safetensors file", "again"), prepare=truncated("diffusion_unet.safetensors")
    ),
    "truncated state": Case(
        STAGE_1, ("cannot be loaded",), more=("--resume",), prepare=truncated("autoencoder_last.pt")
    ),
    "code as tutorial weights": Case(
        STAGE_3,
        ("other than tensors, which could run code",),
        more=("--scale-factor", "1"),
        config={"NoiseScheduler": {"type": "ddpm"}},
        prepare=tutorial_code,
    ),
    "code as state of stage 1": Case(
        STAGE_1,
        ("other than tensors, which could run code",),
        more=("--resume",),
        prepare=code_as_state("autoencoder_last.pt"),
    ),
    "code as state of stage 2": Case(
        STAGE_2,
        ("other than tensors, which could run code",),
        more=("--resume",),
        prepare=code_as_state("diffusion_last.pt"),
    ),
    "model_dir not writable": Case(
        STAGE_1, ("cannot be written to: Not a directory",), prepare=below_a_file("model_dir"), weights=False
    ),
    "tfevent_path not writable": Case(
        STAGE_2, ("cannot be written to: Not a directory",), prepare=below_a_file("tfevent_path")
    ),
    "output_dir not writable": Case(
        STAGE_3, ("cannot be written to: Not a directory",), prepare=below_a_file("output_dir")
    ),
    "output not writable": Case(STAGE_3, ("/proc/volumes: cannot be written to",), more=("--output", "/proc/volumes")),
    "too many GPUs": Case(STAGE_1, ("-g 99: this machine has", "GPU(s)", "leave -g out"), more=("-g", "99")),
    "too many GPUs, stage 2": Case(STAGE_2, ("-g 99: this machine has",), more=("-g", "99")),
    "negative GPUs": Case(STAGE_1, ("-g -1", "0 (CPU) or more"), more=("-g", "-1")),
    "num 0": Case(STAGE_3, ("--num", "'0' is not a whole number of 1 or more"), more=("--num", "0")),
    "num negative": Case(STAGE_3, ("--num", "'-3' is not a whole number of 1 or more"), more=("--num", "-3")),
    "num no number": Case(STAGE_3, ("--num", "'many' is not a whole number"), more=("--num", "many")),
    "unknown scheduler": Case(STAGE_3, ("'euler'", "sampled with rflow"), more=("--scheduler", "euler")),
    "unknown scheduler in config": Case(
        STAGE_3,
        ("config.json: sampling.scheduler: 'euler'", "'ddim'", "'rflow'"),
        config={"sampling": {"scheduler": "euler"}},
    ),
    "scheduler of another training": Case(STAGE_3, ("'ddim'", "sampled with rflow"), more=("--scheduler", "ddim")),
    "too many steps": Case(STAGE_3, ("steps 1001", "between 1 and 1000"), more=("--steps", "1001")),
    "resume without checkpoint": Case(
        STAGE_1,
        ("no checkpoint to resume from; start without --resume",),
        more=("--resume",),
        prepare=without("autoencoder_last.pt"),
    ),
    "resume without checkpoint, stage 2": Case(
        STAGE_2,
        ("no checkpoint to resume from; start without --resume",),
        more=("--resume",),
        prepare=without("diffusion_last.pt"),
    ),
    "resume and init-from": Case(
        STAGE_1, ("--resume and --init-from exclude each other",), more=("--resume", "--init-from", "model")
    ),
    "resume and overwrite": Case(
        STAGE_1, ("--resume and --overwrite exclude each other",), more=("--resume", "--overwrite")
    ),
    "nothing to replay": Case(STAGE_1, ("--replay kept.pt: no such file",), more=("--replay", "kept.pt")),
    "another stage to replay": Case(
        STAGE_2,
        ("autoencoder_last.pt: is not a step of diffusion training",),
        more=("--replay", "model/autoencoder_last.pt"),
    ),
    "nothing to begin with": Case(
        STAGE_2, ("nowhere/diffusion_unet.safetensors: no such weights",), more=("--init-from", "nowhere")
    ),
    "negative seed": Case(STAGE_1, ("seed: -1", "greater than or equal to 0"), more=("--seed", "-1")),
    "negative seed, stage 3": Case(STAGE_3, ("'-1' is not a whole number between 0 and",), more=("--seed", "-1")),
    "set without value": Case(
        STAGE_1, ("--set diffusion_train.lr: must have the form a.b=value",), more=("--set", "diffusion_train.lr")
    ),
    "set of an unknown key": Case(
        STAGE_1, ("autoencoder_train.learning_rate: no such key",), more=("--set", "autoencoder_train.learning_rate=1")
    ),
    "unknown flag": Case(
        STAGE_2, ("unrecognized arguments: --epochs", "train_diffusion.py --help"), more=("--epochs", "3")
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused_in_one_line_and_nothing_is_lost(
    case: Case, desk: Desk, trained: Desk, run: Run, record_property: Any
) -> None:
    desk.write_config(**(case.config or {}))
    if case.weights:
        shutil.copytree(trained.model, desk.model)
    named = case.prepare(desk)
    before = tree(desk.folder, desk.temporary)
    # What is refused must be refused whether or not it may replace the training that is there.
    overwrite = () if case.script == STAGE_3 or "--resume" in case.more else ("--overwrite",)
    result = run(case.script, *case.more, *overwrite)
    record_property("seconds", round(result.seconds, 1))
    require_refused(result, named, *case.says)
    prepared = desk.folder / "data" / "cache"  # what was done to the good volumes of a bad data set is kept
    after = tree(desk.folder, desk.temporary)
    assert {path: digest for path, digest in after.items() if not path.startswith(str(prepared))} == before


@pytest.mark.parametrize("script", [STAGE_1, STAGE_2])
def test_a_training_is_not_replaced_without_being_told_to(script: str, desk: Desk, model: Path, run: Run) -> None:
    before = tree(model)
    for more in ((), ("--init-from", "model")):
        require_refused(
            run(script, *more), "model_dir holds a training; go on with --resume, start anew with --overwrite"
        )
    assert tree(model) == before
    section = "autoencoder_train" if script == STAGE_1 else "diffusion_train"
    assert run(script, "--overwrite", "--set", f"{section}.max_epochs=1").code == 0
    assert tree(model) != before


def test_the_start_is_quick(desk: Desk) -> None:
    """The other tests do not wait for imports: here is one that does."""
    result = desk.run_cold(STAGE_1, "-c", "missing.json", "-e", "missing.json")
    require_refused(result, "missing.json: cannot be read: No such file")


def test_traceback_for_those_who_ask(desk: Desk, run: Run) -> None:
    missing_config(desk)
    result = run(STAGE_1, "--traceback")
    assert result.code != 0 and "Traceback" in result.stderr
    assert result.last_line.startswith("ldm3d.errors.ConfigError: ") and "No such file" in result.last_line


def test_an_error_that_only_another_process_has_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(utils.distributed, "is_main", lambda: False)
    monkeypatch.setattr(utils, "SECONDS_FOR_RANK_0", 0)
    of_one = (NonFiniteLoss(3, {"l1": float("nan")}, ["a"]), LatentsError("a volume of one process"))
    for error in (DataError("a volume that is gone"), *of_one):
        with pytest.raises(SystemExit) as stop:
            utils.run_script(partial(raises, error))
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: {error.one_line()}\n"


def raises(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("workers", [0, 1])
def test_data_gone_while_training(workers: int, desk: Desk, run: Run) -> None:
    """Also where another process notices it, whose error comes with a traceback."""
    data = Path(shutil.copytree(desk.data, desk.folder / "data"))
    desk.write_environment(data_base_dir=str(data))
    settings = ("--set", f"data.num_workers={workers}", "--set", "checkpoint_every_minutes=0")
    result = run(STAGE_1, *settings, faults=[("lose_data_at_step", str(data), 8)])
    require_refused(result, f"{data}/Task01_BrainTumour/imagesTr/BRATS_", ".nii.gz is not there")
    assert torch.load(desk.model / "autoencoder_last.pt", weights_only=True)["epoch"] == 2


FULL = {
    "weights": (("full_disk", 50_000),),
    "state": (("full_disk_while_saving", 100_000),),
    "events": (("full_disk", 700_000),),
}


@pytest.mark.parametrize("script", [STAGE_1, STAGE_2])
@pytest.mark.parametrize("full", FULL)
def test_full_disk_while_saving(full: str, script: str, desk: Desk, model: Path, run: Run) -> None:
    section = "autoencoder_train" if script == STAGE_1 else "diffusion_train"
    before = tree(model)
    result = run(script, "--resume", "--set", f"{section}.max_epochs=40", faults=FULL[full])
    require_refused(result, "File too large")
    assert not [path for path in tree(desk.folder) if ".tmp-" in path]
    if full != "events":
        assert tree(model).keys() == before.keys()


def test_full_disk_while_writing_volumes(desk: Desk, model: Path, run: Run) -> None:
    result = run(STAGE_3, "--num", "2", faults=[("full_disk", 20_000)])
    require_refused(result, "synimg_0_0.nii.gz: cannot be written: File too large")
    assert tree(desk.results) == {}
