"""What the scripts share and nothing else: arguments, run set-up and tear-down, errors as one line."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import ldm3d.quick_start  # noqa: F401  before all that imports monai
from ldm3d import distributed
from ldm3d.allocator import keep_freed_memory
from ldm3d.checkpoint import LAST, Checkpoints
from ldm3d.config import load_config, load_environment
from ldm3d.errors import MEMORY_GUIDE, UserError, shortage
from ldm3d.files import require_writable
from ldm3d.json_lines import use_json_lines
from ldm3d.run import Run, how_to_start
from ldm3d.schema import Config, Environment
from ldm3d.tracking import open_tracker

EXIT_LOST, EXIT_USER_ERROR = 1, 2
SECONDS_FOR_RANK_0 = 30.0
"""For which another process that has met rank 0's error waits: torchrun ends all as soon as one has ended."""


class Parser(argparse.ArgumentParser):
    """argparse with errors in the house's form: one line, `error: ...`, exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)


def script_parser(description: str) -> Parser:
    """A parser with what every script offers."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    parser.add_argument("--log-json", action="store_true", help="every line on stderr is a JSON object")
    return parser


def config_parser(description: str) -> Parser:
    """A parser for scripts that are driven by a training configuration."""
    parser = script_parser(description)
    parser.add_argument("-c", "--config-file", type=Path, required=True, help="training configuration (JSON)")
    parser.add_argument("-e", "--environment-file", type=Path, required=True, help="where to read and write (JSON)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", help="replace a key of the configuration"
    )
    return parser


def training_parser(description: str) -> Parser:
    """A parser for the two training stages."""
    parser = config_parser(description)
    parser.add_argument("-g", "--gpus", type=int, help="GPUs of this machine to be used; checked, not chosen")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="always",
        choices=["always", "auto"],
        help="go on where the last checkpoint stands; auto: start fresh where there is none",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where model_dir holds a training")
    parser.add_argument("--init-from", type=Path, metavar="DIR", help="start with the published weights in DIR")
    parser.add_argument("--dry-run", action="store_true", help="check everything, make one step, write no weights")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="make a step again that met NaN, and say where")
    parser.add_argument("--seed", type=int, help="seed of everything random; the configuration's by default")
    parser.add_argument("--profile", type=int, metavar="N", help="trace N steps, and show where their time went")
    return parser


def read_settings(args: argparse.Namespace) -> tuple[Config, Environment]:
    """Configuration and environment that the arguments name. Raises `ConfigError`."""
    seed = getattr(args, "seed", None)
    overrides = [*args.set, *([f"seed={seed}"] if seed is not None else [])]
    return load_config(args.config_file, overrides), load_environment(args.environment_file)


@contextmanager
def training_run(cfg: Config, env: Environment, args: argparse.Namespace, stage: str) -> Iterator[Run]:
    """Check what can be checked early, join the other processes, open the event file.

    Raises:
        ConfigError: arguments contradict each other or the machine.
        CheckpointError: there is nothing to resume from, or something that a fresh start would overwrite.
        OutputError: a folder cannot be written to.
    """
    checkpoints = Checkpoints(env.model_dir / LAST[stage], cfg.keep_last, cfg.checkpoint_every_minutes)
    writes = not (args.dry_run or args.replay)
    asked = args.resume or {True: "always", False: None, "auto": "auto"}[env.resume_ckpt]
    resume = writes and how_to_start(checkpoints, asked, args.init_from, args.overwrite)
    distributed.check_gpus(args.gpus)
    require_writable(env.model_dir)
    require_writable(env.tfevent_path)
    with (
        distributed.process_group(cfg.ddp_backend, cfg.ddp_timeout_seconds) as device,
        open_tracker(cfg, env, stage, device, resume, not writes, args.profile) as tracker,
    ):
        yield Run(cfg, env, device, tracker, checkpoints, resume, None if resume else args.init_from)


def run_script(main: Callable[[], None], after_interrupt: str = "interrupted") -> None:
    """Run `main`; a `UserError` becomes one line and exit status 2, an interrupt `after_interrupt` and 128 + signal."""
    keep_freed_memory()
    if "--log-json" in sys.argv:
        use_json_lines()
    try:
        main()
    except UserError as error:
        if "--traceback" in sys.argv:
            raise
        alone = not distributed.is_main() and not error.met_by_one
        if alone:
            time.sleep(SECONDS_FOR_RANK_0)
        # Who is still there has met what rank 0 has not: a volume that it alone reads, a file of its own machine.
        print(f"error: {_this_rank() if alone else ''}{error.one_line()}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except (RuntimeError, MemoryError) as error:
        if "--traceback" in sys.argv or not (shortage(error) or distributed.lost(error)):
            raise
        rank = _this_rank()
        if short := shortage(error):
            print(f"error: {rank}out of memory: {short}; lower batch_size, or see {MEMORY_GUIDE}", file=sys.stderr)
            raise SystemExit(EXIT_USER_ERROR) from None
        said = str(error).splitlines()[0]
        print(f"error: {rank}another process has ended or does not answer; {said}", file=sys.stderr)
        raise SystemExit(EXIT_LOST) from None
    except KeyboardInterrupt as stop:
        if distributed.is_main():
            print(after_interrupt, file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "signum", signal.SIGINT)) from None


def _this_rank() -> str:
    return f"rank {os.environ['RANK']}: " if distributed.launched_by_torchrun() else ""
