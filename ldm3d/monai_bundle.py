"""A MONAI bundle of published weights: https://docs.monai.io/en/latest/mb_specification.html.

It carries this package's code, so it runs where only torch, monai and the packages of its metadata are.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm3d import __version__
from ldm3d.entry_points import SCRIPTS
from ldm3d.export_facts import WARNING, Facts
from ldm3d.files import write_text

MODELS = "models"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
# What the code imports to generate (einops by way of monai's attention), and monai.bundle's command line.
PACKAGES = ("einops", "filelock", "nibabel", "pydantic", "safetensors", "tqdm")
FIRE = "0.7.1"


def write_monai_bundle(folder: Path, facts: Facts) -> None:
    """Write all of a bundle but its `models`. Raises `OutputError` where `folder` cannot be written."""
    code = Path(__file__).parent
    (folder / code.name).mkdir()
    for source in code.glob("*.py"):
        shutil.copyfile(source, folder / code.name / source.name)
    shutil.copyfile(SCRIPTS / "LICENSE", folder / "LICENSE")
    for name, content in {"metadata.json": metadata(facts), "inference.json": inference(facts)}.items():
        write_text(folder / "configs" / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(folder / "docs" / "README.md", readme(facts))


def metadata(facts: Facts) -> dict[str, Any]:
    """What MONAI asks of `configs/metadata.json`."""
    card = facts.diffusion
    image = {"format": "image", "dtype": "float32", "is_patch_data": False}
    noise = image | {
        "type": "noise",
        "num_channels": card.latent_shape[0],
        "spatial_shape": card.latent_shape[1:],
        "value_range": [-8, 8],
    }
    volume = image | {
        "type": "image",
        "num_channels": 1,
        "spatial_shape": facts.volume_shape,
        "value_range": card.intensity_range,
        "channel_def": {"0": facts.contrast},
    }
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"exported by ldm3d {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in PACKAGES} | {"fire": FIRE},
        "name": facts.name,
        "task": "Unconditional generation of 3D brain MRI",
        "description": facts.summary,
        "authors": facts.stated.authors,
        "copyright": f"code: MIT, see LICENSE; weights: {facts.stated.license}",
        "data_source": facts.stated.dataset,
        "data_type": "nibabel",
        "image_classes": facts.contrast,
        "eval_metrics": {name: metric.value for name, metric in facts.metrics.items()},
        "intended_use": WARNING,
        "network_data_format": {"inputs": {"image": noise}, "outputs": {"pred": volume}},
    }


def inference(facts: Facts) -> dict[str, Any]:
    """The config that `monai.bundle run` follows; each key can be replaced on the command line."""
    sampling = facts.config.sampling
    return {
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/volumes'",
        "num": 4,
        "seed": 0,
        "scheduler": facts.scheduler,
        "steps": facts.steps,
        "batch_size": sampling.batch_size,
        "dtype": "float32",
        "device": None,
        "network_def": {
            "_target_": "ldm3d.generate.Generator",
            "model_dir": f"$@bundle_root + '/{MODELS}'",
            "scheduler": "@scheduler",
            "steps": "@steps",
            "device": "@device",
            "amp": facts.config.amp,
            "decode_gib": sampling.decode_gib,
        },
        "run": ["$@network_def.write(@output_dir, @num, @seed, @batch_size, @dtype)"],
    }


def readme(facts: Facts) -> str:
    packages = " ".join(f"{name}=={wanted}" for name, wanted in metadata(facts)["required_packages_version"].items())
    return f"""# {facts.name}

{facts.summary}. A MONAI bundle: weights, and the code that they need.

{WARNING}

{facts.table()}

## Generating volumes

With Python 3.11 to 3.13, in this folder:

```bash
pip install torch monai=={version("monai")} {packages}
python -m monai.bundle run --config_file configs/inference.json
python -m monai.bundle run --config_file configs/inference.json --seed 7 --num 2 --steps 10 --output_dir elsewhere
```

Volumes are in `volumes`, as NIfTI with spacing and RAS affine, with a `.json` beside each that says how it was made.
The same seed gives the same volumes, whatever the `batch_size`; they are those of the project's own `inference.py`.
From another folder, add `--bundle_root` with the path of this one. `--device cpu` leaves a GPU alone.

In Python:

```python
from monai.bundle import ConfigWorkflow

workflow = ConfigWorkflow("configs/inference.json", num=1, seed=3, workflow_type=None)
workflow.initialize()
workflow.run()
workflow.finalize()
```

`network_def` is U-Net, sampler and decoder in one: noise goes in, volumes come out.

## Figures

{facts.metrics_table()}
"""
