"""What one volume costs, and from that what 100,000 would: measured, counted, and computed under stated assumptions.

    python -m benchmarks.scaling

docs/SCALING.md says what follows from it. All is measured on one core.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.growth import exponent
from benchmarks.measure import GIB, arguments, counted_flops, peak_resident, table, write_result
from benchmarks.scaling_plan import ASSUMED, plan
from benchmarks.settings import settings
from ldm3d.cache import VolumeCache
from ldm3d.cases import find_cases
from ldm3d.checkpoint import Checkpoints
from ldm3d.data import Prepared, prepare_data
from ldm3d.latents import LatentCache
from ldm3d.memory_phases import TRACED
from ldm3d.networks import build_autoencoder
from ldm3d.phantom import write_dataset
from ldm3d.schema import Config, Environment

# Of BraTS.
SHAPE, SPACING_MM = (240, 240, 155), 1.0
PAGE = 4096


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = settings("tiny") if args.tiny else settings("32g as shipped")
    with tempfile.TemporaryDirectory(dir=args.output.parent) as name:
        folder = Path(name)
        units = {
            **preparing(cfg, folder / "prepared", *(((32, 32, 32), 6.0) if args.tiny else (SHAPE, SPACING_MM))),
            **encoding(cfg, args.tiny),
            **training(cfg),
            **latents(cfg, folder / "latents"),
            **saving(cfg, folder / "state.pt"),
            **disk(folder / "file", GIB // 256 if args.tiny else 4 * GIB),
        }
        starts = [start_of(folder / str(n), n) for n in ((10, 20) if args.tiny else (1_000, 10_000, 100_000))]
    counts = [start["volumes"] for start in starts]
    units |= {f"start exponent of {unit}": exponent(counts, [start[unit] for start in starts]) for unit in ("s", "MiB")}
    rows = plan(units, cfg)
    print(json.dumps(units, indent=1), table(starts), table(rows), sep="\n\n")
    write_result(args.output, {"units": units, "starts": starts, "assumed": ASSUMED, "plan": rows})


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def environment(folder: Path) -> Environment:
    return Environment(model_dir=folder, tfevent_path=folder, output_dir=folder, data_base_dir=folder)


def preparing(cfg: Config, folder: Path, shape: tuple[int, int, int], spacing: float, count: int = 3) -> dict[str, Any]:
    """Volumes of BraTS's size and layout, four contrasts in one file: checked, resampled, stored; and then read."""
    write_dataset(folder, count, shape=shape, spacing=spacing)
    started = time.perf_counter()
    prepared = prepare_data(cfg, environment(folder))
    taken = (time.perf_counter() - started) / count
    case = prepared.split.train[0]
    verifying = seconds(lambda: prepared.cache.get(case))
    volume = prepared.cache.get(case)
    box = tuple(min(n, m) for n, m in zip(volume.shape, cfg.autoencoder_train.patch_size, strict=True))
    return {
        "source bytes": case.image.stat().st_size,
        "prepare s": taken,
        "prepared shape": volume.shape,
        "prepared bytes": PAGE + volume.nbytes,
        "first access s": verifying,
        "crop bytes": PAGE * pages_of_crop(volume.shape, box, volume.itemsize),
    }


def pages_of_crop(shape: tuple[int, ...], box: tuple[int, ...], itemsize: int) -> int:
    """Pages of a memory map that hold the middle box of a volume."""
    starts = [(n - m) // 2 for n, m in zip(shape, box, strict=True)]
    x, y = np.ix_(*(np.arange(s, s + m) for s, m in zip(starts[:2], box[:2], strict=True)))
    first = ((x * shape[1] + y) * shape[2] + starts[2]) * itemsize
    pages = np.concatenate([np.arange(a, b + 1) for a, b in zip(*page_range(first, box[2] * itemsize), strict=True)])
    return len(np.unique(pages))


def page_range(first: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    return first.ravel() // PAGE, (first.ravel() + length - 1) // PAGE


def encoding(cfg: Config, tiny: bool) -> dict[str, Any]:
    """Work of encoding one volume, counted at full size; seconds of a core on a volume of half the sides."""
    size = cfg.diffusion_train.patch_size
    with torch.device("meta"):
        shapes_only = build_autoencoder(cfg.autoencoder_def).eval()
    half = tuple(n // 2 for n in size)
    autoencoder = build_autoencoder(cfg.autoencoder_def).eval()
    image, small = torch.empty(1, 1, *size, device="meta"), torch.rand(1, 1, *half)
    with torch.inference_mode():
        flop = counted_flops(lambda: shapes_only.encode(image))
        small_flop = counted_flops(lambda: autoencoder.encode(small))
        on_core = min(seconds(lambda: autoencoder.encode(small)) for _ in range(1 if tiny else 2))
    return {"encode FLOP": flop, "encode s on a core": on_core * flop / small_flop, "core FLOP/s": small_flop / on_core}


def training(cfg: Config) -> dict[str, Any]:
    """Work of a volume in a training step, counted on stand-ins, and what the processes have to exchange."""
    found = {}
    for number, name in enumerate(TRACED, 1):
        with TRACED[name](cfg, True) as traced:
            flop = counted_flops(traced.train_step)
            weights = sum(p.numel() * p.element_size() for network in traced.networks for p in network.parameters())
            found |= {f"step {number} FLOP a volume": flop / traced.batch_size, f"gradient {number} bytes": weights}
            found[f"state {number} bytes"] = traced.parameters() + traced.moments() + traced.ema()
    return found


def latents(cfg: Config, folder: Path, count: int = 40) -> dict[str, Any]:
    """Posteriors on disk, the first start's walk through all of them, and later starts without it."""
    folder.mkdir()
    posteriors = np.random.default_rng(0).random((count, 2, 2, *cfg.latent_shape)).astype(np.float16)
    np.save(folder / "posteriors.npy", posteriors)
    (folder / "index.json").write_text(json.dumps({"cases": [str(i) for i in range(count)]}))
    cache = LatentCache(folder)
    return {
        "latent bytes": posteriors[0].nbytes,
        "latent bytes read a draw": posteriors[0, 0].nbytes,
        "moments s a volume": seconds(lambda: cache.statistics(False)) / count,
        "kept moments s": seconds(lambda: cache.statistics(False)),
    }


def saving(cfg: Config, path: Path) -> dict[str, Any]:
    """A state of stage 2's size, written as a training writes it."""
    with TRACED["diffusion"](cfg, True) as traced:
        nbytes = traced.parameters() + traced.moments() + traced.ema()
    state = {"all": torch.ones(nbytes // 4)}
    taken = seconds(lambda: Checkpoints(path, 1, 1).save(state))
    path.unlink()
    return {"saving state 2 s": taken}


def disk(path: Path, nbytes: int, block: int = 1 << 20) -> dict[str, Any]:
    """Bytes a second that this disk takes, and gives back in random blocks when the system has forgotten the file."""
    data = np.random.default_rng(0).bytes(block)
    with open(path, "wb+", buffering=0) as file:

        def write() -> None:
            for _ in range(nbytes // block):
                file.write(data)
            os.fsync(file.fileno())

        writing = seconds(write)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        order = np.random.default_rng(0).permutation(nbytes // block).tolist()
        reading = seconds(lambda: [os.pread(file.fileno(), block, i * block) for i in order])
    path.unlink()
    return {"disk write bytes/s": nbytes / writing, "disk read bytes/s": nbytes / reading}


def start_of(folder: Path, count: int) -> dict[str, Any]:
    """Starting with so many prepared cases, of one voxel each: what grows with their number, not with their size."""
    for i in range(count):
        case = folder / f"case-{i:06d}"
        case.mkdir(parents=True)
        (case / f"{case.name}_flair.nii.gz").write_text(str(i))
    cfg, cases = settings("demo"), find_cases(folder, settings("demo").data, 0)
    with (
        patch("ldm3d.cache.load_prepared", lambda case, spacing: np.ones((1, 1, 1))),
        patch("ldm3d.cache.says_orientation", lambda path: True),
        patch("ldm3d.files._flush"),
    ):
        VolumeCache(folder / "cache", cfg.spacing).build(cases)
    gib = peak_resident(started, folder)
    return {"volumes": count, "s": float((folder / "seconds").read_text()), "MiB": 1024 * gib}


def started(folder: Path) -> Callable[[], Prepared]:
    def start() -> Prepared:
        begun = time.perf_counter()
        prepared = prepare_data(settings("demo"), environment(folder))
        prepared.digest()
        (folder / "seconds").write_text(str(time.perf_counter() - begun))
        return prepared

    return start


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    main()
