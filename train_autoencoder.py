"""Stage 1: train the autoencoder that squeezes a volume into a small latent.

python train_autoencoder.py -c config/config_train_16g.json -e config/environment.json
"""

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any

import torch

import utils
from ldm3d import distributed
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.console import log
from ldm3d.data import PatchDataset, Prepared, prepare_data, train_loader, validation_loader
from ldm3d.memory_advice import warn_if_too_large
from ldm3d.montage import tensorboard_image
from ldm3d.networks import count_parameters
from ldm3d.progress import EpochLog, Position, rounded
from ldm3d.randomness import StepRandom
from ldm3d.replay import kept_for_replay, replay
from ldm3d.run import Run
from ldm3d.schema import Config
from ldm3d.training_profile import training_profile

# What a good start needs to have seen of the training set.
FIRST_LOOK = 32


def main() -> None:
    args = utils.training_parser(__doc__).parse_args()
    cfg, env = utils.read_settings(args)
    with utils.training_run(cfg, env, args, "autoencoder") as run:
        warn_if_too_large(cfg, "autoencoder", run.device)
        data = prepare_data(cfg, env, remember_split=not args.dry_run)
        facts = describe(cfg, data)
        run.fingerprint = fingerprint(cfg, facts)
        loaders = train_loader(data, cfg, "autoencoder"), validation_loader(data, cfg, "autoencoder")
        stage = AutoencoderStage(cfg, run.device, cfg.autoencoder_train.max_epochs * len(loaders[0]))
        if args.replay:
            replay(args.replay, stage)
        else:
            position = begin(stage, data, run, len(loaders[0]))
            announce(stage, data, run)
            if args.dry_run:
                dry_run(stage, loaders, run)
            else:
                with run.writing():
                    run.profile = training_profile(cfg, data, env.model_dir)
                    fit(stage, loaders, run, position, facts)


def describe(cfg: Config, data: Prepared) -> dict[str, Any]:
    """What the published weights say of their training, and what must be the same when it is resumed."""
    return {
        "trained_on": data.digest(),
        "num_train": len(data.split.train),
        "channel": cfg.channel,
        "spacing": cfg.spacing,
    }


def fingerprint(cfg: Config, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "autoencoder_def": cfg.autoencoder_def.model_dump(),
        "discriminator_def": cfg.discriminator_def.model_dump(),
        "autoencoder_train": cfg.autoencoder_train.model_dump(mode="json", exclude={"max_epochs"}),
        "seed": cfg.seed,
        "processes": distributed.world_size(),
        "trained_on": facts["trained_on"],
    }


def begin(stage: AutoencoderStage, data: Prepared, run: Run, steps_per_epoch: int) -> Position:
    """Resume, or start with given weights, or start fresh."""
    if run.resume:
        return run.load(stage, steps_per_epoch)
    if run.init_from:
        stage.start_from(run.init_from)
        log(f"going on from the weights in {run.init_from}")
    else:
        stage.start_fresh(lambda: first_look(data, run.cfg.autoencoder_train.patch_size))
    return Position()


def first_look(data: Prepared, patch_size: Sequence[int]) -> torch.Tensor:
    """(N, 1, X, Y, Z): the middles of some training volumes."""
    volumes = PatchDataset(data.cache, data.split.train[:FIRST_LOOK], patch_size)
    return torch.stack([volumes[i]["image"] for i in range(len(volumes))])


def announce(stage: AutoencoderStage, data: Prepared, run: Run) -> None:
    log(
        f"autoencoder: {count_parameters(stage.autoencoder) / 1e6:.2f} M parameters on {run.device}, "
        f"{distributed.world_size()} process(es); {len(data.split.train)} training and "
        f"{len(data.split.validation)} validation volumes"
    )
    log(f"loss: {stage.loss.formula()}")
    run.tracker.text("config", f"```json\n{run.cfg.model_dump_json(indent=2, by_alias=True)}\n```")


def dry_run(stage: AutoencoderStage, loaders: tuple[Any, Any], run: Run) -> None:
    batch = next(iter(loaders[0]))
    random = StepRandom(run.cfg.seed, 0, len(batch["case"]), run.device)
    terms = stage.train_step(batch, random, stage.has_discriminator)
    # Of several processes one may have no volume to validate with.
    validation, _ = stage.validate(islice(loaders[1], 1))
    log(f"dry run: one step {rounded(terms)}, one validation {rounded(validation)}")


def fit(stage: AutoencoderStage, loaders: tuple[Any, Any], run: Run, position: Position, facts: dict[str, Any]) -> None:
    """Every epoch: train, now and then validate, publish what is best. `run.pause` saves what the next step needs."""
    train = run.cfg.autoencoder_train
    if run.begins_with_a_candidate(position):
        # What it starts with is the first candidate: a training that makes it worse publishes nothing.
        judge(stage, loaders[1], run, position, facts)
    while position.epoch < train.max_epochs:
        epoch_log = train_one_epoch(stage, loaders[0], run, position)
        last = position.epoch + 1 == train.max_epochs
        due = (position.epoch + 1) % train.val_interval == 0 or last
        validation = judge(stage, loaders[1], run, position, facts) if due else {}
        position.epoch += 1
        epoch_log.report(validation, stage.optimizer.learning_rate)
    run.save(stage, position)


def train_one_epoch(stage: AutoencoderStage, loader: Any, run: Run, position: Position) -> EpochLog:
    """The rest of the epoch from `position.step` on."""
    epoch_log = EpochLog(position, run.cfg.autoencoder_train.max_epochs, len(loader), run.device, run.tracker)
    adversarial = stage.has_discriminator and position.epoch >= run.cfg.autoencoder_train.adv_warm_up_epochs
    loader.batch_sampler.set_epoch(position.epoch, epoch_log.first)
    for batch in epoch_log.watch(loader):
        random = StepRandom(run.cfg.seed, position.step, len(batch["case"]), run.device)
        with kept_for_replay(run.env.model_dir, stage, batch, random, adversarial):
            terms = stage.train_step(batch, random, adversarial)
        epoch_log.add(terms, len(batch["case"]) * distributed.world_size())
        position.step += 1
        run.pause(stage, position)
    return epoch_log


def judge(
    stage: AutoencoderStage, loader: Any, run: Run, position: Position, facts: dict[str, Any]
) -> dict[str, float]:
    """Validate; publish the weights if no earlier ones were as good."""
    measures, shown = stage.validate(takewhile(lambda _: run.going_on(), loader))
    run.pause(stage, position)
    run.tracker.scalars("validation", measures, position.step)
    if shown:
        run.tracker.image("validation/reconstruction", tensorboard_image(*shown, run.cfg.spacing), position.step)
    if measures["l1"] < position.best:
        position.best = measures["l1"]
        stage.publish(run.env.model_dir, {**facts, "step": position.step}, measures)
        run.publish_profile()
    return measures


if __name__ == "__main__":
    utils.run_script(main, "interrupted; go on with --resume")
