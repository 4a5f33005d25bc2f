"""Do fewer sampling steps cost quality? The demo's weights with few Euler steps against 1000 of the same weights.

    python -m benchmarks.quality --data data/phantom
    python -m benchmarks.quality --data data/phantom --num 32 --steps 5 10 20 30 1000

Every number of steps starts from the same noise, so volumes are compared with their own 1000-step counterpart, and all
sets with held-out real volumes. It takes about 15 minutes on one core, so `make bench` leaves it out.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import arguments, table, write_result
from ldm3d.config import load_config
from ldm3d.data import prepare_data
from ldm3d.interior import interior
from ldm3d.metrics import fidelity
from ldm3d.sampling import Sampler
from ldm3d.schema import Environment
from ldm3d.volumes import crop_or_pad

CONFIG, WEIGHTS = Path("config/config_demo.json"), Path("checkpoints/demo")
SEED = 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/phantom"), help="data set of the demo (`make demo`)")
    parser.add_argument("--num", type=int, default=32, help="volumes of each number of steps")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 30, 1000], help="the last is the truth")
    args = parser.parse_args()
    real = held_out(args)
    sets = {steps: generate(steps, args) for steps in args.steps}
    truth = sets[args.steps[-1]]
    rows = [{"steps": steps, **judge(real, volumes), **distance(truth, volumes)} for steps, volumes in sets.items()]
    print(table(rows))
    write_result(args.output, {"volumes": args.num, "reference": len(real), "seed": SEED, "rows": rows})


def held_out(args: argparse.Namespace) -> list[np.ndarray]:
    """The demo's validation volumes, on the grid that is generated."""
    cfg = load_config(CONFIG, [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = Environment(model_dir=folder, tfevent_path=folder, output_dir=folder, data_base_dir=args.data)
        data = prepare_data(cfg, env)
    size = cfg.diffusion_train.patch_size
    return [crop_or_pad(data.cache.load(case), size) for case in data.split.validation]


def generate(steps: int, args: argparse.Namespace) -> list[np.ndarray]:
    sampler = Sampler.from_folder(WEIGHTS, torch.device("cpu"))
    size = 8
    volumes = [sampler.sample(SEED, range(i, min(i + size, args.num)), steps=steps) for i in range(0, args.num, size)]
    return [volume[0].numpy() for volume in torch.cat(volumes)]


def judge(real: list[np.ndarray], volumes: list[np.ndarray]) -> dict[str, float | None]:
    """KID and MMD in image features, sharpness and contrast inside the brain (1 is like real)."""
    measures = fidelity(real, volumes) | interior(real, volumes)
    wanted = {"kid": "KID", "mmd": "MMD", "sharpness": "sharpness", "interior_contrast": "contrast"}
    return {label: measures[name].get("value") for name, label in wanted.items() if name in measures}


def distance(truth: list[np.ndarray], volumes: list[np.ndarray]) -> dict[str, float]:
    """Mean absolute difference of each volume from that of all steps and the same noise, in units of [0, 1]."""
    pairs = zip(truth, volumes, strict=True)
    return {"L1 to most steps": float(np.mean([np.abs(a - b).mean() for a, b in pairs]))}


if __name__ == "__main__":
    main()
