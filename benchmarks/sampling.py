"""One volume from noise on a CPU: ours at its default, and the reference's 1000 DDPM steps on the same networks.

    python -m benchmarks.sampling

The reference is timed over its first steps and extrapolated to 1000, as each costs the same; its decoding is added.
What fewer steps do to the volumes is measured by `benchmarks.quality`.
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import arguments, interleaved, peak_resident, table, write_result
from benchmarks.reference import NUM_TIMESTEPS, ReferenceDiffusion
from benchmarks.settings import CPU, settings
from benchmarks.steps import volumes
from ldm3d.allocator import as_glibc_is, keep_freed_memory
from ldm3d.cards import DiffusionCard
from ldm3d.latents import LatentStatistics
from ldm3d.networks import build_autoencoder, build_unet
from ldm3d.sampling import Sampler
from ldm3d.schema import Config
from ldm3d.sections import RFlowSchedule

WEIGHTS = Path("checkpoints/demo")
BATCH = 4
FEW = 10


def main() -> None:
    args = arguments(__doc__).parse_args()
    keep_freed_memory()
    networks = ["tiny"] if args.tiny else ["demo", "medium"]
    rows = [row for network in networks for row in rows_of(network, 2 if args.tiny else FEW, 1 if args.tiny else 3)]
    print(table(rows))
    write_result(args.output, {"reference_steps_timed": FEW, "rows": rows})


def rows_of(network: str, few: int, repeats: int) -> list[dict[str, Any]]:
    """Whole volumes at the default number of steps and at few, alone and in a batch; and decoding alone."""
    cfg = settings(network)
    sampler = sampler_of(cfg, CPU)
    steps = 20 if network == "demo" else 30
    reference = reference_of(cfg, sampler, CPU)
    latent = torch.randn(1, *cfg.latent_shape)
    works = {
        # Keeping freed memory is ours: the reference is timed without it.
        "reference steps": as_glibc_is()(lambda: reference.denoise(few)),
        "reference decode": as_glibc_is()(lambda: reference.decode(latent)),
        "decode": lambda: decode(sampler, latent),
        f"alone, {steps} steps": lambda: sampler.sample(0, [0], steps=steps),
        f"alone, {few} steps": lambda: sampler.sample(0, [0], steps=few),
        f"batch of {BATCH}, {steps} steps": lambda: sampler.sample(0, range(BATCH), steps=steps),
        f"batch of {BATCH}, {few} steps": lambda: sampler.sample(0, range(BATCH), steps=few),
    }
    timings = interleaved(works, CPU, repeats)
    whole = timings["reference steps"].median / few * NUM_TIMESTEPS + timings["reference decode"].median
    rows = []
    for name, timing in timings.items():
        if not name.startswith("reference"):
            count = BATCH if name.startswith("batch") else 1
            other = timings["reference decode"].median if name == "decode" else whole
            rows.append(
                {
                    "networks": network,
                    "what": name,
                    "ours s a volume": timing.median / count,
                    "reference s a volume": other,
                    "times as fast": other / (timing.median / count),
                    "ours spread": f"{timing.fastest / count:.3g} to {timing.slowest / count:.3g}",
                }
            )
    if network == "medium":
        memory = {ours: peak_resident(one_volume, network, ours) for ours in (True, False)}
        rows.append(
            {"networks": network, "what": "GiB, alone", "ours GiB": memory[True], "reference GiB": memory[False]}
        )
    return rows


def sampler_of(cfg: Config, device: torch.device) -> Sampler:
    """The networks of a configuration, with fresh weights: what they know does not change what they cost."""
    torch.manual_seed(0)
    card = DiffusionCard(
        definition=cfg.diffusion_def,
        schedule=RFlowSchedule(type="rflow"),
        scale_factor=1.0,
        latent_shape=cfg.latent_shape,
        autoencoder_sha256="0" * 64,
        ema_decay=0,
        trained_on="0" * 16,
        num_train=1,
        step=0,
        channel=0,
        spacing=cfg.spacing,
    )
    statistics = LatentStatistics(torch.zeros(1, 1, 1, 1), 1.0)
    return Sampler(
        build_autoencoder(cfg.autoencoder_def), build_unet(cfg.diffusion_def), statistics, card, device, cfg.amp
    )


def reference_of(cfg: Config, sampler: Sampler, device: torch.device) -> ReferenceDiffusion:
    first = volumes(1, cfg.diffusion_train.patch_size)
    return ReferenceDiffusion(cfg, sampler.autoencoder, sampler.unet, first, device)


@torch.inference_mode()
def decode(sampler: Sampler, latent: torch.Tensor) -> torch.Tensor:
    return sampler.decode(latent.to(sampler.device))


def one_volume(network: str, ours: bool) -> Any:
    """One volume with one step, as a piece of work for a process of its own."""
    cfg = settings(network)
    sampler = sampler_of(cfg, CPU)
    if ours:
        return lambda: sampler.sample(0, [0], steps=1)
    reference = reference_of(cfg, sampler, CPU)
    return lambda: reference.decode(reference.denoise(1))


if __name__ == "__main__":
    main()
