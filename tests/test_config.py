"""Configuration files: what is read, what is translated, and what is refused in which words."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pydantic import BaseModel, ValidationError

from ldm3d.config import config_schema, load_config, load_environment
from ldm3d.errors import ConfigError
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.schema import Config, Environment

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "config").glob("config_*.json"))
ENVIRONMENTS = sorted((ROOT / "config").glob("environment*"))
SCHEMA = ROOT / "config" / "schema.json"
GPU_CONFIGS = ("config_train_16g", "config_train_32g", "config_train_multigpu", "config_optimized")

# config_train_32g.json of the public tutorial, from the years when it used monai-generative.
TUTORIAL: dict[str, Any] = {
    "channel": 0,
    "spacing": [1.1, 1.1, 1.1],
    "spatial_dims": 3,
    "image_channels": 1,
    "latent_channels": 8,
    "autoencoder_def": {
        "_target_": "generative.networks.nets.AutoencoderKL",
        "spatial_dims": "@spatial_dims",
        "in_channels": "$@image_channels",
        "out_channels": "@image_channels",
        "latent_channels": "@latent_channels",
        "num_channels": [64, 128, 256],
        "num_res_blocks": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-06,
        "attention_levels": [False, False, False],
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    "autoencoder_train": {
        "batch_size": 2,
        "patch_size": [112, 128, 80],
        "lr": 1e-5,
        "perceptual_weight": 0.001,
        "kl_weight": 1e-7,
        "recon_loss": "l1",
        "n_epochs": 1000,
        "val_interval": 10,
    },
    "diffusion_def": {
        "_target_": "generative.networks.nets.DiffusionModelUNet",
        "spatial_dims": "@spatial_dims",
        "in_channels": "@latent_channels",
        "out_channels": "@latent_channels",
        "num_channels": [256, 256, 512],
        "attention_levels": [False, True, True],
        "num_head_channels": [0, 64, 64],
        "num_res_blocks": 2,
    },
    "diffusion_train": {
        "batch_size": 3,
        "patch_size": [144, 176, 112],
        "lr": 1e-5,
        "n_epochs": 10000,
        "val_interval": 2,
    },
    "NoiseScheduler": {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195},
}

# An `autoencoder_def` as other repositories publish it: older argument names, no `_target_`.
SNIPPET = """{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": 2, "num_channels": [256, 512],
"attention_levels": [false, true], "latent_channels": 8, "norm_num_groups": 32, "norm_eps": 1e-6,
"with_encoder_nonlocal_attn": false, "with_decoder_nonlocal_attn": false}"""

NEW: dict[str, Any] = json.loads((ROOT / "config" / "config_train_32g.json").read_text())


def changed(changes: dict[str, Any], file: dict[str, Any] = TUTORIAL) -> dict[str, Any]:
    """A file with other values at dotted places; `...` takes a key out."""
    content = copy.deepcopy(file)
    for place, value in changes.items():
        *sections, last = place.split(".")
        target = content[sections[0]] if sections else content
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return content


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(folder: Path, changes: dict[str, Any], *overrides: str) -> Config:
    return load_config(write(folder, changed(changes)), overrides)


def refusal(path: Path, *overrides: str) -> str:
    """What the user is told; the file's name stands at its beginning."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith((f"{path}: ", "--set ")), text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_file_loads_and_its_networks_fit_its_sizes(path: Path) -> None:
    cfg = load_config(path)
    assert json.loads(path.read_text())["$schema"] == "./schema.json"
    # On the meta device sizes are computed and nothing else is.
    with torch.device("meta"), torch.no_grad():
        image = torch.zeros(1, 1, *cfg.diffusion_train.patch_size)
        autoencoder, unet = build_autoencoder(cfg.autoencoder_def), build_unet(cfg.diffusion_def)
        latent, _ = autoencoder.encode(image)
        assert latent.shape[1:] == cfg.latent_shape
        assert autoencoder.decode(latent).shape == image.shape
        assert unet(latent, timesteps=torch.zeros(1)).shape == latent.shape


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_the_configs_for_gpus_have_the_tutorials_networks(tmp_path: Path, name: str) -> None:
    cfg, tutorial = load_config(ROOT / "config" / f"{name}.json"), load_config(write(tmp_path, TUTORIAL))
    assert cfg.autoencoder_def == tutorial.autoencoder_def
    assert cfg.diffusion_def == tutorial.diffusion_def
    assert (cfg.channel, cfg.spacing, cfg.latent_shape) == (tutorial.channel, tutorial.spacing, tutorial.latent_shape)
    assert cfg.autoencoder_train.patch_size == tutorial.autoencoder_train.patch_size
    assert cfg.diffusion_def.use_flash_attention
    if name != "config_optimized":
        assert cfg.noise_schedule == tutorial.noise_schedule


def shipped(name: str) -> Config:
    return load_config(ROOT / "config" / f"config_{name}.json")


def test_what_the_configs_for_gpus_are_for() -> None:
    batches = {
        name: (shipped(name).autoencoder_train.batch_size, shipped(name).diffusion_train.batch_size)
        for name in ("train_16g", "train_32g")
    }
    assert batches == {"train_16g": (1, 2), "train_32g": (2, 3)}
    assert shipped("train_16g").use_checkpointing
    assert (shipped("train_multigpu").ddp_backend, shipped("train_multigpu").sync_bn) == ("nccl", True)
    optimized = shipped("optimized")
    assert (optimized.noise_schedule.type, optimized.sampling.scheduler, optimized.sampling.steps) == ("rflow",) * 2 + (
        30,
    )
    assert optimized.compile
    assert optimized.diffusion_train.center_latents


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.name)
def test_each_environment_file_loads_and_holds_no_path_of_one_machine(path: Path) -> None:
    env = load_environment(path)
    assert not any(getattr(env, name).is_absolute() for name in ("model_dir", "tfevent_path", "output_dir"))
    assert not env.data_base_dir.is_absolute()
    assert not env.resume_ckpt


def test_the_example_environment_is_the_one_that_works() -> None:
    example, used = (ROOT / "config" / name for name in ("environment.json.example", "environment.json"))
    assert load_environment(example) == load_environment(used)


def test_the_tutorials_file_loads_and_its_old_names_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load(tmp_path, {})
    assert cfg.autoencoder_def.channels == (64, 128, 256)
    assert (cfg.autoencoder_def.in_channels, cfg.autoencoder_def.latent_channels) == (1, 8)
    assert (cfg.autoencoder_train.max_epochs, cfg.diffusion_train.max_epochs) == (1000, 10000)
    assert (cfg.noise_schedule.type, cfg.noise_schedule.num_train_timesteps) == ("ddpm", 1000)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "translated" in line]
    assert line == (
        f"{tmp_path / 'config.json'}: old names translated: autoencoder_def.num_channels -> channels, "
        "diffusion_def.num_channels -> channels, autoencoder_train.n_epochs -> max_epochs, "
        "diffusion_train.n_epochs -> max_epochs, "
        "generative.networks.nets.AutoencoderKL -> monai.networks.nets.AutoencoderKL, "
        "generative.networks.nets.DiffusionModelUNet -> monai.networks.nets.DiffusionModelUNet"
    )


def test_new_names_are_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_config(ROOT / "config" / "config_train_32g.json")
    assert capsys.readouterr().err == ""


def test_a_published_autoencoder_def_loads_as_it_stands(tmp_path: Path) -> None:
    definition = load(tmp_path, {"autoencoder_def": json.loads(SNIPPET)}).autoencoder_def
    assert (definition.channels, definition.attention_levels) == ((256, 512), (False, True))
    assert (definition.norm_eps, definition.downsampling) == (1e-6, 2)
    with torch.device("meta"):
        assert build_autoencoder(definition).encode(torch.zeros(1, 1, 16, 16, 16))[0].shape == (1, 8, 8, 8, 8)


def test_the_tutorials_summed_kl_weight_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(tmp_path, {})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "autoencoder_train.kl_weight 1e-07" in line
    # 1e-7 for each of the 8 * 28 * 32 * 20 elements of a patch's latent.
    assert line.endswith("would be 0.014")


@pytest.mark.parametrize("weight", [0, 1e-6, 1e-3])
def test_other_kl_weights_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: float) -> None:
    load(tmp_path, {"autoencoder_train.kl_weight": weight})
    assert "warning" not in capsys.readouterr().err


def test_references_may_stand_in_lists_and_refer_to_references(tmp_path: Path) -> None:
    cfg = load(tmp_path, {"seed": "$@spatial_dims", "spacing": ["@seed", 1, 1.5]})
    assert (cfg.seed, cfg.spacing) == (3, (3, 1, 1.5))


REFUSED = [
    # unknown keys
    ({"autoencoder_train.learning_rate": 1}, r"autoencoder_train\.learning_rate: no such key$"),
    ({"autoencoder_train.batchsize": 1}, r"autoencoder_train\.batchsize: no such key; did you mean 'batch_size'\?$"),
    ({"chanel": 1}, r"chanel: no such key; did you mean 'channel'\?$"),
    ({"NoiseScheduler.beta_strat": 0.1}, r"NoiseScheduler\.beta_strat: no such key; did you mean 'beta_start'\?$"),
    ({"NoiseSchedule": {}}, r"NoiseSchedule: no such key; did you mean 'NoiseScheduler'\?$"),
    # missing keys
    ({"autoencoder_def": ...}, r"autoencoder_def: is missing$"),
    ({"diffusion_train.lr": ...}, r"diffusion_train\.lr: is missing$"),
    # wrong types
    ({"autoencoder_train.batch_size": "2"}, r"autoencoder_train\.batch_size: '2': .*valid integer$"),
    ({"autoencoder_train.batch_size": 2.0}, r"autoencoder_train\.batch_size: 2\.0: .*valid integer$"),
    ({"autoencoder_train.batch_size": True}, r"autoencoder_train\.batch_size: True: .*valid integer$"),
    ({"autoencoder_train.patch_size": 64}, r"autoencoder_train\.patch_size: 64: .*valid array$"),
    ({"autoencoder_train.patch_size": [64, 64]}, r"autoencoder_train\.patch_size\.2: is missing$"),
    ({"diffusion_def": "unet"}, r"diffusion_def: 'unet': .*object$"),
    ({"amp": "yes"}, r"amp: 'yes': .*boolean$"),
    ({"NoiseScheduler": "ddpm"}, r"NoiseScheduler: 'ddpm': .*object$"),
    ({"NoiseScheduler.type": "edm"}, r"NoiseScheduler: .*'edm'.*'ddpm', 'rflow'$"),
    (
        {"diffusion_def.num_head_channels": None},
        r"diffusion_def\.num_head_channels: None: .*integer; diffusion_def\.num_head_channels: None: .*array$",
    ),
    # values out of range
    ({"autoencoder_train.lr": 0}, r"autoencoder_train\.lr: 0: .*greater than 0$"),
    ({"channel": 4}, r"channel: 4: .*less than or equal to 3$"),
    ({"autoencoder_train.recon_loss": "l3"}, r"autoencoder_train\.recon_loss: 'l3': .*'l1' or 'l2'$"),
    ({"autoencoder_train.lr": float("nan")}, r"autoencoder_train\.lr: nan: .*finite number$"),
    ({"autoencoder_train.lr": float("inf")}, r"autoencoder_train\.lr: inf: .*finite number$"),
    ({"diffusion_train.ema_decay": float("nan")}, r"diffusion_train\.ema_decay: nan: "),
    # what does not go together
    (
        {"autoencoder_train.patch_size": [112, 128, 90]},
        r"autoencoder_train\.patch_size \[112, 128, 90\] must be divisible by 4 \(nearest: \[112, 128, 88\]\)$",
    ),
    (
        {"autoencoder_train.val_patch_size": [2, 128, 88]},
        r"autoencoder_train\.val_patch_size \[2, 128, 88\] must be divisible by 4 \(nearest: \[4, 128, 88\]\)$",
    ),
    (
        {"diffusion_train.patch_size": [144, 176, 100]},
        r"diffusion_train\.patch_size \[144, 176, 100\] must be divisible by 16 \(nearest: \[144, 176, 96\]\)$",
    ),
    (
        {"diffusion_def.num_head_channels": [0, 48, 64]},
        r"diffusion_def\.num_head_channels 48 must divide the 256 channels of level 1$",
    ),
    ({"diffusion_def.num_head_channels": [0, 0, 64]}, r"num_head_channels 0 must divide the 256 channels of level 1$"),
    ({"diffusion_def.num_head_channels": [0, 64]}, r"diffusion_def\.num_head_channels needs 3 entries"),
    (
        {"diffusion_def.num_head_channels": 96},
        r"96 must divide the 256 channels of level 1; .*512 channels of level 2$",
    ),
    ({"diffusion_def.attention_levels": [False, True]}, r"diffusion_def\.attention_levels needs 3 entries"),
    ({"autoencoder_def.attention_levels": [False] * 4}, r"autoencoder_def\.attention_levels needs 3 entries"),
    ({"autoencoder_def.num_res_blocks": [2, 2]}, r"autoencoder_def\.num_res_blocks needs 3 entries"),
    ({"autoencoder_def.norm_num_groups": 24}, r"autoencoder_def\.norm_num_groups 24 must divide every one of "),
    ({"diffusion_def.norm_num_groups": 48}, r"diffusion_def\.norm_num_groups 48 must divide every one of "),
    (
        {"autoencoder_def.latent_channels": 4},
        r"autoencoder_def\.latent_channels is 4 but must equal latent_channels, which is 8$",
    ),
    (
        {"diffusion_def.out_channels": 4},
        r"diffusion_def\.out_channels is 4 but must equal latent_channels, which is 8$",
    ),
    # classes and old names
    (
        {"autoencoder_def._target_": "os.system"},
        r"autoencoder_def\._target_: 'os\.system' is not known; it must be 'monai\.networks\.nets\.AutoencoderKL' or ",
    ),
    (
        {"diffusion_def._target_": "monai.networks.nets.AutoencoderKL"},
        r"diffusion_def\._target_: .* it must be 'monai\.networks\.nets\.DiffusionModelUNet' or left out$",
    ),
    ({"autoencoder_def.channels": [64]}, r"autoencoder_def has both 'num_channels' and its new name 'channels'; keep "),
    # references
    (
        {"autoencoder_def.in_channels": "@no_such"},
        r"autoencoder_def\.in_channels: '@no_such' refers to 'no_such', which",
    ),
    ({"image_channels": "@image_channels"}, r"image_channels: '@image_channels' refers to itself$"),
    ({"image_channels": "@latent_channels", "latent_channels": "@image_channels"}, r"refers to itself$"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: "-".join(value) * isinstance(value, dict))
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(write(tmp_path, changed(changes))))


@pytest.mark.parametrize(
    "value",
    [
        "$__import__('pathlib').Path('{marker}').touch()",
        "$@image_channels + 1",
        "$1",
        "$$@image_channels",
        "@@image_channels",
        "@autoencoder_def#in_channels",
        "@",
        "$",
    ],
)
@pytest.mark.parametrize("place", ["channel", "autoencoder_def.in_channels", "autoencoder_train.perceptual_weights"])
def test_expressions_are_refused_and_not_run(tmp_path: Path, place: str, value: str) -> None:
    marker = tmp_path / "executed"
    value = value.replace("{marker}", str(marker))
    path = write(tmp_path, changed({place: value}))
    assert refusal(path).startswith(f"{place}: {value!r} is an expression; ")
    assert refusal(write(tmp_path, TUTORIAL), f"{place}={value}").startswith(f"{place}: {value!r} is an expression; ")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: not valid JSON: "),
        ('{\n  "channel": 0,\n  "spacing": [1, 2, 3\n}', "line 4, column 1: not valid JSON: Expecting ',' delimiter"),
        ("{'channel': 0}", "line 1, column 2: not valid JSON: "),
        ("[1, 2]", "must hold a JSON object, not list"),
        ("null", "must hold a JSON object, not NoneType"),
        ('{"channel": 0, "seed": 1, "channel": 1}', "key 'channel' stands twice"),
        ('{"autoencoder_train": {"lr": 1e-3, "lr": 1e-4}}', "key 'lr' stands twice"),
        ('{"seed": ' + "9" * 5000 + "}", "cannot be read: "),
        ('{"seed": ' + "[" * 100_000, "cannot be read: "),
    ],
    ids=lambda text: text[:30],
)
def test_malformed_files_are_told_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(write(tmp_path, text)).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing.json") == "cannot be read: No such file or directory"
    assert refusal(tmp_path) == "cannot be read: Is a directory"
    (tmp_path / "image.nii.gz").write_bytes(b"\x1f\x8b\x08\xff\xfe")
    assert refusal(tmp_path / "image.nii.gz") == "is not text"


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff" + json.dumps(TUTORIAL))).latent_channels == 8


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("autoencoder_train.lr=2e-3", "autoencoder_train.lr", 2e-3),
        ("autoencoder_train.patch_size=[8, 8, 8]", "autoencoder_train.patch_size", (8, 8, 8)),
        ("compile=true", "compile", True),
        ("ddp_backend=gloo", "ddp_backend", "gloo"),
        ("data.datalist=a=b.csv", "data.datalist", Path("a=b.csv")),
        ("data.num_workers=0", "data.num_workers", 0),
        ('NoiseScheduler={"num_train_timesteps": 500}', "noise_schedule.num_train_timesteps", 500),
        ("NoiseScheduler.prediction_type=v_prediction", "noise_schedule.prediction_type", "v_prediction"),
        ("seed=@spatial_dims", "seed", 3),
        ("autoencoder_train.max_epochs=3", "autoencoder_train.max_epochs", 3),
        ("autoencoder_train.n_epochs=3", "autoencoder_train.max_epochs", 3),
        ("autoencoder_def.channels=[32,64,96]", "autoencoder_def.channels", (32, 64, 96)),
        (f"autoencoder_def={SNIPPET}", "autoencoder_def.channels", (256, 512)),
    ],
)
@pytest.mark.parametrize("file", [TUTORIAL, NEW], ids=["old", "new"])
def test_set_replaces_keys_of_old_files_and_new_ones(
    tmp_path: Path, file: dict[str, Any], override: str, place: str, value: Any
) -> None:
    found: Any = load_config(write(tmp_path, file), [override])
    for name in place.split("."):
        found = getattr(found, name)
    assert found == value


def test_the_last_set_wins(tmp_path: Path) -> None:
    assert load(tmp_path, {}, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("", "--set : must have the form a.b=value"),
        ("seed", "--set seed: must have the form a.b=value"),
        ("=3", "--set =3: must have the form a.b=value"),
        ("channel.x=3", "--set channel.x=3: channel has no keys of its own"),
        ("autoencoder_train.lrr=3", "autoencoder_train.lrr: no such key; did you mean 'lr'?"),
        ("autoencodr_train.lr=3", "autoencodr_train: no such key; did you mean 'autoencoder_train'?"),
        ("autoencoder_train.lr=fast", "autoencoder_train.lr: 'fast': Input should be a valid number"),
        ("autoencoder_train.lr=NaN", "autoencoder_train.lr: nan: Input should be a finite number"),
        # What would overflow or never end, later and without a word of the key.
        ("ddp_timeout_seconds=1e300", "ddp_timeout_seconds: 1e+300: Input should be less than or equal to 604800"),
        ("sampling.decode_gib=1e300", "sampling.decode_gib: 1e+300: Input should be less than or equal to 1000000"),
        ("keep_last=1000000000000", "keep_last: 1000000000000: Input should be less than or equal to 1000"),
        (
            "diffusion_train.weight_decay=1e300",
            "diffusion_train.weight_decay: 1e+300: Input should be less than or equal to 1000",
        ),
        (
            "diffusion_train.patch_size=[16,16,1000000000]",
            "diffusion_train.patch_size.2: 1000000000: Input should be less than or equal to 4096",
        ),
        ("NoiseScheduler.num_train_timesteps=1000000000000", "NoiseScheduler.num_train_timesteps: 1000000000000: "),
        (
            "diffusion_train.batch_size=1000000000000",
            "diffusion_train.batch_size: 1000000000000: Input should be less than or equal to 1000000",
        ),
        ("diffusion_train.accumulate_steps=1000000000000", "diffusion_train.accumulate_steps: 1000000000000: "),
        ("data.num_workers=1000000", "data.num_workers: 1000000: Input should be less than or equal to 1000"),
        ("amp=True", "amp: 'True': Input should be a valid boolean"),
        ("autoencoder_train.patch_size=[9,8,8]", "autoencoder_train.patch_size [9, 8, 8] must be divisible by 4 "),
    ],
)
def test_set_is_refused(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(write(tmp_path, TUTORIAL), override).startswith(message)


def test_a_configuration_cannot_be_changed_later(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(tmp_path, {}).seed = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dir": ...}, "model_dir: is missing"),
        ({"modeldir": "x"}, "modeldir: no such key; did you mean 'model_dir'?"),
        ({"output_dir": 3}, "output_dir: 3: "),
        ({"resume_ckpt": "yes"}, "resume_ckpt: 'yes': Input should be False, True or 'auto'"),
    ],
    ids=lambda value: "-".join(value) * isinstance(value, dict),
)
def test_environment_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = json.loads((ROOT / "config" / "environment.json").read_text()) | changes
    path = write(tmp_path, {key: value for key, value in content.items() if value is not ...})
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {message}')}"):
        load_environment(path)


def test_the_schema_file_is_what_the_command_writes() -> None:
    command = [sys.executable, "-m", "ldm3d.config"]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert SCHEMA.read_text() == written, "run: python -m ldm3d.config > config/schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_file_follows_the_schema(path: Path) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"autoencoder_train.batchsize": 1},
        {"autoencoder_train.batch_size": "two"},
        {"autoencoder_train.lr": ...},
        {"autoencoder_def.in_channels": "$@image_channels + 1"},
        {"autoencoder_def._target_": "os.system"},
        {"NoiseScheduler": {"type": "edm"}},
        {"chanel": 1},
    ],
    ids="-".join,
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path: Path, wrong: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    assert validator.is_valid(NEW)
    content = changed(wrong, NEW)
    assert not validator.is_valid(content)
    refusal(write(tmp_path, content))


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all that it is made of."""
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from models(part)


def test_every_key_says_what_it_is() -> None:
    keys = {
        f"{model.__name__}.{name}": field
        for root in (Config, Environment)
        for model in models(root)
        for name, field in model.model_fields.items()
    }
    assert len(keys) > 90
    assert [key for key, field in keys.items() if not field.description] == []
    schema = config_schema()
    parts = {**schema["$defs"], "Config": schema}
    undocumented = [
        f"{part}.{key}"
        for part, content in parts.items()
        for key, value in content["properties"].items()
        if not (value.get("description") or schema["$defs"][value["$ref"].split("/")[-1]].get("description"))
    ]
    assert undocumented == []


@pytest.mark.parametrize("size", ["0.011", "1100", "NaN"])
def test_a_voxel_size_that_no_scan_has_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"spacing\.2: .* should be (greater|less) than or equal to"):
        load_config(ROOT / "config" / "config_train_16g.json", [f"spacing=[1.1, 1.1, {size}]"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("NoiseScheduler.beta_start=0.5", "beta_start 0.5 must be smaller than beta_end"),
        ("sampling.scheduler=rflow", "'rflow': ddpm is sampled with ddim or ddpm or pndm"),
        ("sampling.steps=1001", "sampling.steps 1001 must be at most 1000"),
        ("NoiseScheduler.schedule=cosine", "'epsilon' cannot go with schedule 'cosine'.*; use v_prediction"),
    ],
)
def test_schedule_and_sampling_that_contradict_each_other_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(ROOT / "config" / "config_train_16g.json", [override])
