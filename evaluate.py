"""Judge generated volumes against real ones: fidelity, sharpness, anatomy, variety, and whether they are copies.

Real volumes of the validation split are the reference, those of the training split are searched for copies. All are
brought to the grid that the diffusion model generates. Writes metrics.json and a report picture beside it.
"""

import argparse
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import utils
from ldm3d import __version__, distributed
from ldm3d.cards import AUTOENCODER
from ldm3d.cases import Case
from ldm3d.config import load_config, load_environment
from ldm3d.console import progress
from ldm3d.copies import TrainingSet, copy_check
from ldm3d.data import Prepared, prepare_data
from ldm3d.errors import ConfigError, DataError, WeightsError
from ldm3d.files import require_writable, write_text
from ldm3d.interior import interior
from ldm3d.metrics import diversity, fidelity, mean_of, reconstruction
from ldm3d.nifti import read_volume, spacing_of, stem_of
from ldm3d.report import Report, Volumes, draw_report
from ldm3d.schema import Config
from ldm3d.training import Precision
from ldm3d.volumes import crop_or_pad, resample
from ldm3d.weights import check_definition, load_autoencoder

RANGE_TOLERANCE = 1e-3


def main() -> None:
    args = parse()
    cfg, env = load_config(args.config_file, args.set), load_environment(args.environment_file)
    picture = report_picture(args.output)
    if args.real:
        env = env.model_copy(update={"data_base_dir": args.real})
    synthetic = synthetic_volumes(args.synthetic, cfg, args.limit)
    prepared = prepare_data(cfg, env, remember_split=False)
    training = real_volumes(prepared, prepared.split.train, cfg)
    held_out = prepared.split.validation[: args.limit]
    reference = real_volumes(prepared, held_out, cfg)
    report = Report()
    reconstructed = reconstruct(report, env.model_dir, reference, cfg)
    judge(report, training, reference, synthetic, reconstructed)
    copies = report.attempt("copies", partial(find_copies, report, training, reference, synthetic))
    draw_report(picture, cfg.spacing, training, reference, reconstructed, synthetic, copies)
    digests = {"training": prepared.digest(), "reference": prepared.digest(held_out)}
    write(args, cfg, report, training, reference, synthetic, copies, digests)
    print(report.table())
    print(f"{args.output}\n{picture}")


def parse() -> argparse.Namespace:
    parser = utils.script_parser(__doc__)
    parser.add_argument("-c", "--config-file", type=Path, required=True, help="the training configuration")
    parser.add_argument("-e", "--environment-file", type=Path, default=Path("config/environment.json"))
    parser.add_argument("--real", type=Path, help="folder of the real volumes (if not given: data_base_dir)")
    parser.add_argument("--synthetic", type=Path, required=True, help="folder of generated volumes, .nii.gz or .nii")
    parser.add_argument("--output", type=Path, default=Path("metrics.json"), help="the picture goes beside it")
    parser.add_argument("--limit", type=positive, help="use at most so many generated and so many reference volumes")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key of the config")
    return parser.parse_args()


def report_picture(output: Path) -> Path:
    """Where the picture goes; both places are tried now, not after the work."""
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: must end with .json; the picture goes beside it")
    require_writable(output.parent)
    return output.with_suffix(".png")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def real_volumes(prepared: Prepared, cases: Sequence[Case], cfg: Config) -> Volumes:
    """Prepared volumes, cut or padded to the grid that is generated."""
    size = cfg.diffusion_train.patch_size
    return Volumes([case.name for case in cases], lambda i: crop_or_pad(prepared.cache.load(cases[i]), size))


def synthetic_volumes(folder: Path, cfg: Config, limit: int | None) -> Volumes:
    """Generated volumes in the order of their numbers. Raises `DataError` where there are none."""
    # `synimg_1_10` comes after `synimg_1_2`: numbers in names are compared as numbers.
    in_order = lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]  # noqa: E731
    # Hidden files are no volumes: macOS' attributes, and what a killed run had begun to write.
    names = [path for path in folder.glob("[!.]*") if path.name.endswith((".nii", ".nii.gz"))]
    found = sorted(names, key=in_order)[:limit]
    if not found:
        raise DataError(f"{folder}: has no .nii.gz or .nii files; generate some with inference.py")
    return Volumes([stem_of(path) for path in found], lambda i: read_synthetic(found[i], cfg))


def read_synthetic(path: Path, cfg: Config) -> np.ndarray:
    """(X, Y, Z) in [0, 1] on the grid that is generated; intensities are judged as they are, never rescaled."""
    volume, affine = read_volume(path)
    low, high = float(volume.min()), float(volume.max())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # NaN is refused too
        raise DataError(f"{path}: values run from {low:g} to {high:g}; generated volumes must be in [0, 1]")
    return crop_or_pad(resample(volume, spacing_of(affine), cfg.spacing), cfg.diffusion_train.patch_size)


def reconstruct(report: Report, model_dir: Path, reference: Volumes, cfg: Config) -> list[np.ndarray] | None:
    """What the autoencoder makes of the reference volumes, without sampling; None where there is no autoencoder."""
    if not (model_dir / AUTOENCODER).is_file():
        report.skip("reconstruction", f"there is no {model_dir / AUTOENCODER}")
        return None
    autoencoder, card = load_autoencoder(model_dir)
    check_definition(model_dir / AUTOENCODER, card.definition, cfg.autoencoder_def, "autoencoder_def")
    if (card.spacing, card.channel) != (cfg.spacing, cfg.channel):
        raise WeightsError(
            f"{model_dir / AUTOENCODER}: was trained on channel {card.channel} at {list(card.spacing)} mm; "
            f"the config says channel {cfg.channel} at {list(cfg.spacing)} mm"
        )
    device = distributed.choose_device()
    autoencoder.to(device)
    precision, results = Precision(cfg.amp, device), []
    for volume in progress(reference, "reconstructing", unit="volume"):
        with torch.inference_mode(), precision.autocast():
            image = autoencoder.reconstruct(torch.from_numpy(volume)[None, None].to(device))
        results.append(image[0, 0].float().clamp(0, 1).cpu().numpy())
    return results


def judge(
    report: Report, training: Volumes, reference: Volumes, synthetic: Volumes, reconstructed: list[np.ndarray] | None
) -> None:
    if reconstructed:
        report.add("reconstruction", lambda: reconstruction(reference, reconstructed))
    report.add("fidelity", lambda: fidelity(reference, synthetic, reconstructed, mean_of(training)))
    report.add("interior", lambda: interior(reference, synthetic, reconstructed))
    report.add("diversity", lambda: diversity(reference, synthetic))


def find_copies(report: Report, training: Volumes, reference: Volumes, synthetic: Volumes) -> list[dict[str, Any]]:
    metric, samples = copy_check(TrainingSet(training), training.names, synthetic, synthetic.names, reference)
    report.metrics["copies"] = metric
    return samples


def write(
    args: argparse.Namespace,
    cfg: Config,
    report: Report,
    training: Volumes,
    reference: Volumes,
    synthetic: Volumes,
    copies: list[dict[str, Any]] | None,
    digests: dict[str, str],
) -> None:
    content = {
        "made": {
            "code_version": __version__,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": str(args.config_file),
            "overrides": args.set,
            "channel": cfg.channel,
            "spacing_mm": cfg.spacing,
            "size": cfg.diffusion_train.patch_size,
            "digests": digests,
        },
        "metrics": report.metrics,
        "skipped": report.skipped,
        "nearest_training_volumes": copies,
        "volumes": {"training": len(training), "reference": reference.names, "synthetic": synthetic.names},
    }
    write_text(args.output, json.dumps(content, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    utils.run_script(main)
