"""Make the reference profile of weights that were trained before training wrote one.

python -m mlops.monitoring.make_profile -c config/config_demo.json -e config/environment_sample.json

Measures the data that the weights in `model_dir` were trained on and writes `reference_profile.json` beside them.
`--set` replaces a key of the config, as with the scripts.
"""

from pathlib import Path

import torch

from ldm3d import distributed
from ldm3d.cache import VolumeCache
from ldm3d.cards import AUTOENCODER, AutoencoderCard, read_card
from ldm3d.cases import cache_folder, find_cases
from ldm3d.config import load_config, load_environment
from ldm3d.data import PatchDataset, Prepared
from ldm3d.errors import DataError
from ldm3d.files import sha256
from ldm3d.latents import build_latent_cache
from ldm3d.reference_profile import FILE, write_profile
from ldm3d.schema import Config, Environment
from ldm3d.splits import split_cases
from ldm3d.training_profile import training_profile, with_latents
from ldm3d.weights import load_autoencoder
from mlops.commands import Parser, run_command


def main() -> int:
    parser = Parser(prog="python -m mlops.monitoring.make_profile", description=__doc__)
    parser.add_argument("-c", "--config-file", type=Path, required=True, help="configuration of the training")
    parser.add_argument("-e", "--environment-file", type=Path, required=True, help="names model_dir and data_base_dir")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="replace a key of the config")
    args = parser.parse_args()
    cfg, env = load_config(args.config_file, args.set), load_environment(args.environment_file)
    card = read_card(env.model_dir / AUTOENCODER, AutoencoderCard)
    data = prepared(cfg, env)
    if data.digest() != card.trained_on:
        raise DataError(
            f"{env.data_base_dir}: these are not the data that {env.model_dir / AUTOENCODER} was trained on: their "
            f"digest is {data.digest()}, that of the weights {card.trained_on}; the config, the data and "
            "model_dir's split.json must be those of the training"
        )
    profile = training_profile(cfg, data, env.model_dir)
    volumes = PatchDataset(data.cache, data.split.train, cfg.diffusion_train.patch_size)
    contents = [data.cache.key(case) for case in data.split.train]
    autoencoder, _ = load_autoencoder(env.model_dir)
    digest = sha256(env.model_dir / AUTOENCODER)
    root, device = cfg.data.latents_dir or cache_folder(env.data_base_dir, cfg.data), distributed.choose_device()
    # The very cache that stage 2 makes or has made.
    flip = cfg.diffusion_train.flip
    cache = build_latent_cache(root, autoencoder.to(device), digest, volumes, contents, flip, torch.device(device))
    write_profile(env.model_dir, with_latents(profile, cache, digest))
    print(env.model_dir / FILE)
    return 0


def prepared(cfg: Config, env: Environment) -> Prepared:
    """The data and their split, which is read where the training has kept it and else made anew, but not stored."""
    cache = VolumeCache(cache_folder(env.data_base_dir, cfg.data), cfg.spacing)
    cases = cache.build(find_cases(env.data_base_dir, cfg.data, cfg.channel), cfg.data.on_error)
    kept = env.model_dir / "split.json"
    split = split_cases(cases, cfg.data.val_fraction, cfg.data.split_seed, kept if kept.is_file() else None)
    return Prepared(split, cache)


if __name__ == "__main__":
    run_command(main)
