"""What a configuration will need before it is started, and what would fit.

python -m ldm3d.memory -c config/config_train_16g.json --gpu-gib 16
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from ldm3d.config import load_config
from ldm3d.errors import UserError
from ldm3d.live_bytes import nbytes
from ldm3d.memory_advice import CONTEXT_BYTES, FRAGMENTATION, GIB, SPARE, largest_patch, largest_peak, suggest_training
from ldm3d.memory_phases import CHECKPOINTING, TRACED, TracedDiffusion, TracedStage, validation_size
from ldm3d.perceptual_shape import NETWORKS
from ldm3d.schema import Config

STAGES = {"autoencoder": "stage 1", "diffusion": "stage 2"}
TRAINING = "training step"
# Where one does not fit the next is tried, and at last volumes are decoded in pieces.
DECODING_WHOLE = ("decoding whole", "decoding whole, U-Net on the host")
# Volumes that train_diffusion.py samples at once for TensorBoard.
PREVIEWS = 2


@dataclass
class StageMemory:
    """Bytes of one stage.

    Args:
        parameters: of all networks that are on the device while the stage trains.
        gradients: before they are used and forgotten.
        optimizer: AdamW's two moments.
        ema: the running average.
        batch: what one step is given.
        activations: what forward keeps for backward, by precision and checkpointing.
        peaks: highest total of each phase, as configured, by the phase's name; the first is the training step.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    batch: int
    activations: dict[tuple[str, bool | str], int]
    peaks: dict[str, int]


def measure(traced: TracedStage) -> StageMemory:
    """What the table shows of a stage."""
    training = traced.train_step()
    memory = StageMemory(
        parameters=traced.parameters(),
        gradients=nbytes([list(network.parameters()) for network in traced.networks]),
        optimizer=traced.moments(),
        ema=traced.ema(),
        batch=traced.batch(),
        activations=_all_activations(traced),
        peaks={TRAINING: training},
    )
    memory.peaks["validation"] = traced.validate()
    if isinstance(traced, TracedDiffusion):
        memory.peaks |= _of_sampling(traced)
    return memory


def _of_sampling(traced: TracedDiffusion) -> dict[str, int]:
    train, at_once = traced.cfg.diffusion_train, traced.cfg.sampling.batch_size
    decoding, training_only = traced.decode(), traced.training_only()
    peaks = {"encoding (latent cache)": traced.encoding}
    if train.sample_interval:
        peaks["previews while training"] = max(traced.sample(PREVIEWS), decoding)
    peaks["sampling (inference.py)"] = traced.sample(at_once) - training_only
    whole, alone = DECODING_WHOLE
    peaks[whole] = decoding - training_only
    peaks[alone] = peaks[whole] - traced.ema()
    peaks["decoding in pieces"] = traced.decode_in_pieces()
    return peaks


def _all_activations(traced: TracedStage) -> dict[tuple[str, bool | str], int]:
    found = {}
    for precision in ("fp32", "autocast"):
        for checkpointing in CHECKPOINTING:
            traced.set_up(precision == "autocast", checkpointing)
            found[precision, checkpointing] = traced.activations()
    traced.set_up(traced.autocast, traced.cfg.use_checkpointing)
    return found


def report(cfg: Config, gpu_gib: float | None) -> tuple[str, bool]:
    """The table, and whether all of it fits."""
    limit = math.inf if gpu_gib is None else largest_peak(gpu_gib * GIB)
    memories: dict[str, StageMemory] = {}
    advice: list[str] = []
    with TRACED["autoencoder"](cfg, True) as first:
        memories["autoencoder"] = measure(first)
        if memories["autoencoder"].peaks[TRAINING] > limit:
            advice.append(_advice("stage 1", suggest_training(first, limit)))
        if memories["autoencoder"].peaks["validation"] > limit:
            size = largest_patch(first.validate, validation_size(cfg), first.factor, limit)
            advice.append(_advice("validation", [f"autoencoder_train.val_patch_size={list(size)}"] if size else []))
    with TRACED["diffusion"](cfg, True) as second:
        memories["diffusion"] = measure(second)
        if memories["diffusion"].peaks[TRAINING] > limit:
            advice.append(_advice("stage 2", suggest_training(second, limit)))
    over = [
        f"{name} of {STAGES[stage]}"
        for stage, m in memories.items()
        for name, p in m.peaks.items()
        if p > limit and name not in DECODING_WHOLE
    ]
    lines = [*_table(cfg, memories), *_notes(cfg)]
    if gpu_gib is not None:
        lines += [*_verdict(over, gpu_gib, limit), *advice]
    return "\n".join(lines), not over


def _advice(what: str, settings: list[str]) -> str:
    if not settings:
        return f"  {what}: nothing fits; the networks themselves are too large"
    return f"  {what} would fit with " + ", or with ".join(settings)


def _verdict(over: list[str], gpu_gib: float, limit: float) -> list[str]:
    if not over:
        return [f"fits {gpu_gib:g} GiB with {SPARE:.0%} to spare (live tensors may take {limit / GIB:.1f} GiB)"]
    return [
        f"does not fit {gpu_gib:g} GiB with {SPARE:.0%} to spare (live tensors may take {limit / GIB:.1f} GiB): "
        + ", ".join(over)
    ]


def _table(cfg: Config, memories: dict[str, StageMemory]) -> list[str]:
    stages = list(memories.values())
    rows: list[tuple[str, list[int | None]]] = [
        ("parameters", [m.parameters for m in stages]),
        ("gradients", [m.gradients for m in stages]),
        ("optimizer (AdamW, two moments)", [m.optimizer for m in stages]),
        ("EMA", [m.ema for m in stages]),
        ("batch", [m.batch for m in stages]),
    ]
    for precision, checkpointing in stages[0].activations:
        name = f"activations, {precision}, checkpointing {checkpointing or 'off'}"
        rows.append((name, [m.activations[precision, checkpointing] for m in stages]))
    for name in dict.fromkeys(name for m in stages for name in m.peaks):
        rows.append((f"peak: {name}", [m.peaks.get(name) for m in stages]))
    head = f"{'GiB':<46}{'stage 1':>9}{'stage 2':>9}"
    return [head, *(f"{name:<46}" + "".join(_cell(value) for value in values) for name, values in rows)]


def _cell(value: int | None) -> str:
    return f"{'':>9}" if value is None else f"{value / GIB:9.2f}"


def _notes(cfg: Config) -> list[str]:
    one, two = cfg.autoencoder_train, cfg.diffusion_train
    checkpointing = "blocks" if cfg.use_checkpointing is True else cfg.use_checkpointing or "off"
    notes = [
        "",
        f"peaks as configured: {'autocast' if cfg.amp else 'fp32'}, checkpointing {checkpointing}, batches of "
        f"{one.batch_size} and {two.batch_size}; validation of {'x'.join(map(str, validation_size(cfg)))} voxels",
        f"assumed beside live tensors: {FRAGMENTATION:.0%} for holes between them, {CONTEXT_BYTES / GIB:g} GiB for "
        "CUDA's context and the convolutions' workspace",
    ]
    if one.perceptual_weight and one.perceptual_network not in NETWORKS:
        notes.append(f"not counted: the perceptual network {one.perceptual_network}")
    return notes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ldm3d.memory",
        description="What a configuration needs in memory, without a GPU. Exit status: 0 if all of it fits, or no "
        "--gpu-gib is given; 1 if not; 2 for a configuration that cannot be used.",
    )
    parser.add_argument("-c", "--config-file", type=Path, required=True, help="training configuration (JSON)")
    parser.add_argument("--gpu-gib", type=float, metavar="N", help="say whether it fits a GPU with so much memory")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="replace a key of the config")
    args = parser.parse_args()
    try:
        text, fits = report(load_config(args.config_file, args.set), args.gpu_gib)
    except UserError as error:
        print(f"error: {error.one_line()}", file=sys.stderr)
        return 2
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
