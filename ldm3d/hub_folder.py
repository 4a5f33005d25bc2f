"""A folder of published weights in the form of the Hugging Face Hub: model card, config.json, safetensors."""

import json
import re
from pathlib import Path
from typing import Any

from ldm3d.export_facts import NOT_STATED, WARNING, Facts
from ldm3d.files import write_text

CONFIG, ENVIRONMENT = "config.json", "environment.json"
TAGS = ["3d", "brain", "generative", "latent-diffusion", "medical", "monai", "mri"]
TASK = "unconditional-image-generation"
# What generating takes; the rest of a config is about data, tracking and machines of those who trained.
KEPT = {
    "channel",
    "spacing",
    "spatial_dims",
    "image_channels",
    "latent_channels",
    "autoencoder_def",
    "autoencoder_train",
    "diffusion_def",
    "diffusion_train",
    "noise_schedule",
    "sampling",
    "amp",
}
PATHS = {"model_dir": ".", "output_dir": "volumes", "tfevent_path": "runs", "data_base_dir": "data"}


def write_hub_folder(folder: Path, facts: Facts) -> None:
    """Write all of a model's folder but the weights. Raises `OutputError` where `folder` cannot be written."""
    config = facts.config.model_dump(mode="json", by_alias=True, include=KEPT)
    del config["autoencoder_train"]["perceptual_weights"]  # a path of those who trained
    for name, content in {CONFIG: config, ENVIRONMENT: PATHS}.items():
        write_text(folder / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(folder / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    write_text(folder / "README.md", model_card(facts))


def model_card(facts: Facts) -> str:
    # JSON is YAML too, and needs no rules of its own for what must stand in quotes. But YAML joins no \u escapes to one
    # letter, as JSON does beyond the first 65,536.
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front_matter(facts).items())
    return f"""---
{front}
---

# {facts.name}

{facts.summary}.

{WARNING}

{facts.table()}

## Use

With the package `ldm3d` installed, in this folder:

```python
from ldm3d.generate import Generator

generator = Generator(".", scheduler="{facts.scheduler}", steps={facts.steps})
print(generator.write("volumes", num=2, seed=0))
```

```bash
ldm3d-inference -c {CONFIG} -e {ENVIRONMENT} --num 2
```

Both write the same volumes: NIfTI with spacing and RAS affine, and a `.json` beside each that says how it was made.
The weights rebuild their networks from their own description; `{CONFIG}` is the configuration that they are used with.

## Figures

{facts.metrics_table()}

## Limits

The model knows the anatomy, the scanners and the preparation of its training volumes and nothing else. What it
generates is not a patient. Look for copies of training volumes before volumes are passed on; finding none is no proof
of privacy.
"""


def front_matter(facts: Facts) -> dict[str, Any]:
    """The metadata that the Hub reads."""
    front: dict[str, Any] = {
        "library_name": "ldm3d",
        "license": "unknown" if facts.stated.license == NOT_STATED else facts.stated.license,
        "pipeline_tag": TASK,
        "tags": TAGS,
    }
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", facts.stated.dataset):  # else it is no name that the Hub knows
        front["datasets"] = [facts.stated.dataset]
    if facts.metrics:
        result = {
            "task": {"type": TASK},
            "dataset": {"name": facts.stated.dataset, "type": "held-out"},
            "metrics": [{"type": name, "name": name, "value": m.value} for name, m in facts.metrics.items()],
        }
        front["model-index"] = [{"name": facts.name, "results": [result]}]
    return front
