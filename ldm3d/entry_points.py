"""The console commands of an installed package: each runs one of the scripts, as `python script.py` does.

The wheel has the scripts and `utils.py` in `ldm3d/scripts`; in a checkout they lie at its top.
"""

import argparse
import importlib.util
import shutil
import sys
from functools import partial
from pathlib import Path

INSTALLED = Path(__file__).parent / "scripts"
SCRIPTS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1]


def run_script(name: str) -> None:
    """Run a script as the main program, so that it knows its arguments and processes that it spawns find it again."""
    sys.path.insert(0, str(SCRIPTS))  # where it finds utils.py
    spec = importlib.util.spec_from_file_location("__main__", SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    main = importlib.util.module_from_spec(spec)
    main.__spec__ = None
    sys.modules["__main__"] = main
    spec.loader.exec_module(main)


download_brats_data = partial(run_script, "download_brats_data")
evaluate = partial(run_script, "evaluate")
inference = partial(run_script, "inference")
train_autoencoder = partial(run_script, "train_autoencoder")
train_diffusion = partial(run_script, "train_diffusion")
visualize_image = partial(run_script, "visualize_image")


def copy_configs() -> int:
    """Lay the configs that came with the package into the current folder."""
    parser = argparse.ArgumentParser(description="Copy the project's configs to a folder, where they can be changed.")
    parser.add_argument("--output", type=Path, default=Path("config"), help="a folder that does not exist yet")
    output = parser.parse_args().output
    if output.exists():
        print(f"error: {output}: exists already; name another folder with --output", file=sys.stderr)
        return 2
    try:
        shutil.copytree(SCRIPTS / "config", output)
    except OSError as error:
        print(f"error: {output}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{len(list(output.iterdir()))} files in {output}")
    return 0
