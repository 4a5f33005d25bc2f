"""Is the faster recipe worse at learning? Both train on the same volumes, in the same order, for the same number.

    python -m benchmarks.loss

The networks are the demo's, fresh, with the same weights, learning rate (constant) and batch in both recipes. Both are
judged alike: stage 1 by the mean L1 of reconstructions of held-out volumes; stage 2 by the mean squared error of the
predicted noise of held-out volumes at 8 fixed levels of noise, each in its recipe's own scale. Stage 2 stands on the
demo's autoencoder.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import arguments, table, write_result
from benchmarks.reference import ReferenceAutoencoder, ReferenceDiffusion
from benchmarks.settings import CPU, settings
from benchmarks.steps import TOTAL_STEPS, Images
from ldm3d.allocator import keep_freed_memory
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentCache, build_latent_cache
from ldm3d.phantom import make_phantom
from ldm3d.randomness import StepRandom
from ldm3d.volumes import scale_intensity
from ldm3d.weights import load_autoencoder

WEIGHTS = Path("checkpoints/demo")
PHANTOM_SEED = 7
DDPM = 'NoiseScheduler={"type": "ddpm"}'


def main() -> None:
    args = arguments(__doc__).parse_args()
    keep_freed_memory()
    count, held_out, steps = (4, 2, 1) if args.tiny else (24, 8, 30)
    data = phantoms(count + held_out)
    train, validation = data[:count], data[count:]
    rows = [stage_1(train, validation, steps), stage_2(train, validation, steps)]
    print(table(rows))
    write_result(args.output, {"training_volumes": count, "held_out_volumes": held_out, "rows": rows})


def phantoms(count: int) -> Tensor:
    """(count, 1, X, Y, Z) in [0, 1]: FLAIR of embedded brains that the demo's weights have not seen."""
    images = [scale_intensity(make_phantom(PHANTOM_SEED, i).image[0], f"phantom {i}") for i in range(count)]
    return torch.stack([torch.from_numpy(image)[None] for image in images])


def batches(count: int, size: int, steps: int) -> list[list[int]]:
    """Which volumes each step sees, the same for both recipes."""
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-size * steps // count))])
    return [order[i * size : (i + 1) * size].tolist() for i in range(steps)]


def stage_1(train: Tensor, validation: Tensor, steps: int) -> dict[str, Any]:
    cfg = settings("demo", "autoencoder_train.lr=1e-3", "autoencoder_train.lr_schedule=constant")
    ours = AutoencoderStage(cfg, CPU, TOTAL_STEPS)
    ours.start_fresh(lambda: train)
    reference = ReferenceAutoencoder(cfg, ours.autoencoder, CPU)
    held_out = validation.split(1)
    start = reference.validate(held_out)
    for step, indices in enumerate(batches(len(train), cfg.autoencoder_train.batch_size, steps)):
        image = train[indices]
        ours.train_step({"image": image, "case": [""] * len(image)}, StepRandom(0, step, len(image), CPU), False)
        reference.train_step(image)
    loader = [{"image": image, "case": [""]} for image in held_out]
    return {
        "stage": "autoencoder, L1",
        "volumes seen": steps * cfg.autoencoder_train.batch_size,
        "at the start": start,
        "ours": ours.validate(loader)[0]["l1"],
        "reference": judge_1(reference, held_out),
    }


def judge_1(reference: ReferenceAutoencoder, held_out: tuple[Tensor, ...]) -> float:
    """As ours is judged: L1 of the decoded mean, clipped to [0, 1]."""
    with torch.inference_mode():
        images = [reference.autoencoder.eval().reconstruct(image).clamp(0, 1) for image in held_out]
    return sum((a - b).abs().mean().item() for a, b in zip(images, held_out, strict=True)) / len(held_out)


def stage_2(train: Tensor, validation: Tensor, steps: int) -> dict[str, Any]:
    constant = ("diffusion_train.lr=1e-3", "diffusion_train.lr_schedule=constant", "diffusion_train.warm_up_steps=0")
    cfg = settings("demo", DDPM, *constant)
    autoencoder, _ = load_autoencoder(WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        caches = [cached(Path(folder), autoencoder, images) for images in (train, validation)]
        ours = DiffusionStage(cfg, CPU, TOTAL_STEPS, caches[0].statistics(False))
        order = batches(len(train), cfg.diffusion_train.batch_size, steps)
        reference = ReferenceDiffusion(cfg, autoencoder, ours.unet, train[order[0]], CPU)
        start = ours.validate(caches[1])["loss"]
        for step, indices in enumerate(order):
            random = StepRandom(0, step, len(indices), CPU)
            ours.train_step({"latent": caches[0].sample(indices, random), "case": [""]}, random)
            reference.train_step(train[indices])
        after = ours.validate(caches[1])["loss"]
        without = judge_2(cfg, ours.unet, ours.statistics.scale_factor, caches)
        theirs = judge_2(cfg, reference.unet, reference.inferer.scale_factor, caches)
    return {
        "stage": "diffusion, MSE of the noise",
        "volumes seen": steps * cfg.diffusion_train.batch_size,
        "at the start": start,
        "ours": after,
        "ours without running average": without,
        "reference": theirs,
    }


def judge_2(cfg: Any, unet: torch.nn.Module, scale_factor: float, caches: list[LatentCache]) -> float:
    """The loss of weights as they are, by our validation."""
    judge = DiffusionStage(cfg, CPU, TOTAL_STEPS, caches[0].statistics(False))
    judge.statistics = type(judge.statistics)(judge.statistics.mean, scale_factor)
    judge.ema.network.load_state_dict(unet.state_dict())
    return judge.validate(caches[1])["loss"]


def cached(folder: Path, autoencoder: Any, images: Tensor) -> LatentCache:
    names = [f"{len(images)}-{i}" for i in range(len(images))]
    return build_latent_cache(folder, autoencoder, "demo", Images(images), names, False, CPU)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
