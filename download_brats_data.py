"""Get data to train on: Task01_BrainTumour of the Medical Segmentation Decathlon, or the embedded data set."""

import argparse
import os
from pathlib import Path
from typing import Any

import utils
from ldm3d.config import load_environment
from ldm3d.download import URL, download_dataset
from ldm3d.phantom import DEFAULT_SHAPE, DEFAULT_SPACING, write_dataset

FOR_DOWNLOAD = ("url", "checksum")
FOR_PHANTOM = ("seed", "shape", "spacing", "workers")


def main() -> None:
    args = parse()
    root = load_environment(args.environment_file).data_base_dir
    if hasattr(args, "phantom"):
        write_dataset(root, args.phantom, **{"workers": available_cores(), **given(args, FOR_PHANTOM)})
    else:
        download_dataset(root, **given(args, FOR_DOWNLOAD))


def parse() -> argparse.Namespace:
    parser = utils.script_parser(__doc__)
    parser.add_argument(
        "-e", "--environment-file", type=Path, default=Path("config/environment.json"), help="names data_base_dir"
    )
    real = parser.add_argument_group("the Decathlon's data, 7 GB (default)", argument_default=argparse.SUPPRESS)
    real.add_argument("--url", help=f"a mirror (http, https or file) instead of {URL}")
    real.add_argument("--checksum", help="MD5 or SHA-256 of the archive, if the mirror's is another")
    made = parser.add_argument_group("the embedded data, no network needed", argument_default=argparse.SUPPRESS)
    made.add_argument(
        "--phantom",
        type=int,
        metavar="N",
        help="make N brains from the ICBM152 template instead of downloading",
    )
    made.add_argument("--seed", type=int, help="another seed, other brains (default: 0)")
    made.add_argument(
        "--size", dest="shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help=f"voxels (default: {DEFAULT_SHAPE})"
    )
    made.add_argument("--spacing", type=float, metavar="MM", help=f"edge of a voxel (default: {DEFAULT_SPACING})")
    made.add_argument("--workers", type=int, help="processes (default: one for each core)")
    args = parser.parse_args()
    makes = hasattr(args, "phantom")
    for name in given(args, FOR_DOWNLOAD if makes else FOR_PHANTOM):
        option = "--size" if name == "shape" else f"--{name}"
        parser.error(f"{option} has no meaning with --phantom" if makes else f"{option} needs --phantom")
    return args


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the options `names` that stand on the command line."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    utils.run_script(main)
