"""Reading data on a CPU: cold start, first and later epochs, one volume; ours, decoding again, MONAI's CacheDataset.

python -m benchmarks.data
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import arguments, interleaved, table, write_result
from benchmarks.reference import ReferenceAutoencoder, reference_dataset
from benchmarks.settings import CPU, settings
from benchmarks.steps import autoencoder_step
from ldm3d.allocator import keep_freed_memory
from ldm3d.data import Prepared, prepare_data, train_loader
from ldm3d.networks import build_autoencoder
from ldm3d.phantom import write_dataset
from ldm3d.schema import Config, Environment
from ldm3d.volumes import load_prepared

CONFIG = Path("config/config_demo.json")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--start-reference", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    cfg = settings("demo")
    if args.start_reference:
        first_reference_step(cfg, args.start_reference)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, shape, spacing = (4, (48, 64, 48), 3.2) if args.tiny else (12, (154, 205, 154), 1.0)
        write_dataset(folder / "data", count, shape=shape, spacing=spacing)
        rows = [] if args.tiny else cold_starts(folder)
        rows += epochs(cfg, folder)
        print(table(rows))
        write_result(args.output, {"volumes": count, "voxels": shape, "spacing_mm": spacing, "rows": rows})


def environment(folder: Path) -> Environment:
    out = folder / "out"
    return Environment(model_dir=out, tfevent_path=out, output_dir=out, data_base_dir=folder / "data")


def cold_starts(folder: Path) -> list[dict[str, Any]]:
    """From the command to the end of the first training step: ours twice, as the second start finds the cache."""
    file = folder / "environment.json"
    file.write_text(json.dumps({key: str(value) for key, value in environment(folder).model_dump().items() if value}))
    ours = [sys.executable, "train_autoencoder.py", "-c", str(CONFIG), "-e", str(file), "--dry-run"]
    reference = [sys.executable, "-m", "benchmarks.data", "--start-reference", str(folder)]
    first, second, theirs = (elapsed(command) for command in (ours, ours, reference))
    return [
        {"what": "command to first step, s", "ours": first, "reference": theirs, "times as fast": theirs / first},
        {"what": "the same, later starts, s", "ours": second, "reference": theirs, "times as fast": theirs / second},
    ]


def elapsed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def first_reference_step(cfg: Config, folder: Path) -> None:
    dataset = reference_dataset(files(folder), cfg, cfg.autoencoder_train.patch_size, random_crop=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=cfg.autoencoder_train.batch_size, shuffle=True)
    weights = build_autoencoder(cfg.autoencoder_def)
    ReferenceAutoencoder(cfg, weights, CPU).train_step(next(iter(loader))["image"].as_tensor())


def files(folder: Path) -> list[Path]:
    return sorted((folder / "data" / "Task01_BrainTumour" / "imagesTr").glob("*.nii.gz"))


def epochs(cfg: Config, folder: Path) -> list[dict[str, Any]]:
    """Reading alone: a first and a second epoch of ours, decoding every volume again, and the reference's epoch."""
    prepared = prepare_data(cfg, environment(folder))
    # A fresh start that finds the cache: nothing has been read in this process yet.
    prepared = Prepared(prepared.split, type(prepared.cache)(prepared.cache.folder, prepared.cache.spacing))
    prepared.cache.build(prepared.split.train)
    cases = prepared.split.train
    loader = train_loader(prepared, cfg, "autoencoder")
    first = timed(lambda: read(loader, 0))
    dataset = reference_dataset([case.image for case in cases], cfg, cfg.autoencoder_train.patch_size, True)
    works = {
        "second": lambda: read(loader, 1),
        "decode": lambda: load_prepared(cases[0], cfg.spacing),
        "reference": lambda: [dataset[i] for i in range(len(cases))],
    }
    timings = interleaved(works, CPU, 5)
    step = interleaved({"step": autoencoder_step(cfg, CPU, ours=True)}, CPU, 3)["step"].median
    visited = len(loader) * cfg.autoencoder_train.batch_size
    read_one = timings["second"].median / visited
    reference_one = timings["reference"].median / len(cases)
    decode = timings["decode"].median
    wait = read_one * cfg.autoencoder_train.batch_size / step
    return [
        {
            "what": "volume of the first epoch, ms",
            "ours": 1000 * first / visited,
        },
        {
            "what": "volume of later epochs, ms",
            "ours": 1000 * read_one,
            "reference": 1000 * reference_one,
            "times as fast": reference_one / read_one,
        },
        {"what": "decoding and preparing a NIfTI file again, ms", "ours": 1000 * decode},
        {"what": "later epochs against decoding again", "times as fast": decode / read_one},
        {"what": "share of a training step that waits for data", "ours": wait},
    ]


def read(loader: Any, epoch: int) -> None:
    loader.batch_sampler.set_epoch(epoch)
    for _ in loader:
        pass


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
