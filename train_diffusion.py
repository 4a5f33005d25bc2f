"""Stage 2: train the diffusion model that learns the autoencoder's latents.

python train_diffusion.py -c config/config_train_16g.json -e config/environment.json
"""

from dataclasses import dataclass
from typing import Any

import torch

import utils
from ldm3d import distributed
from ldm3d.cards import AUTOENCODER, AutoencoderCard
from ldm3d.cases import cache_folder
from ldm3d.console import log
from ldm3d.data import EpochSampler, Key, PatchDataset, Prepared, prepare_data
from ldm3d.diffusion_stage import Batch, DiffusionStage
from ldm3d.files import sha256
from ldm3d.latents import LatentCache, build_latent_cache
from ldm3d.memory_advice import warn_if_too_large
from ldm3d.montage import tensorboard_image
from ldm3d.networks import count_parameters
from ldm3d.outside import warn_if_cut_off
from ldm3d.progress import EpochLog, Position, rounded
from ldm3d.randomness import StepRandom
from ldm3d.replay import kept_for_replay, replay
from ldm3d.run import Run
from ldm3d.sampling import Sampler
from ldm3d.schema import Config
from ldm3d.training_profile import training_profile, with_latents
from ldm3d.weights import check_definition, load_autoencoder

# Of the volumes generated for TensorBoard: always the same noise, so that pictures of different epochs compare.
PREVIEW_SEED, PREVIEW_VOLUMES = 0, 2


@dataclass
class Latents:
    """What stage 1 left: the autoencoder, and the latents of both sides of the split."""

    autoencoder: Any
    train: LatentCache
    validation: LatentCache
    facts: dict[str, Any]


def main() -> None:
    args = utils.training_parser(__doc__).parse_args()
    cfg, env = utils.read_settings(args)
    with utils.training_run(cfg, env, args, "diffusion") as run:
        warn_if_too_large(cfg, "diffusion", run.device)
        autoencoder, card = load_autoencoder(env.model_dir)
        check_definition(env.model_dir / AUTOENCODER, card.definition, cfg.autoencoder_def, "autoencoder_def")
        data = prepare_data(cfg, env, remember_split=not args.dry_run)
        warn_if_cut_off(cfg, data)
        latents = encode(autoencoder, card, data, run)
        run.fingerprint = fingerprint(cfg, latents.facts)
        volumes_a_step = cfg.diffusion_train.batch_size * cfg.diffusion_train.accumulate_steps
        sampler = EpochSampler(len(latents.train), volumes_a_step, cfg.seed)
        statistics = latents.train.statistics(cfg.diffusion_train.center_latents)
        stage = DiffusionStage(cfg, run.device, cfg.diffusion_train.max_epochs * len(sampler), statistics)
        if args.replay:
            replay(args.replay, stage)
        else:
            position = begin(stage, run, len(sampler))
            announce(stage, latents, run)
            if args.dry_run:
                dry_run(stage, latents, sampler, run)
            else:
                with run.writing():
                    profile = training_profile(cfg, data, env.model_dir)
                    run.profile = with_latents(profile, latents.train, latents.facts["autoencoder_sha256"])
                    fit(stage, latents, sampler, run, position)


def encode(autoencoder: Any, card: AutoencoderCard, data: Prepared, run: Run) -> Latents:
    """Latents of the middle `patch_size` of every volume, from the cache where they were made before."""
    cfg, env = run.cfg, run.env
    autoencoder = autoencoder.to(run.device)
    digest = sha256(env.model_dir / AUTOENCODER)
    caches = []
    for cases, flip in ((data.split.train, cfg.diffusion_train.flip), (data.split.validation, False)):
        volumes = PatchDataset(data.cache, cases, cfg.diffusion_train.patch_size)
        contents = [data.cache.key(case) for case in cases]
        root = cfg.data.latents_dir or cache_folder(env.data_base_dir, cfg.data)
        caches.append(build_latent_cache(root, autoencoder, digest, volumes, contents, flip, run.device))
    facts = {
        "trained_on": data.digest(),
        "num_train": len(data.split.train),
        "channel": card.channel,
        "spacing": card.spacing,
        "autoencoder_sha256": digest,
    }
    return Latents(autoencoder, caches[0], caches[1], facts)


def fingerprint(cfg: Config, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "diffusion_def": cfg.diffusion_def.model_dump(),
        "NoiseScheduler": cfg.noise_schedule.model_dump(),
        "diffusion_train": cfg.diffusion_train.model_dump(exclude={"max_epochs", "sample_interval"}),
        "seed": cfg.seed,
        "processes": distributed.world_size(),
        "trained_on": facts["trained_on"],
        "autoencoder_sha256": facts["autoencoder_sha256"],
    }


def begin(stage: DiffusionStage, run: Run, steps_per_epoch: int) -> Position:
    """Resume, or start with given weights, or start fresh."""
    if run.resume:
        return run.load(stage, steps_per_epoch)
    if run.init_from:
        stage.start_from(run.init_from)
        log(f"going on from the weights in {run.init_from}")
    return Position()


def announce(stage: DiffusionStage, latents: Latents, run: Run) -> None:
    shape = "x".join(map(str, run.cfg.latent_shape))
    log(
        f"diffusion: {count_parameters(stage.unet) / 1e6:.2f} M parameters on {run.device}, "
        f"{distributed.world_size()} process(es); {len(latents.train)} training and {len(latents.validation)} "
        f"validation latents {shape}; scale factor {stage.statistics.scale_factor:.4f}"
    )
    run.tracker.text("config", f"```json\n{run.cfg.model_dump_json(indent=2, by_alias=True)}\n```")


def dry_run(stage: DiffusionStage, latents: Latents, sampler: EpochSampler, run: Run) -> None:
    terms = stage.train_step(*drawn(latents, next(iter(sampler)), 0, run))
    log(f"dry run: one step {rounded(terms)}")


def fit(stage: DiffusionStage, latents: Latents, sampler: EpochSampler, run: Run, position: Position) -> None:
    """Every epoch: train, now and then validate, publish what is best. `run.pause` saves what the next step needs."""
    train = run.cfg.diffusion_train
    if run.begins_with_a_candidate(position):
        # What it starts with is the first candidate: a training that makes it worse publishes nothing.
        judge(stage, latents, run, position)
    while position.epoch < train.max_epochs:
        epoch_log = train_one_epoch(stage, latents, sampler, run, position)
        epoch, last = position.epoch + 1, position.epoch + 1 == train.max_epochs
        validation = judge(stage, latents, run, position) if epoch % train.val_interval == 0 or last else {}
        if train.sample_interval and epoch % train.sample_interval == 0:
            preview(stage, latents, run, position)
        position.epoch = epoch
        epoch_log.report(validation, stage.optimizer.learning_rate)
    run.save(stage, position)


def train_one_epoch(
    stage: DiffusionStage, latents: Latents, sampler: EpochSampler, run: Run, position: Position
) -> EpochLog:
    """The rest of the epoch from `position.step` on."""
    epoch_log = EpochLog(position, run.cfg.diffusion_train.max_epochs, len(sampler), run.device, run.tracker)
    sampler.set_epoch(position.epoch, epoch_log.first)
    for keys in epoch_log.watch(sampler):
        with epoch_log.waiting():
            batch, random = drawn(latents, keys, position.step, run)
        with kept_for_replay(run.env.model_dir, stage, batch, random):
            values = stage.train_step(batch, random)
        epoch_log.add(values, len(keys) * distributed.world_size())
        position.step += 1
        run.pause(stage, position)
    return epoch_log


def drawn(latents: Latents, keys: list[Key], step: int, run: Run) -> tuple[Batch, StepRandom]:
    """Fresh draws from the posteriors of a step's volumes, and what else the step draws."""
    random = StepRandom(run.cfg.seed, step, len(keys), run.device)
    indices = [visit % len(latents.train) for _, visit in keys]
    latent = latents.train.sample(indices, random, run.cfg.diffusion_train.flip)
    return {"latent": latent, "case": [latents.train.cases[i] for i in indices]}, random


def judge(stage: DiffusionStage, latents: Latents, run: Run, position: Position) -> dict[str, float]:
    """Validate; publish the weights if no earlier ones were as good."""
    losses = stage.validate(latents.validation, run.going_on)
    run.pause(stage, position)
    run.tracker.scalars("validation", losses, position.step)
    if losses["loss"] < position.best:
        position.best = losses["loss"]
        stage.publish(run.env.model_dir, {**latents.facts, "step": position.step}, losses)
        run.publish_profile()
    return losses


def preview(stage: DiffusionStage, latents: Latents, run: Run, position: Position) -> None:
    """Generated volumes in three planes, for TensorBoard."""
    cfg = run.cfg
    if not distributed.is_main():
        return
    card = stage.card({**latents.facts, "step": position.step}, {})
    sampler = Sampler(
        latents.autoencoder,
        stage.ema.network,
        stage.statistics,
        card,
        run.device,
        cfg.amp,
        decode_gib=cfg.sampling.decode_gib,
    )
    volumes: torch.Tensor = sampler.sample(
        PREVIEW_SEED, range(PREVIEW_VOLUMES), cfg.sampling.scheduler, cfg.sampling.steps
    )
    picture = tensorboard_image(volumes[0, 0], volumes[1, 0], cfg.spacing)
    run.tracker.image("generated", picture, position.step)


if __name__ == "__main__":
    utils.run_script(main, "interrupted; go on with --resume")
