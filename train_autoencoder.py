"""Stage 1: train the autoencoder that squeezes a volume into a small latent.

python train_autoencoder.py -c config/config_train_16g.json -e config/environment.json
"""

from collections.abc import Sequence
from typing import Any

import torch

import utils
from ldm3d import distributed
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.checkpoint import load_state, save_state
from ldm3d.console import log, progress
from ldm3d.data import PatchDataset, Prepared, prepare_data, train_loader, validation_loader
from ldm3d.memory_advice import warn_if_too_large
from ldm3d.montage import tensorboard_image
from ldm3d.networks import count_parameters
from ldm3d.progress import EpochLog, Position, rounded
from ldm3d.schema import Config
from ldm3d.training import seed_step

# What a good start needs to have seen of the training set.
FIRST_LOOK = 32


def main() -> None:
    args = utils.training_parser(__doc__).parse_args()
    cfg, env = utils.read_settings(args)
    with utils.training_run(cfg, env, args, "autoencoder") as run:
        warn_if_too_large(cfg, "autoencoder", run.device)
        data = prepare_data(cfg, env)
        facts = describe(cfg, data)
        loaders = train_loader(data, cfg, "autoencoder"), validation_loader(data, cfg, "autoencoder")
        stage = AutoencoderStage(cfg, run.device, cfg.autoencoder_train.max_epochs * len(loaders[0]))
        position = begin(stage, data, run, facts)
        announce(stage, data, run)
        if args.dry_run:
            dry_run(stage, loaders)
        else:
            with utils.interrupts_noted(run):
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


def begin(stage: AutoencoderStage, data: Prepared, run: utils.Run, facts: dict[str, Any]) -> Position:
    """Resume, or start with given weights, or start fresh."""
    if run.resume:
        state = load_state(run.last, fingerprint(run.cfg, facts))
        stage.load_state_dict(state["stage"])
        run.tracker.first_step = state["step"] + 1
        return Position(state["epoch"], state["step"], state["best"])
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


def announce(stage: AutoencoderStage, data: Prepared, run: utils.Run) -> None:
    log(
        f"autoencoder: {count_parameters(stage.autoencoder) / 1e6:.2f} M parameters on {run.device}, "
        f"{distributed.world_size()} process(es); {len(data.split.train)} training and "
        f"{len(data.split.validation)} validation volumes"
    )
    log(f"loss: {stage.loss.formula()}")
    run.tracker.text("config", f"```json\n{run.cfg.model_dump_json(indent=2, by_alias=True)}\n```")


def dry_run(stage: AutoencoderStage, loaders: tuple[Any, Any]) -> None:
    terms = stage.train_step(next(iter(loaders[0])), 0, stage.has_discriminator)
    validation, _ = stage.validate([next(iter(loaders[1]))])
    log(f"dry run: one step {rounded(terms)}, one validation {rounded(validation)}")


def fit(
    stage: AutoencoderStage, loaders: tuple[Any, Any], run: utils.Run, position: Position, facts: dict[str, Any]
) -> None:
    """Every epoch: train, now and then validate, publish what is best, save what the next step needs."""
    train = run.cfg.autoencoder_train
    marks = fingerprint(run.cfg, facts)
    if run.init_from:
        # What it starts with is the first candidate: a training that makes it worse publishes nothing.
        judge(stage, loaders[1], run, position, facts)
    while position.epoch < train.max_epochs:
        epoch_log = train_one_epoch(stage, loaders[0], run, position)
        if run.should_stop():
            save_state(run.last, position.state(stage.state_dict(), marks))
            raise KeyboardInterrupt
        position.epoch += 1
        due = position.epoch % train.val_interval == 0 or position.epoch == train.max_epochs
        validation = judge(stage, loaders[1], run, position, facts) if due else {}
        report(epoch_log, stage, run, position, validation)
        save_state(run.last, position.state(stage.state_dict(), marks))


def report(
    epoch_log: EpochLog, stage: AutoencoderStage, run: utils.Run, position: Position, validation: dict[str, float]
) -> None:
    if not epoch_log.volumes:  # stopped between an epoch's last step and its end, resumed here
        return
    averages = epoch_log.averages()
    loss = sum(averages[name] for name in epoch_log.shares())
    epoch_log.report(position.epoch, run.cfg.autoencoder_train.max_epochs, loss, validation)
    rate = {"learning_rate": stage.optimizer.learning_rate}
    run.tracker.scalars("train", averages | rate | {"loss": loss}, position.step)
    run.tracker.scalars("share", epoch_log.shares(), position.step)


def train_one_epoch(stage: AutoencoderStage, loader: Any, run: utils.Run, position: Position) -> EpochLog:
    """The rest of the epoch from `position.step` on; stops early, after a whole step, when it is asked to."""
    epoch_log = EpochLog()
    adversarial = stage.has_discriminator and position.epoch >= run.cfg.autoencoder_train.adv_warm_up_epochs
    start = position.step - position.epoch * len(loader)
    loader.batch_sampler.set_epoch(position.epoch, start)
    for batch in progress(loader, f"epoch {position.epoch + 1}", len(loader) - start, "step"):
        seed_step(run.cfg.seed, position.step)
        terms = stage.train_step(batch, position.step, adversarial)
        epoch_log.add(terms, len(batch["case"]) * distributed.world_size())
        position.step += 1
        if run.should_stop():
            break
    return epoch_log


def judge(
    stage: AutoencoderStage, loader: Any, run: utils.Run, position: Position, facts: dict[str, Any]
) -> dict[str, float]:
    """Validate; publish the weights if no earlier ones were as good."""
    measures, shown = stage.validate(loader)
    run.tracker.scalars("validation", measures, position.step)
    if shown:
        run.tracker.image("validation/reconstruction", tensorboard_image(*shown, run.cfg.spacing), position.step)
    if measures["l1"] < position.best:
        position.best = measures["l1"]
        stage.publish(run.env.model_dir, {**facts, "step": position.step}, measures)
    return measures


if __name__ == "__main__":
    utils.run_script(main, "interrupted; go on with --resume")
