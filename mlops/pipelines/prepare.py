"""Check and prepare every volume, and split the cases, on a machine without a GPU: what stage 1 would begin with.

python -m mlops.pipelines.prepare -c config/config_demo.json -e environment.json --set data.cache_dir=CACHE
"""

import argparse
from pathlib import Path

from ldm3d.config import load_config, load_environment
from ldm3d.data import prepare_data
from mlops.commands import Parser, run_command


def main() -> int:
    args = parse()
    prepare_data(load_config(args.config_file, args.set), load_environment(args.environment_file))
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.pipelines.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config-file", type=Path, required=True, help="training configuration (JSON)")
    parser.add_argument("-e", "--environment-file", type=Path, required=True, help="where to read and write (JSON)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a key of the config")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
