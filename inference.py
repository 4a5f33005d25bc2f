"""Stage 3: generate volumes with trained weights.

python inference.py -c config/config_demo.json -e config/environment_demo.json --num 8
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

import utils
from ldm3d import distributed
from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard
from ldm3d.config import load_config, load_environment
from ldm3d.console import log, progress
from ldm3d.data import PatchDataset, on_main, prepare_data
from ldm3d.errors import ConfigError
from ldm3d.files import require_writable
from ldm3d.montage import montage
from ldm3d.nifti import read_volume
from ldm3d.samplers import LARGEST_SEED, choose_sampler
from ldm3d.samples import file_name, write_sample
from ldm3d.sampling import Sampler, VolumeId
from ldm3d.schema import Config, Environment
from ldm3d.tutorial import (
    has_tutorial_weights,
    load_tutorial_autoencoder,
    measured_scale_factor,
    tutorial_sampler,
)
from ldm3d.weights import check_definition, read_weights

Number = TypeVar("Number", int, float)
# Volumes whose latents give the scale factor of weights that do not know theirs.
SCALE_VOLUMES = 16


def main() -> None:
    args = parse()
    cfg, env = load_config(args.config_file, args.set), load_environment(args.environment_file)
    output = args.output or env.output_dir
    with distributed.process_group(cfg.ddp_backend, cfg.ddp_timeout_seconds) as device:
        on_main(lambda: require_writable(output))
        sampler = load_sampler(cfg, env, args.scale_factor, device)
        scheduler, steps = choose_sampler(
            sampler.card.schedule, args.scheduler or cfg.sampling.scheduler, args.steps or cfg.sampling.steps
        )
        batch_size = args.batch_size or cfg.sampling.batch_size
        share = range(distributed.rank(), args.num, distributed.world_size())
        for batch in batches(share, batch_size, steps):
            volumes = sampler.sample(args.seed, batch.indices, scheduler, steps, batch.on_step)
            for index, values in zip(batch.indices, volumes, strict=True):
                volume = VolumeId(args.seed, index)
                write_sample(output / file_name(volume), sampler, volume, values, scheduler, steps, args.dtype)
        distributed.barrier()
        if distributed.is_main():
            draw(output, args.seed, args.num, sampler)


def parse() -> argparse.Namespace:
    parser = utils.config_parser(__doc__)
    parser.add_argument("-n", "--num", type=positive, default=1, help="number of volumes")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same volumes")
    parser.add_argument("--steps", type=positive, help="network evaluations per volume; the config's by default")
    parser.add_argument("--scheduler", help="ddpm, ddim, pndm or rflow, as far as the training allows")
    parser.add_argument("--batch-size", type=positive, help="volumes at once; never changes the result")
    parser.add_argument("--output", type=Path, help="folder for the volumes; output_dir by default")
    parser.add_argument("--dtype", choices=("float32", "int16"), default="float32", help="number type of the files")
    parser.add_argument("--scale-factor", type=positive_float, help="for tutorial weights, which lack theirs")
    return parser.parse_args()


def positive(text: str) -> int:
    return _number(text, int, 1, float("inf"), "a whole number of 1 or more")


def seed(text: str) -> int:
    return _number(text, int, 0, LARGEST_SEED, f"a whole number between 0 and {LARGEST_SEED}")


def positive_float(text: str) -> float:
    return _number(text, float, 1e-12, 1e12, "a positive number")


def _number(text: str, kind: type[Number], least: float, most: float, wanted: str) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if least <= value <= most:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def load_sampler(cfg: Config, env: Environment, scale_factor: float | None, device: torch.device) -> Sampler:
    """Published weights of `model_dir`, or the tutorial's `.pt` files where there are no others."""
    published = (env.model_dir / AUTOENCODER).is_file() or (env.model_dir / UNET).is_file()
    if not published and has_tutorial_weights(env.model_dir):
        return load_tutorial_sampler(cfg, env, scale_factor, device)
    sampler = Sampler.from_folder(env.model_dir, device, cfg.amp, cfg.sampling.decode_gib)
    _, card = read_weights(env.model_dir / AUTOENCODER, AutoencoderCard)
    check_definition(env.model_dir / AUTOENCODER, card.definition, cfg.autoencoder_def, "autoencoder_def")
    check_definition(env.model_dir / UNET, sampler.card.definition, cfg.diffusion_def, "diffusion_def")
    check_definition(env.model_dir / UNET, sampler.card.schedule, cfg.noise_schedule, "NoiseScheduler")
    if scale_factor is not None and abs(scale_factor / sampler.card.scale_factor - 1) > 1e-3:
        raise ConfigError(
            f"--scale-factor {scale_factor}: these weights were trained with {sampler.card.scale_factor:.6g}, which is "
            "stored in them; leave the option out"
        )
    return sampler


def load_tutorial_sampler(cfg: Config, env: Environment, given: float | None, device: torch.device) -> Sampler:
    autoencoder = load_tutorial_autoencoder(env.model_dir, cfg)
    if given is not None:
        log(f"tutorial weights from {env.model_dir}; scale factor {given:g} as given")
        return tutorial_sampler(env.model_dir, cfg, autoencoder, given, device)
    data = prepare_data(cfg, env, remember_split=False)
    cases = data.split.train[:SCALE_VOLUMES]
    volumes = PatchDataset(data.cache, cases, cfg.diffusion_train.patch_size)
    images = (volumes[i]["image"] for i in range(len(cases)))
    measured = measured_scale_factor(autoencoder, images, device)
    log(f"tutorial weights from {env.model_dir}; scale factor {measured:.4g}, measured on {len(cases)} volumes")
    return tutorial_sampler(env.model_dir, cfg, autoencoder, measured, device)


class Batch:
    """Some volumes that are sampled together, and where to report their steps."""

    def __init__(self, indices: Sequence[int], ticks: Iterator[int]):
        self.indices, self.ticks = indices, ticks

    def on_step(self, step: int) -> None:
        next(self.ticks, None)


def batches(share: range, batch_size: int, steps: int) -> Iterator[Batch]:
    """This process's volumes in batches, under one progress bar that counts steps."""
    groups = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    ticks = iter(progress(range(len(groups) * steps + 1), "sampling", unit="step"))
    next(ticks, None)
    for indices in groups:
        yield Batch(indices, ticks)
    next(ticks, None)


def draw(output: Path, seed: int, num: int, sampler: Sampler) -> None:
    names = [file_name(VolumeId(seed, index)) for index in range(num)]
    volumes = [read_volume(output / name)[0] for name in names]
    # Few volumes are shown large, many side by side.
    per_line = 2 if num <= 8 else 4
    montage({f"generated, seed {seed}": volumes}, sampler.card.spacing, output / "montage.png", per_line=per_line)
    print(f"{num} volumes in {output}, picture: {output / 'montage.png'}")


if __name__ == "__main__":
    utils.run_script(main)
