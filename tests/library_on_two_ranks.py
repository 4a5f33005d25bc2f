"""One of two processes that test_distributed.py starts: does what ranks do together, and notes what it got."""

import sys
from pathlib import Path
from typing import Any

import tiny
import torch

from ldm3d import distributed
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.checkpoint import Checkpoints
from ldm3d.diffusion_stage import DiffusionStage
from ldm3d.latents import LatentCache, LatentStatistics, build_latent_cache

NUM_VOLUMES = 5


def cache(root: Path) -> LatentCache:
    """Of an odd number of volumes, so that the ranks' shares differ."""
    volumes = tiny.Volumes(tiny.images(NUM_VOLUMES))
    contents = [f"content {i}" for i in range(NUM_VOLUMES)]
    return build_latent_cache(root, tiny.autoencoder(), "weights", volumes, contents, True, tiny.CPU)


def diffusion_stage() -> DiffusionStage:
    """With a running average whose predictions are not zero, as they are at the start."""
    stage = DiffusionStage(tiny.config(), tiny.CPU, 10, LatentStatistics(torch.zeros(1, 1, 1, 1), 1.5))
    tiny.shaken(stage.ema.network)
    return stage


def together() -> dict[str, Any]:
    """What each helper gives."""
    rank = distributed.rank()
    return {
        "rank": rank,
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
        "sum": distributed.all_sum(torch.tensor([1.0, 10.0 * rank])).tolist(),
        "gathered": distributed.gather_objects({"rank": rank}),
        "broadcast": distributed.broadcast_object(f"from {rank}"),
    }


def random_numbers() -> torch.Tensor:
    """Two volumes' own, and one of the global random state."""
    return torch.cat([tiny.random(3, seed=7).normal(), torch.rand(1)])


def trained() -> dict[str, Any]:
    """Both stages after two steps, each rank with volumes of its own."""
    cfg = tiny.config()
    rank = distributed.rank()
    one, two = AutoencoderStage(cfg, tiny.CPU, 10), diffusion_stage()
    for step in range(2):
        one.train_step(tiny.batch(seed=10 * rank + step), tiny.random(step), adversarial=True)
        random = tiny.random(step)
        two.train_step({"latent": random.normal(cfg.latent_shape), "case": ["a", "b"]}, random)
    return {"autoencoder": one.state_dict(), "diffusion": two.state_dict()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with distributed.process_group("gloo", 60) as device:
        latents = cache(folder / "latents")
        statistics = {centre: vars(latents.statistics(centre)) for centre in (False, True)}
        validation = diffusion_stage().validate(latents)
        volumes = [tiny.batch(1, seed=i) for i in range(3)][distributed.rank() :: 2]
        seen = {
            "device": str(device),
            "helpers": together(),
            "random": random_numbers(),
            "statistics": statistics,
            "diffusion validation": validation,
            "autoencoder validation": AutoencoderStage(tiny.config(), tiny.CPU, 1).validate(volumes)[0],
            "trained": trained(),
        }
        Checkpoints(folder / "state.pt", 1, 1).save({"rank": distributed.rank()})
        # Its barrier is passed: the file of rank 0 is there for every rank.
        seen["state is there"] = (folder / "state.pt").is_file()
        torch.save(seen, folder / f"rank{distributed.rank()}.pt")
    assert not torch.distributed.is_initialized()
