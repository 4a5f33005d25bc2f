"""Whether the middle box that stage 2 learns and generates holds the heads, or cuts part of them off."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm3d.brain import brain_mask
from ldm3d.cache import to_float
from ldm3d.cases import Case
from ldm3d.checks import share_out
from ldm3d.console import log
from ldm3d.data import Prepared
from ldm3d.errors import DataError
from ldm3d.schema import Config
from ldm3d.training_profile import LARGEST, drawn
from ldm3d.volumes import padded_size

WORTH_SAYING = 0.005
"""Share of a head: masks of the same head differ by about as much."""
_NEGLIGIBLE = WORTH_SAYING / 5  # of a head, along one axis: single voxels far out make no box larger
_AIR = 0.02
_COARSE_MM = 3.0  # fine enough for a head's outline, and a twentieth of the work at 1.1 mm
_SPACING_STEP_MM = 0.1


class Outside(NamedTuple):
    """Of one head."""

    share: float
    """Of its voxels, how many the box leaves out, 0 to 1."""
    needed: tuple[int, ...]
    """Voxels along each axis of the smallest box around the volume's middle that leaves out nothing worth saying."""


def warn_if_cut_off(cfg: Config, data: Prepared) -> None:
    """Say which part of the heads is outside `diffusion_train.patch_size`, and what would hold them.

    All ranks call this together. Of large data sets a part is measured, always the same one.

    Raises:
        DataError: a volume that could be read before cannot be now; on every rank.
    """
    size = cfg.diffusion_train.patch_size
    by_name = {case.name: case for case in (*data.split.train, *data.split.validation)}
    cases = [by_name[name] for name in drawn(list(by_name), LARGEST)]

    def measure(case: Case) -> Outside:
        return outside(data.cache.get(case), size, cfg.spacing)

    found: dict[str, Outside] = {}
    for case, outcome in zip(cases, share_out(measure, cases, "looking for heads outside the box"), strict=True):
        if isinstance(outcome, DataError):
            raise outcome
        found[case.name] = outcome
    shares = {name: one.share for name, one in found.items()}
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] < WORTH_SAYING:
        return
    cut = sum(share >= WORTH_SAYING for share in shares.values())
    needed = np.max([one.needed for one in found.values()], axis=0)
    box = np.maximum(size, padded_size(needed, cfg.autoencoder_def.downsampling * cfg.diffusion_def.downsampling))
    coarser = [_rounded_up(mm * max(needed / size)) for mm in cfg.spacing]
    log(
        f"warning: diffusion_train.patch_size {list(size)} cuts off {WORTH_SAYING:.1%} or more of {cut} of "
        f"{len(cases)} heads: {np.median([*shares.values()]):.1%} of a head in the median, {shares[worst]:.1%} of "
        f"{worst}; that part is neither learned nor generated. {box.tolist()} would hold them all, or spacing {coarser}"
    )


def outside(volume: np.ndarray, size: Sequence[int], spacing: Sequence[float]) -> Outside:
    """Measure one head.

    What is head says `brain_mask`: with a skull it is the head, without one the brain.

    Args:
        volume: (X, Y, Z) prepared volume as it is cached.
        size: of the box around its middle, in voxels (3).
        spacing: voxel size in mm (3).
    """
    steps = [max(1, round(_COARSE_MM / mm)) for mm in spacing]
    coarse = to_float(volume[tuple(slice(step // 2, None, step) for step in steps)])
    # `brain_mask` smooths, so that some air around the head is in it.
    mask = brain_mask(coarse) & (coarse > _AIR)
    if not mask.any():
        return Outside(0.0, (1, 1, 1))
    inside, needed = mask.astype(float), []
    for axis, (length, step, want) in enumerate(zip(volume.shape, steps, size, strict=True)):
        # Each coarse voxel stands for `step` fine ones, of which the box may hold some.
        first = np.arange(mask.shape[axis]) * step
        last = np.minimum(first + step, length)
        start = max(0, (length - want) // 2)
        held = np.clip(np.minimum(last, start + want) - np.maximum(first, start), 0, None) / (last - first)
        inside *= held.reshape([-1 if a == axis else 1 for a in range(3)])
        reach = np.maximum(length - 2 * first, 2 * last - length)
        order = reach.argsort()
        counts = mask.sum(tuple({0, 1, 2} - {axis}))[order].cumsum()
        needed.append(int(reach[order[np.searchsorted(counts, (1 - _NEGLIGIBLE) * counts[-1])]]))
    return Outside(float(1 - inside.sum() / mask.sum()), tuple(needed))


def _rounded_up(mm: float) -> float:
    return round(math.ceil(mm / _SPACING_STEP_MM - 1e-6) * _SPACING_STEP_MM, 3)
