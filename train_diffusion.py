"""Stage 2: train the diffusion model that learns the autoencoder's latents.

python train_diffusion.py -c config/config_train_16g.json -e config/environment.json
"""

from dataclasses import dataclass
from typing import Any

import torch

import utils
from ldm3d import distributed
from ldm3d.checkpoint import load_state, save_state
from ldm3d.console import log, progress
from ldm3d.data import EpochSampler, PatchDataset, Prepared, cache_folder, prepare_data
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.files import sha256
from ldm3d.latents import LatentCache, build_latent_cache
from ldm3d.memory_advice import warn_if_too_large
from ldm3d.montage import tensorboard_image
from ldm3d.networks import count_parameters
from ldm3d.progress import EpochLog, Position, rounded
from ldm3d.sampling import Sampler
from ldm3d.schema import Config
from ldm3d.training import seed_step
from ldm3d.weights import AUTOENCODER, AutoencoderCard, check_definition, load_autoencoder

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
        latents = encode(autoencoder, card, prepare_data(cfg, env), run)
        sampler = EpochSampler(len(latents.train), cfg.diffusion_train.batch_size, cfg.seed)
        statistics = latents.train.statistics(cfg.diffusion_train.center_latents)
        stage = DiffusionStage(cfg, run.device, cfg.diffusion_train.max_epochs * len(sampler), statistics)
        position = begin(stage, latents, run)
        announce(stage, latents, run)
        if args.dry_run:
            dry_run(stage, latents, sampler)
        else:
            with utils.interrupts_noted(run):
                fit(stage, latents, sampler, run, position)


def encode(autoencoder: Any, card: AutoencoderCard, data: Prepared, run: utils.Run) -> Latents:
    """Latents of the middle `patch_size` of every volume, from the cache where they were made before."""
    cfg, env = run.cfg, run.env
    autoencoder = autoencoder.to(run.device)
    digest = sha256(env.model_dir / AUTOENCODER)
    caches = []
    for cases, flip in ((data.split.train, cfg.diffusion_train.flip), (data.split.validation, False)):
        volumes = PatchDataset(data.cache, cases, cfg.diffusion_train.patch_size)
        contents = [data.cache.key(case) for case in cases]
        root = cache_folder(env.data_base_dir, cfg.data)
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


def begin(stage: DiffusionStage, latents: Latents, run: utils.Run) -> Position:
    """Resume, or start with given weights, or start fresh."""
    if run.resume:
        state = load_state(run.last, fingerprint(run.cfg, latents.facts))
        stage.load_state_dict(state["stage"])
        run.tracker.first_step = state["step"] + 1
        return Position(state["epoch"], state["step"], state["best"])
    if run.init_from:
        stage.start_from(run.init_from)
        log(f"going on from the weights in {run.init_from}")
    return Position()


def announce(stage: DiffusionStage, latents: Latents, run: utils.Run) -> None:
    shape = "x".join(map(str, run.cfg.latent_shape))
    log(
        f"diffusion: {count_parameters(stage.unet) / 1e6:.2f} M parameters on {run.device}, "
        f"{distributed.world_size()} process(es); {len(latents.train)} training and {len(latents.validation)} "
        f"validation latents {shape}; scale factor {stage.statistics.scale_factor:.4f}"
    )
    run.tracker.text("config", f"```json\n{run.cfg.model_dump_json(indent=2, by_alias=True)}\n```")


def dry_run(stage: DiffusionStage, latents: Latents, sampler: EpochSampler) -> None:
    indices = [visit % len(latents.train) for _, visit in next(iter(sampler))]
    terms = stage.train_step(latents.train.sample(indices, stage.device), 0, [latents.train.cases[i] for i in indices])
    log(f"dry run: one step {rounded(terms)}")


def fit(stage: DiffusionStage, latents: Latents, sampler: EpochSampler, run: utils.Run, position: Position) -> None:
    """Every epoch: train, now and then validate, publish what is best, save what the next step needs."""
    train = run.cfg.diffusion_train
    marks = fingerprint(run.cfg, latents.facts)
    if run.init_from:
        # What it starts with is the first candidate: a training that makes it worse publishes nothing.
        judge(stage, latents, run, position)
    while position.epoch < train.max_epochs:
        epoch_log = train_one_epoch(stage, latents, sampler, run, position)
        if run.should_stop():
            save_state(run.last, position.state(stage.state_dict(), marks))
            raise KeyboardInterrupt
        position.epoch += 1
        due = position.epoch % train.val_interval == 0 or position.epoch == train.max_epochs
        validation = judge(stage, latents, run, position) if due else {}
        if train.sample_interval and position.epoch % train.sample_interval == 0:
            preview(stage, latents, run, position)
        report(epoch_log, stage, run, position, validation)
        save_state(run.last, position.state(stage.state_dict(), marks))


def report(
    epoch_log: EpochLog, stage: DiffusionStage, run: utils.Run, position: Position, validation: dict[str, float]
) -> None:
    if not epoch_log.volumes:  # stopped between an epoch's last step and its end, resumed here
        return
    averages = epoch_log.averages()
    epoch_log.report(position.epoch, run.cfg.diffusion_train.max_epochs, averages["loss"], validation)
    run.tracker.scalars("train", averages | {"learning_rate": stage.optimizer.learning_rate}, position.step)


def train_one_epoch(
    stage: DiffusionStage, latents: Latents, sampler: EpochSampler, run: utils.Run, position: Position
) -> EpochLog:
    """The rest of the epoch from `position.step` on; stops early, after a whole step, when it is asked to."""
    epoch_log = EpochLog()
    start = position.step - position.epoch * len(sampler)
    sampler.set_epoch(position.epoch, start)
    for keys in progress(sampler, f"epoch {position.epoch + 1}", len(sampler) - start, "step"):
        seed_step(run.cfg.seed, position.step)
        indices = [visit % len(latents.train) for _, visit in keys]
        batch = latents.train.sample(indices, run.device, run.cfg.diffusion_train.flip)
        values = stage.train_step(batch, position.step, [latents.train.cases[i] for i in indices])
        epoch_log.add(values, len(indices) * distributed.world_size())
        position.step += 1
        if run.should_stop():
            break
    return epoch_log


def judge(stage: DiffusionStage, latents: Latents, run: utils.Run, position: Position) -> dict[str, float]:
    """Validate; publish the weights if no earlier ones were as good."""
    losses = stage.validate(latents.validation)
    run.tracker.scalars("validation", losses, position.step)
    if losses["loss"] < position.best:
        position.best = losses["loss"]
        stage.publish(run.env.model_dir, {**latents.facts, "step": position.step}, losses)
    return losses


def preview(stage: DiffusionStage, latents: Latents, run: utils.Run, position: Position) -> None:
    """Generated volumes in three planes, for TensorBoard."""
    cfg = run.cfg
    if not distributed.is_main():
        return
    card = stage.card({**latents.facts, "step": position.step}, {})
    sampler = Sampler(latents.autoencoder, stage.ema.network, stage.statistics, card, run.device, cfg.amp)
    volumes: torch.Tensor = sampler.sample(
        PREVIEW_SEED, range(PREVIEW_VOLUMES), cfg.sampling.scheduler, cfg.sampling.steps
    )
    picture = tensorboard_image(volumes[0, 0], volumes[1, 0], cfg.spacing)
    run.tracker.image("generated", picture, position.step)


if __name__ == "__main__":
    utils.run_script(main, "interrupted; go on with --resume")
