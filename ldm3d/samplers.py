"""What may be asked of weights: sampler, number of steps, seed. Needs no torch."""

import math

from ldm3d.errors import ConfigError
from ldm3d.sections import SAMPLERS, SamplerName, Schedule

LARGEST_SEED = 2**63 - 1
DEFAULT_STEPS: dict[str, int] = {"rflow": 30, "ddim": 50, "pndm": 50}


def choose_sampler(schedule: Schedule, name: str | None, steps: int | None) -> tuple[SamplerName, int]:
    """Sampler and number of steps that a trained schedule allows.

    Raises:
        ConfigError: the sampler does not fit the training, or the steps are out of range.
    """
    allowed = SAMPLERS[schedule.type]
    chosen = name or allowed[0]
    if chosen not in allowed:
        raise ConfigError(f"scheduler {chosen!r}: weights trained with {schedule.type} are sampled with {_or(allowed)}")
    most = schedule.num_train_timesteps
    count = _default_steps(chosen, most) if steps is None else steps
    if not 1 <= count <= most:
        raise ConfigError(f"steps {count}: must be between 1 and {most}")
    if chosen == "ddpm" and count != most:
        raise ConfigError(f"steps {count}: ddpm takes all {most} steps; fewer need ddim or pndm")
    if chosen == "pndm" and count != most:
        _require_whole_range(count, most)
    return chosen, count


def _default_steps(sampler: SamplerName, most: int) -> int:
    wanted = min(DEFAULT_STEPS.get(sampler, most), most)
    return _whole_strides(wanted, most) if sampler == "pndm" else wanted


def _require_whole_range(count: int, most: int) -> None:
    """MONAI's PNDM strides by a whole number up from 0: 600 of 1000 steps would take pure noise for timestep 599."""
    first = (count - 1) * (most // count)
    if first < 0.8 * most:
        better = _whole_strides(max(count, 10), most)
        raise ConfigError(f"steps {count}: pndm would begin at timestep {first} of {most}; use {better} steps, or ddim")


def _whole_strides(count: int, most: int) -> int:
    """`count`, or as many steps fewer as let a whole stride reach from the first timestep to the last."""
    return most // math.ceil(most / count)


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)
