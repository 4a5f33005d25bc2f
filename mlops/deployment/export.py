"""Export the networks of published weights, so that they run where neither this project nor MONAI is.

    python -m mlops.deployment.export --model-dir checkpoints/demo --output exported
    python exported/run_exported.py exported --num 4 --seed 0

Written are U-Net and decoder as `torch.export` programs (.pt2) for one volume at a time on a CPU, `exported.json` with
all that is needed to use them, and the program that does so. Shapes, sampler and number of steps are fixed by it:
`--scheduler` and `--steps` choose others than the weights suggest.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm3d import __version__
from ldm3d.cards import AUTOENCODER, AutoencoderCard, read_card
from ldm3d.console import log
from ldm3d.diffusion import sample_latent
from ldm3d.errors import ConfigError, WeightsError
from ldm3d.files import atomic_path, require_writable, sha256, write_text
from ldm3d.samplers import choose_sampler
from ldm3d.sampling import Sampler
from ldm3d.sections import SamplerName, Schedule
from mlops.commands import Parser, run_command
from mlops.deployment import run_exported
from mlops.deployment.run_exported import CARD, DECODER, FORMAT_VERSION, UNET, CannotRun, Exported

CPU = torch.device("cpu")
LARGEST_DIFFERENCE = 1e-3
"""Between a volume of the exported networks and one of the project's own, of values in [0, 1]."""


class Denoiser(nn.Module):
    """The U-Net with its arguments in a row: latent (1, C, X, Y, Z) and timestep (1,) float -> prediction."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        prediction: Tensor = self.unet(latent, timesteps=timestep)
        return prediction


class Decoder(nn.Module):
    """Scaled latent (1, C, X, Y, Z) -> volume (1, 1, X', Y', Z') in the intensity range, as `Sampler.decode`."""

    mean: Tensor

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.autoencoder = sampler.autoencoder
        self.scale_factor, self.range = sampler.card.scale_factor, sampler.card.intensity_range
        self.register_buffer("mean", sampler.statistics.mean)

    def forward(self, latent: Tensor) -> Tensor:
        volume: Tensor = self.autoencoder.decode(latent / self.scale_factor + self.mean)
        return volume.clamp(*self.range)


def export(model_dir: Path, output: Path, scheduler: str | None = None, steps: int | None = None) -> float:
    """Export published weights, and sample with what was written.

    Args:
        model_dir: with the published weights.
        output: folder to write to.
        scheduler: rflow or ddim; None for the default of the training.
        steps: network evaluations for a volume; None for the scheduler's default.

    Returns:
        Largest difference between a volume of the exported networks and the project's.

    Raises:
        WeightsError: the weights cannot be used, or the exported networks make something else.
        ConfigError: the scheduler or the number of steps does not fit.
    """
    require_writable(output)
    sampler = Sampler.from_folder(model_dir, CPU, amp=False)
    name, count = choose_sampler(sampler.card.schedule, scheduler, steps)
    table = sampling_steps(sampler.card.schedule, name, count)
    latent = torch.zeros(1, *sampler.card.latent_shape)
    _save(Denoiser(sampler.unet), (latent, torch.zeros(1)), output / UNET)
    _save(Decoder(sampler), (latent,), output / DECODER)
    with atomic_path(output / "run_exported.py") as path:
        shutil.copyfile(run_exported.__file__, path)
    card = {
        "format_version": FORMAT_VERSION,
        "files": {name: sha256(output / name) for name in (UNET, DECODER)},
        "latent_shape": sampler.card.latent_shape,
        "scheduler": name,
        "steps": table,
        "spacing_mm": sampler.card.spacing,
        "intensity_range": sampler.card.intensity_range,
        "weights_sha256": sampler.digests,
        "code_version": __version__,
        "torch_version": torch.__version__,
        "cards": {
            "autoencoder": read_card(model_dir / AUTOENCODER, AutoencoderCard).model_dump(mode="json"),
            "diffusion_unet": sampler.card.model_dump(mode="json"),
        },
    }
    write_text(output / CARD, json.dumps(card, indent=2, allow_nan=False) + "\n")
    try:
        difference = compare(sampler, output, name, count)
        if not difference <= LARGEST_DIFFERENCE:
            raise WeightsError(f"{output}: the exported networks make another volume, {difference:.2g} apart; not kept")
    except BaseException:  # without its card nobody takes the folder for an export
        (output / CARD).unlink()
        raise
    return difference


def sampling_steps(schedule: Schedule, sampler: SamplerName, count: int) -> list[dict[str, float]]:
    """The sampler as a table of steps, each of which is `latent = keep * latent + add * prediction`.

    It is read off the project's own sampler, which is let run on coordinates: the first stands for the noise, the
    others for one prediction each.

    Raises:
        ConfigError: the sampler's steps are not of this form.
    """
    if sampler not in ("rflow", "ddim"):
        raise ConfigError(f"scheduler {sampler!r}: exported networks are sampled with rflow or ddim")
    basis = torch.eye(count + 1, dtype=torch.float64).view(count + 1, 1, 1, 1, count + 1, 1)
    latents: list[Tensor] = []
    times: list[float] = []

    def denoise(latent: Tensor, timesteps: Tensor) -> Tensor:
        latents.append(latent.flatten())
        times.append(float(timesteps[0]))
        return basis[len(latents)]

    latents.append(sample_latent(denoise, basis[0], [], schedule, sampler, count).flatten())
    steps = []
    for number, (before, after) in enumerate(pairwise(latents)):
        keep, add = float(after[0] / before[0]), float(after[number + 1])
        assert torch.allclose(after, keep * before + add * basis[number + 1].flatten())
        steps.append({"timestep": times[number], "keep": keep, "add": add})
    return steps


def _save(network: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    with torch.no_grad(), atomic_path(path) as temporary:
        program = torch.export.export(network.eval().requires_grad_(False), inputs, strict=False)
        torch.export.save(program, temporary)


def compare(sampler: Sampler, folder: Path, scheduler: str, steps: int) -> float:
    """Largest difference of one volume, through the whole chain, made from the files and by the project."""
    try:
        exported = Exported(folder).sample(0, 0)
    except CannotRun as error:
        raise WeightsError(str(error)) from error
    expected = sampler.sample(0, [0], scheduler, steps)[0, 0]
    return float((exported - expected).abs().max()) if exported.shape == expected.shape else float("inf")


def main() -> int:
    parser = Parser(prog="python -m mlops.deployment.export", description="Export published weights for edge devices.")
    parser.add_argument("--model-dir", type=Path, required=True, help="folder with the published weights")
    parser.add_argument("--output", type=Path, required=True, help="folder for the exported networks")
    parser.add_argument("--scheduler", help="rflow or ddim, as far as the training allows")
    parser.add_argument("--steps", type=int, help="network evaluations for a volume; the scheduler's default")
    args = parser.parse_args()
    difference = export(args.model_dir, args.output, args.scheduler, args.steps)
    mib = sum(path.stat().st_size for path in args.output.iterdir()) / 2**20
    log(f"a volume of the exported networks differs from the project's by at most {difference:.1g} of [0, 1]")
    print(json.dumps({"output": str(args.output), "mib": round(mib, 1), "max_difference": difference}))
    return 0


if __name__ == "__main__":
    run_command(main)
