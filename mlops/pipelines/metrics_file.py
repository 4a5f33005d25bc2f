"""metrics.json of evaluate.py, read so that nothing missing or not finite gets through."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldm3d.errors import DataError

FEWEST = 8
"""Generated and held-out volumes: with fewer, chance allows nearly anything."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Figure(_Read):
    value: float | None
    standard_error: Annotated[float, Field(ge=0)] | None = None
    n: dict[str, int]
    how: str
    references: dict[str, Any] = {}


class Sample(_Read):
    """A generated volume and the training volume nearest to it."""

    sample: str
    nearest: str
    relative_distance: float


class _Made(_Read):
    channel: int
    spacing_mm: tuple[float, float, float]
    size: tuple[int, int, int]
    digests: dict[str, str]


class _Volumes(_Read):
    training: int
    reference: tuple[str, ...]
    synthetic: tuple[str, ...]


class _File(_Read):
    made: _Made
    metrics: dict[str, _Figure]
    nearest_training_volumes: tuple[Sample, ...]
    volumes: _Volumes


class Figure:
    """A figure that is there and finite.

    Attributes:
        value: of the synthetic volumes.
        standard_error: of the choice of synthetic volumes.
        n: how many volumes of each kind.
        how: how it was computed.
    """

    def __init__(self, place: str, figure: _Figure, needs_error: bool):
        if figure.value is None or (needs_error and figure.standard_error is None):
            lacks = "value" if figure.value is None else "standard error"
            raise DataError(f"{place} has no {lacks}; generate more volumes, and run evaluate.py again")
        self._place, self._references = place, figure.references
        self.value, self.standard_error = figure.value, figure.standard_error or 0.0
        self.n, self.how = figure.n, figure.how
        for of in ("synthetic", "held_out" if "held_out" in figure.n else "real"):
            if figure.n.get(of, 0) < FEWEST:
                raise DataError(f"{place} is of {figure.n.get(of, 0)} {of} volumes; at least {FEWEST} are needed")

    def reference(self, name: str) -> float:
        value = self._references.get(name)
        # JSON's 1e999 is an infinity that its parser lets through.
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{self._place} has no reference {name!r}; run evaluate.py again")
        return value


class Metrics:
    """What evaluate.py found for one model.

    Args:
        path: for messages.
        content: of the file.
    """

    def __init__(self, path: Path, content: _File):
        self.path, self._metrics = path, content.metrics
        self.made, self.volumes = content.made, content.volumes
        self.nearest_training_volumes = content.nearest_training_volumes

    def figure(self, name: str, needs_error: bool = True) -> Figure:
        """Raises `DataError` where it is missing, not finite, of too few volumes, or has no standard error."""
        if name not in self._metrics:
            raise DataError(f"{self.path}: has no figure {name!r}; run evaluate.py again, with enough volumes for it")
        return Figure(f"{self.path}: {name}", self._metrics[name], needs_error)

    @property
    def comparable(self) -> dict[str, object]:
        """What must be the same in two files for their figures to compare."""
        return {
            "channel": self.made.channel,
            "spacing_mm": self.made.spacing_mm,
            "size": self.made.size,
            "content of the reference volumes": self.made.digests.get("reference"),
            "content of the training volumes": self.made.digests.get("training"),
            **{f"how {name} was computed": figure.how for name, figure in self._metrics.items()},
            **{f"number of volumes of {name}": figure.n for name, figure in self._metrics.items()},
        }


def read_metrics(path: Path) -> Metrics:
    """Raises `DataError`: no such file, no JSON, not of evaluate.py, or of an older one; also for NaN anywhere."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        return Metrics(path, _File.model_validate(content))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}; is it of this version's evaluate.py?") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which JSON does not know")


def require_comparable(candidate: Metrics, champion: Metrics) -> None:
    """Raises `DataError` where the two were not measured against the same volumes, in the same way, with the same N."""
    one, other = candidate.comparable, champion.comparable
    different = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise DataError(
            f"{candidate.path} and {champion.path} do not compare: {key} is {one.get(key)} and {other.get(key)}{more}; "
            "evaluate both models with the same data, settings and number of volumes"
        )
