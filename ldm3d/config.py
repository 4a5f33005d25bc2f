"""Read configuration files: references, old names, `--set`, and errors that say what would be right.

Nothing in a configuration is ever executed: `@name` and `$@name` stand for another key's value, any
other `$` expression is refused.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ldm3d.console import log
from ldm3d.errors import ConfigError
from ldm3d.schema import Config, Environment

Model = TypeVar("Model", bound=BaseModel)

# The tutorial's names of earlier years, at their place in the file.
OLD_KEYS = {
    "autoencoder_def.num_channels": "channels",
    "diffusion_def.num_channels": "channels",
    "discriminator_def.num_channels": "channels",
    "autoencoder_train.n_epochs": "max_epochs",
    "diffusion_train.n_epochs": "max_epochs",
    "autoencoder_train.autoencoder_warm_up_n_epochs": "adv_warm_up_epochs",
}
TARGETS = {"autoencoder_def": "AutoencoderKL", "diffusion_def": "DiffusionModelUNet"}
KNOWN_PACKAGES = ("monai.networks.nets", "generative.networks.nets")
REFERENCE = r"\$?@(\w+)"
# Below this a KL weight can only be meant for the tutorial's sum over the whole latent.
SMALLEST_MEAN_KL_WEIGHT = 1e-6


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, translate and check a training configuration.

    Args:
        path: JSON file.
        overrides: `a.b=value` settings that replace what the file says; values are JSON, else text.

    Raises:
        ConfigError: naming file, key, value and what would be right.
    """
    path = Path(path)
    raw = _read_json(path)
    raw.pop("$schema", None)
    # Before the overrides too, so that they meet the new names, whichever the file uses.
    _translate_old_names(raw, path)
    for override in overrides:
        _apply_override(raw, override)
    raw = _resolve(raw, raw, str(path), "")
    _translate_old_names(raw, path)
    cfg = _validate(Config, raw, path)
    _warn_of_summed_kl(cfg)
    return cfg


def load_environment(path: str | Path) -> Environment:
    """Read the environment file. Raises `ConfigError` as `load_config` does."""
    return _validate(Environment, _read_json(Path(path)), Path(path))


def config_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of configuration files, for editors; `config/schema.json` holds it."""
    schema = Config.model_json_schema(by_alias=True)
    reference = {"type": "string", "pattern": f"^{REFERENCE}$", "description": "the value of another key"}
    for model in [*schema["$defs"].values(), schema]:
        for name, prop in model.get("properties", {}).items():
            if "$ref" not in prop and "discriminator" not in prop and name != "type":
                described = {key: prop.pop(key) for key in ("description", "default", "title") if key in prop}
                model["properties"][name] = {**described, "anyOf": [prop, reference]}
    for section, name in (("AutoencoderDef", "AutoencoderKL"), ("DiffusionDef", "DiffusionModelUNet")):
        target = {"description": "The class that is built; may be left out.", "const": f"{KNOWN_PACKAGES[0]}.{name}"}
        schema["$defs"][section]["properties"]["_target_"] = target
    schema["properties"]["$schema"] = {"description": "This file, for editors.", "type": "string"}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # Editors on Windows put a byte-order mark first, which "utf-8-sig" passes over.
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except _DuplicateKey as error:
        raise ConfigError(f"{path}: key {error} stands twice") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested as deep
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(raw).__name__}")
    return raw


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(repr(key))
        result[key] = value
    return result


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: must have the form a.b=value")
    *sections, last = key.split(".")
    last = OLD_KEYS.get(key, last)
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {section} has no keys of its own")
    try:
        target[last] = json.loads(text)
    except (ValueError, RecursionError):
        target[last] = text


def _resolve(value: Any, root: dict[str, Any], file: str, place: str, seen: tuple[str, ...] = ()) -> Any:
    """Replace `@name` by the value of the top-level key `name`."""
    if isinstance(value, dict):
        return {key: _resolve(item, root, file, f"{place}.{key}".lstrip("."), seen) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, file, place, seen) for item in value]
    if not isinstance(value, str) or not value.startswith(("@", "$")):
        return value
    reference = re.fullmatch(REFERENCE, value)
    if not reference:
        raise ConfigError(
            f"{file}: {place}: {value!r} is an expression; configurations may only refer to keys, as @name"
        )
    name = reference[1]
    if name not in root:
        raise ConfigError(f"{file}: {place}: {value!r} refers to {name!r}, which the file does not have")
    if name in seen:
        raise ConfigError(f"{file}: {place}: {value!r} refers to itself")
    return _resolve(root[name], root, file, place, (*seen, name))


def _translate_old_names(raw: dict[str, Any], path: Path) -> None:
    translated = []
    for place, new in OLD_KEYS.items():
        section, old = place.split(".")
        values = raw.get(section)
        if isinstance(values, dict) and old in values:
            if new in values:
                raise ConfigError(f"{path}: {section} has both {old!r} and its new name {new!r}; keep {new!r}")
            values[new] = values.pop(old)
            translated.append(f"{place} -> {new}")
    for section, name in TARGETS.items():
        if isinstance(raw.get(section), dict):
            translated += _drop_target(raw[section], section, name, path)
    schedule = raw.get("NoiseScheduler")
    if isinstance(schedule, dict):
        schedule.setdefault("type", "ddpm")
    if translated:
        log(f"{path}: old names translated: {', '.join(translated)}")


def _drop_target(values: dict[str, Any], section: str, name: str, path: Path) -> list[str]:
    """`_target_` names the class that this section builds anyway; check it and take it out."""
    target = values.pop("_target_", None)
    known = [f"{package}.{name}" for package in KNOWN_PACKAGES]
    if target is None or target == known[0]:
        return []
    if target not in known:
        raise ConfigError(f"{path}: {section}._target_: {target!r} is not known; it must be {known[0]!r} or left out")
    return [f"{target} -> {known[0]}"]


def _validate(model: type[Model], raw: dict[str, Any], path: Path) -> Model:
    try:
        # From JSON, because strict validation takes lists for tuples and text for paths only there.
        return model.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems = [_problem(model, problem) for problem in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(dict.fromkeys(problems))) from None


# pydantic names the kind of schedule, and each type that a value could have, as if they were keys.
_TYPE_IN_LOCATION = re.compile(r"ddpm|rflow|constrained-\w+|tuple\[.*\]")


def _problem(model: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"] if not _TYPE_IN_LOCATION.fullmatch(str(part))]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], _keys_at(model, location[:-1]), n=1)
        return f"{key}: no such key" + (f"; did you mean {close[0]!r}?" if close else "")
    if problem["type"] == "missing":
        return f"{key}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {problem['input']!r}: {message}" if key else message


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the keys that stand at a place of the configuration."""
    for part in location:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        if field is None:
            continue
        choices = [field.annotation, *get_args(field.annotation)]
        models = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        if models:
            return list(dict.fromkeys(key for m in models for key in _keys_at(m, ())))
    return [field.alias or name for name, field in model.model_fields.items()]


def _warn_of_summed_kl(cfg: Config) -> None:
    weight = cfg.autoencoder_train.kl_weight
    if 0 < weight < SMALLEST_MEAN_KL_WEIGHT:
        voxels = [n // cfg.autoencoder_def.downsampling for n in cfg.autoencoder_train.patch_size]
        elements = cfg.latent_channels * voxels[0] * voxels[1] * voxels[2]
        log(
            f"warning: autoencoder_train.kl_weight {weight:g} looks like the MONAI tutorial's, whose KL is a sum over "
            f"the latent; here it is a mean: the same strength would be {weight * elements:.2g}"
        )


if __name__ == "__main__":
    # python -m ldm3d.config > config/schema.json
    print(json.dumps(config_schema(), indent=2))
