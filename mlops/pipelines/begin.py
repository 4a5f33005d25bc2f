"""What a step begins with: the environment file for the scripts, and what the steps before it have published.

python -m mlops.pipelines.begin --data DATA --model MODEL --take SPLIT --environment environment.json

`--output` names a folder for generated volumes other than `samples` in the model's.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ldm3d.cards import AUTOENCODER, DISCRIMINATOR
from ldm3d.errors import DataError
from ldm3d.files import atomic_path, write_text
from mlops.commands import Parser, run_command

SPLIT = "split.json"
TAKEN = (SPLIT, AUTOENCODER, DISCRIMINATOR)
"""Files that a step hands on."""


def take(folders: Sequence[Path], model_dir: Path) -> None:
    """Copy what earlier steps handed on into `model_dir`, whole or not at all.

    What is there stays: then this is the second start of a step whose machine was taken away.

    Raises:
        DataError: a folder has none of it.
        OutputError: `model_dir` cannot be written to.
    """
    for folder in folders:
        found = [folder / name for name in TAKEN if (folder / name).is_file()]
        if not found:
            raise DataError(f"{folder}: has none of {', '.join(TAKEN)}; is it the output of an earlier step?")
        for source in found:
            if not (model_dir / source.name).is_file():
                with atomic_path(model_dir / source.name) as path:
                    shutil.copyfile(source, path)


def main() -> int:
    args = parse()
    take(args.take, args.model)
    paths = {
        "model_dir": args.model,
        "tfevent_path": args.model / "runs",
        "output_dir": args.output or args.model / "samples",
        "data_base_dir": args.data,
    }
    write_text(args.environment, json.dumps({key: str(path) for key, path in paths.items()}, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.pipelines.begin", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="raw data")
    parser.add_argument("--model", type=Path, required=True, help="model_dir of the step")
    parser.add_argument("--take", type=Path, action="append", default=[], help="output of an earlier step")
    parser.add_argument("--output", type=Path, help="where generated volumes go")
    parser.add_argument("--environment", type=Path, required=True, help="environment file to be written")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
