"""Export published weights as a folder for others: a MONAI bundle, or a model for the Hugging Face Hub.

python -m ldm3d.bundle -c config/config_demo.json --model-dir checkpoints/demo --output exported/brains
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard, read_card
from ldm3d.config import load_config
from ldm3d.errors import OutputError, UserError, WeightsError
from ldm3d.export_facts import NOT_STATED, Facts, Stated, read_metrics
from ldm3d.files import require_writable
from ldm3d.hub_folder import write_hub_folder
from ldm3d.monai_bundle import MODELS, write_monai_bundle
from ldm3d.samplers import choose_sampler
from ldm3d.sampling import Sampler
from ldm3d.schema import Config
from ldm3d.weights import check_definition

UNSTATED = Stated()
FORMATS = ("monai", "huggingface")


def export(
    config_file: Path,
    model_dir: Path,
    output: Path,
    form: str = "monai",
    metrics: Path | None = None,
    stated: Stated = UNSTATED,
) -> None:
    """Write a folder that is whole, or none. Of `model_dir` only the two weights files go into it.

    Args:
        config_file: the training configuration of the weights; it says how they are sampled.
        model_dir: folder with the published weights.
        output: the folder, which must not exist yet; its name is the model's.
        form: one of `FORMATS`.
        metrics: what evaluate.py wrote about the weights.
        stated: what else is said of them.

    Raises:
        WeightsError: the weights are missing, damaged, do not belong together, or contradict the configuration.
        ConfigError: the configuration or the metrics cannot be used.
        OutputError: the folder exists, or cannot be written.
    """
    if output.exists():
        raise OutputError(f"{output}: exists already; name another folder, or remove this one")
    require_writable(output.parent)
    cfg = load_config(config_file)
    with whole_folder(output) as folder:
        weights = folder / MODELS if form == "monai" else folder
        weights.mkdir(exist_ok=True)
        # What is checked is what is exported.
        for name in (AUTOENCODER, UNET):
            if not (model_dir / name).is_file():
                raise WeightsError(f"{model_dir / name}: no such weights; train them first, or name their folder")
            shutil.copyfile(model_dir / name, weights / name)
        autoencoder = read_card(weights / AUTOENCODER, AutoencoderCard)
        sampler = checked(weights, model_dir, autoencoder, cfg)
        scheduler, steps = choose_sampler(sampler.card.schedule, cfg.sampling.scheduler, cfg.sampling.steps)
        figures = read_metrics(metrics, sampler.card)
        name = output.resolve().name
        facts = Facts(name, cfg, autoencoder, sampler.card, scheduler, steps, figures, stated)
        (write_monai_bundle if form == "monai" else write_hub_folder)(folder, facts)


def checked(weights: Path, source: Path, autoencoder: AutoencoderCard, cfg: Config) -> Sampler:
    """The weights as they will be used, if they are whole and belong to each other and to the configuration."""
    try:
        sampler = Sampler.from_folder(weights, torch.device("cpu"))
    except WeightsError as error:
        raise WeightsError(str(error).replace(str(weights), str(source))) from error
    card = sampler.card
    check_definition(source / AUTOENCODER, autoencoder.definition, cfg.autoencoder_def, "autoencoder_def")
    check_definition(source / UNET, card.definition, cfg.diffusion_def, "diffusion_def")
    check_definition(source / UNET, card.schedule, cfg.noise_schedule, "NoiseScheduler")
    if (card.channel, card.spacing) != (cfg.channel, cfg.spacing):
        raise WeightsError(
            f"{source / UNET}: was trained on channel {card.channel} at {list(card.spacing)} mm; "
            f"the config says channel {cfg.channel} at {list(cfg.spacing)} mm"
        )
    return sampler


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Give a folder beside `output`; move it there when the block ends well, remove it otherwise.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".tmp-{output.name}-", dir=output.parent) as temporary:
            folder = Path(temporary) / output.name
            folder.mkdir()
            yield folder
            folder.rename(output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ldm3d.bundle",
        description="Export published weights as a folder for others. Exit status: 2 for what cannot be exported.",
    )
    parser.add_argument("-c", "--config-file", type=Path, required=True, help="training configuration of the weights")
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with the published weights")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; its name is the model's")
    parser.add_argument("--format", choices=FORMATS, default="monai", help="what kind of folder (default: monai)")
    parser.add_argument("--metrics", type=Path, help="what evaluate.py wrote about these weights")
    parser.add_argument("--license", default=NOT_STATED, help="licence of the weights, as the Hub names it: mit")
    parser.add_argument("--authors", default=NOT_STATED, help="who made the weights")
    parser.add_argument("--dataset", default=NOT_STATED, help="what the training data are called")
    args = parser.parse_args()
    try:
        stated = Stated(args.license, args.authors, args.dataset)
        export(args.config_file, args.model_dir, args.output, args.format, args.metrics, stated)
    except UserError as error:
        print(f"error: {error.one_line()}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
