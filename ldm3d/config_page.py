"""docs/CONFIG.md, as `python -m ldm3d.config_page` writes it: every key of both configuration files, from the code."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ldm3d.config import OLD_KEYS
from ldm3d.schema import Config, Environment
from ldm3d.sections import DdpmSchedule, RFlowSchedule

INTRODUCTION = """\
# Configuration, key by key

A run reads two JSON files: a training config (`-c`) and an environment file (`-e`). This page lists every key of both
with type, default, unit and effect. It is made from the code (`python -m ldm3d.config_page > docs/CONFIG.md`), as is
`config/schema.json`, with which an editor completes and checks a config that begins with `"$schema":
"./schema.json"`. Which configs come with the project is in the [README](../README.md#configurations). The settings of
the service, `LDM3D_...`, are in [the service over HTTP](API.md#settings).

- Any key can be replaced for one run: `--set autoencoder_train.lr=5e-5`, section and key with a dot between them.
- `"@name"` stands for the value of the top-level key `name`. Any other `$` expression is refused, because it would be
  code.
- Unknown keys, wrong types and values that do not fit together are refused before any data is read.
- Nothing is converted: `2.0` is no integer, `"2"` is no number. `null` means that a key is not set.

## Which keys matter first

Start from the config that is nearest to your machine, and change one thing at a time.

- **Your data:** `channel`, `spacing`, `diffusion_train.patch_size` (what is generated: a whole head must be in it),
  `data.layout`, `data.on_error`.
- **Memory:** `batch_size` and `patch_size` of both trainings, `use_checkpointing`,
  `autoencoder_train.val_patch_size`; `python -m ldm3d.memory` says beforehand what fits. `accumulate_steps` gives
  back the batch that memory took away.
- **Time:** `max_epochs`, `val_interval`, `amp`, `compile`, `data.num_workers`.
- **How good it gets:** first `latent_channels`, `autoencoder_def.channels` and `autoencoder_train.kl_weight`, since
  nothing is generated better than it is reconstructed; then `lr`, `diffusion_def.channels`, `NoiseScheduler.type`,
  `diffusion_train.ema_decay` and `sampling.steps`.
- **When something fails:** `lr`, `max_grad_norm`, `checkpoint_every_minutes`, `ddp_timeout_seconds`.

The rest can stay as it is.

"""

RULES = """\
## What must fit together

Each of these is checked on loading; the message names the key, its value, and what would be right.

- `in_channels` and `out_channels` of `autoencoder_def` equal `image_channels`; those of `diffusion_def`, and
  `autoencoder_def.latent_channels`, equal `latent_channels`. The configs say so with `"@image_channels"` and
  `"@latent_channels"`.
- `attention_levels`, and `num_res_blocks` and `num_head_channels` where they are lists, have one entry for each of
  `channels`; `norm_num_groups` divides every one of `channels`; `num_head_channels` divides the channels of every
  level that has attention.
- `autoencoder_train.patch_size` and `val_patch_size` are divisible by the autoencoder's factor, which is `patchify`
  times 2 for each level after the first; `diffusion_train.patch_size` also by the diffusion network's.
- `beta_start` is smaller than `beta_end`. `sampling.scheduler` belongs to `NoiseScheduler.type`, and `sampling.steps`
  is at most `num_train_timesteps`. `schedule` `cosine` goes with `prediction_type` `v_prediction` only.
- `tracking.mlflow_uri` holds no name or password. `data.datalist` goes with the layouts `list` and `auto`.

"""

OLD_NAMES = """\
## Names of earlier years

Configs of the MONAI tutorial load as they are: these names are translated, with one line in the log, also behind
`--set`. `_target_` may name the networks of `monai` or of the older `generative`; it changes nothing.

| Old name | Today |
| --- | --- |
"""

SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
NAMES = {"integer": "integer", "number": "number", "null": "`null`", "string": "text"}


def config_page() -> str:
    """The whole page."""
    return "".join(
        [
            INTRODUCTION,
            section("The top level of a config", Config),
            *(section(f"`{name}`", model) for name, model in sections()),
            section("The environment file", Environment),
            RULES,
            OLD_NAMES,
            *(f"| `{old}` | `{old.partition('.')[0]}.{new}` |\n" for old, new in OLD_KEYS.items()),
        ]
    )


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections of a config in the order of their keys; the noise has one for each kind."""
    for name, field in Config.model_fields.items():
        if name == "noise_schedule":
            yield f"{field.alias}` with type `ddpm", DdpmSchedule
            yield f"{field.alias}` with type `rflow", RFlowSchedule
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def section(heading: str, model: type[BaseModel]) -> str:
    """Heading, what the model says of itself, and a row for each key."""
    lines = [f"## {heading}", "", inspect.cleandoc(model.__doc__ or ""), ""]
    lines += ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    schema = model.model_json_schema(by_alias=True)
    required = schema.get("required", [])
    for key, value in schema["properties"].items():
        meaning = " ".join(value["description"].split())
        lines.append(f"| `{key}` | {kind(value)} | {default(value, key in required)} | {meaning} |")
    return "\n".join([*lines, "", ""])


def kind(value: dict[str, Any]) -> str:
    """The type of a value and its limits, from its JSON Schema."""
    choices = list(_choices(value))
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if choices[1:] else choices[0]


def _choices(value: dict[str, Any]) -> Iterator[str]:
    if "$ref" in value or "oneOf" in value:
        yield "section"
    elif "anyOf" in value:
        for choice in value["anyOf"]:
            yield from _choices(choice)
    elif "const" in value or "enum" in value:
        yield from (f"`{json.dumps(choice)}`" for choice in value.get("enum", [value.get("const")]))
    elif "prefixItems" in value:
        yield f"{len(value['prefixItems'])} x {kind(value['prefixItems'][0])}"
    elif value["type"] == "array":
        yield f"list of: {kind(value['items'])}"
    elif value["type"] == "boolean":
        yield from ("`true`", "`false`")
    else:
        name = "path" if value.get("format") == "path" else NAMES[value["type"]]
        limits = ", ".join(f"{sign} {value[limit]}" for limit, sign in SIGNS.items() if limit in value)
        yield f"{name} {limits}".strip()


def default(value: dict[str, Any], is_required: bool) -> str:
    """What a key is where the file does not have it."""
    if is_required:
        return "required"
    if isinstance(value["default"], dict):
        return "its keys' defaults"
    return f"`{json.dumps(value['default'])}`"


if __name__ == "__main__":
    print(config_page(), end="")
