"""What an exported folder says of its weights: read from their own cards, the config, and evaluate.py's figures."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, FiniteFloat, ValidationError

from ldm3d import __version__
from ldm3d.cards import AutoencoderCard, DiffusionCard
from ldm3d.errors import ConfigError
from ldm3d.schema import Config

CONTRASTS = ("FLAIR", "T1", "T1 with contrast agent", "T2")
NOT_STATED = "not stated"
WARNING = (
    "Weights that were trained on patients are patient data, and so is what they generate: models of this kind have "
    "repeated training volumes. Somebody responsible for the data must have agreed before they are passed on. Nothing "
    "here is a medical device."
)


class Metric(BaseModel):
    """One figure of evaluate.py; what it was judged against is left to metrics.json itself."""

    value: FiniteFloat
    direction: str
    n: dict[str, int]


class Metrics(BaseModel):
    """What evaluate.py wrote, without the names of cases that stand in it too."""

    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Stated:
    """What only a person can say of weights: their licence, who made them, what the training data are called."""

    license: str = NOT_STATED
    authors: str = NOT_STATED
    dataset: str = NOT_STATED


@dataclass(frozen=True)
class Facts:
    """Everything that is said of exported weights."""

    name: str
    config: Config
    autoencoder: AutoencoderCard
    diffusion: DiffusionCard
    scheduler: str
    steps: int
    metrics: dict[str, Metric]
    stated: Stated

    @property
    def contrast(self) -> str:
        return CONTRASTS[self.diffusion.channel]

    @property
    def volume_shape(self) -> list[int]:
        """Voxels (X, Y, Z) of a generated volume."""
        return [n * self.autoencoder.definition.downsampling for n in self.diffusion.latent_shape[1:]]

    @property
    def summary(self) -> str:
        voxels = " x ".join(map(str, self.volume_shape))
        spacing = " x ".join(f"{s:g}" for s in self.diffusion.spacing)
        return f"3D latent diffusion model of brain MRI ({self.contrast}): {voxels} voxels of {spacing} mm"

    def table(self) -> str:
        """The facts as a table in Markdown."""
        latent = " x ".join(map(str, self.diffusion.latent_shape))
        rows = {
            "What it makes": f"{self.contrast}, {self.summary.rpartition(': ')[2]}, values from 0 to 1",
            "Latent": f"{latent}, scale factor {self.diffusion.scale_factor:.4g}",
            "Diffusion": f"{self.diffusion.schedule.type}, sampled with {self.scheduler} in {self.steps} steps",
            "Trained on": f"{self.diffusion.num_train} volumes (digest `{self.diffusion.trained_on}`)",
            "Training data": self.stated.dataset,
            "Steps of training": f"{self.autoencoder.step} and {self.diffusion.step}",
            "Code": f"ldm3d {self.diffusion.code_version}, exported by {__version__}",
            "Authors of the weights": self.stated.authors,
            "Licence of the weights": self.stated.license,
        }
        return _table(["", ""], [[key, _cell(text)] for key, text in rows.items()])

    def metrics_table(self) -> str:
        """The figures as a table in Markdown, or a sentence where there are none."""
        if not self.metrics:
            return "No figures came with these weights."
        rows = [
            [
                f"`{name}`",
                f"{metric.value:.4g}",
                _cell(metric.direction),
                ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in metric.n.items()),
            ]
            for name, metric in self.metrics.items()
        ]
        return _table(["Measure", "Value", "To be read as", "N"], rows)


def read_metrics(path: Path | None, card: DiffusionCard) -> dict[str, Metric]:
    """The figures of a metrics.json that evaluate.py wrote, as far as they have a value; none without a path.

    Raises:
        ConfigError: it cannot be read, is something else, or is about volumes of another kind.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # evaluate.py writes null where a figure has no value: too few volumes, say.
        content["metrics"] = {name: one for name, one in content["metrics"].items() if one["value"] is not None}
        metrics = Metrics.model_validate(content).metrics
        made = content["made"]["channel"], tuple(content["made"]["spacing_mm"])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a metrics.json of evaluate.py") from error
    if made != (card.channel, card.spacing):
        raise ConfigError(
            f"{path}: is about channel {made[0]} at {list(made[1])} mm; the weights make channel {card.channel} at "
            f"{list(card.spacing)} mm"
        )
    return metrics


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Text that stays inside its cell."""
    return " ".join(text.split()).replace("|", "\\|")
