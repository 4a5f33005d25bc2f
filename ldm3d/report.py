"""What an evaluation shows: a table to read, a picture to look at."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm3d.console import log
from ldm3d.metrics import Metric, TooFewVolumes
from ldm3d.montage import Cell, montage

SHOWN, SHOWN_SAMPLES = 4, 8


class Volumes(Sequence[np.ndarray]):
    """A set of volumes, of which one at a time is in memory: what is asked for is loaded anew."""

    def __init__(self, names: Sequence[str], load: Callable[[int], np.ndarray]):
        self.names, self._load = list(names), load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._load(range(len(self))[index])


class Report:
    """Metrics as they come, and the reasons for those that cannot be had.

    Attributes:
        metrics: by name.
        skipped: name of what was left out -> why.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.skipped: dict[str, str] = {}

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """The function's result; None, with the reason kept, where there are too few volumes for it."""
        try:
            return function()
        except TooFewVolumes as error:
            self.skip(name, str(error))
            return None

    def skip(self, name: str, why: str) -> None:
        self.skipped[name] = why
        log(f"{name} skipped: {why}")

    def add(self, name: str, function: Callable[[], dict[str, Metric]]) -> None:
        """Compute a group of metrics, or note why it cannot be."""
        log(f"{name} ...")
        self.metrics |= self.attempt(name, function) or {}

    def table(self) -> str:
        """Value of each metric, what it is read against, and which way is better."""
        rows = [("metric", "value", "read against", "direction", "n")]
        for name, metric in self.metrics.items():
            n = ", ".join(f"{count} {of.replace('_', ' ')}" for of, count in metric["n"].items())
            rows.append((name, _shown(metric["value"]), _references(metric), metric["direction"], n))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join([*lines, *(f"{name} skipped: {why}" for name, why in self.skipped.items())])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _references(metric: Metric) -> str:
    """The reference values that a reader needs first."""
    references = metric.get("references", {})
    halves, spread = references.get("real_halves"), references.get("min_max")
    parts = [f"real halves {_shown(halves['mean'])} +- {_shown(halves['std'])}"] if halves else []
    parts += [f"real {_shown(spread['real'][0])} to {_shown(spread['real'][1])}"] if spread else []
    for key in ("reconstructions", "mean_image", "real", "closer_than_real_min", "synthetic_median", "real_median"):
        if key in references:
            parts.append(f"{key.replace('_', ' ')} {_shown(references[key])}")
    return ", ".join(parts)


def draw_report(
    path: Path,
    spacing: Sequence[float],
    training: Volumes,
    reference: Volumes,
    reconstructed: list[np.ndarray] | None,
    synthetic: Volumes,
    copies: list[dict[str, Any]] | None,
) -> None:
    """Rows of real, reconstructed and generated volumes; below each sample its nearest training volume.

    Args:
        path: of the PNG picture.
        spacing: voxel size in mm (3).
        training: where the nearest are taken from.
        reference: real volumes that were not trained on.
        reconstructed: reconstructions of the first of them, if there are any.
        synthetic: generated volumes.
        copies: what `ldm3d.copies.copy_check` found for them, if it was done.
    """
    rows: dict[str, list[Cell]] = {
        "real, held out": list(_cells(reference[:SHOWN], reference.names)),
        "reconstructed": list(_cells((reconstructed or [])[:SHOWN], reference.names)),
    }
    for start in range(0, min(len(synthetic), SHOWN_SAMPLES), SHOWN):
        stop = start + SHOWN
        numbers = f"{start + 1} to {min(stop, len(synthetic))}"
        rows[f"generated {numbers}"] = list(_cells(synthetic[start:stop], synthetic.names[start:stop]))
        if copies:
            rows[f"nearest training volumes of {numbers}, relative distance"] = [
                _nearest(training, c) for c in copies[start:stop]
            ]
    marked = any(copy["closer_than_all_real"] for copy in copies or [])
    title = "Evaluation" + "   (COPY?: closer to a training volume than every held-out real volume is)" * marked
    montage({name: cells for name, cells in rows.items() if cells}, spacing, path, title)


def _cells(volumes: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[Cell]:
    return (Cell(volume, caption=name) for volume, name in zip(volumes, names, strict=False))


def _nearest(training: Volumes, copy: dict[str, Any]) -> Cell:
    volume = training[training.names.index(copy["nearest"])]
    mark = "COPY?   " if copy["closer_than_all_real"] else ""
    caption = f"{mark}{copy['relative_distance']:.2f}   {copy['nearest']}" + ", mirrored" * copy["mirrored"]
    return Cell(volume[::-1] if copy["mirrored"] else volume, caption=caption)
