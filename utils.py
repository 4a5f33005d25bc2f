"""What the scripts share and nothing else: arguments, run set-up and tear-down, errors as one line."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from ldm3d import distributed
from ldm3d.allocator import keep_freed_memory
from ldm3d.checkpoint import LAST, require_state
from ldm3d.config import load_config, load_environment
from ldm3d.errors import ConfigError, UserError
from ldm3d.files import require_writable
from ldm3d.json_lines import use_json_lines
from ldm3d.schema import Config, Environment
from ldm3d.tracking import Tracker, open_tracker

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


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
    parser.add_argument("--resume", action="store_true", help="go on where the last checkpoint stands")
    parser.add_argument("--init-from", type=Path, metavar="DIR", help="start with the published weights in DIR")
    parser.add_argument("--dry-run", action="store_true", help="check everything, make one step, write no weights")
    parser.add_argument("--seed", type=int, help="seed of everything random; the configuration's by default")
    parser.add_argument("--profile", type=int, metavar="N", help="trace N steps, and show where their time went")
    return parser


def read_settings(args: argparse.Namespace) -> tuple[Config, Environment]:
    """Configuration and environment that the arguments name. Raises `ConfigError`."""
    seed = getattr(args, "seed", None)
    overrides = [*args.set, *([f"seed={seed}"] if seed is not None else [])]
    return load_config(args.config_file, overrides), load_environment(args.environment_file)


@dataclass
class Run:
    """What a training run stands on: its settings, its device, its tracker, and whether it was asked to stop."""

    cfg: Config
    env: Environment
    device: torch.device
    tracker: Tracker
    last: Path
    resume: bool
    init_from: Path | None
    stop_requested: bool = False

    def should_stop(self) -> bool:
        """Whether any process was interrupted; all of them agree on it."""
        flag = torch.tensor([float(self.stop_requested)], device=distributed.collective_device())
        return bool(distributed.all_sum(flag).item())


@contextmanager
def training_run(cfg: Config, env: Environment, args: argparse.Namespace, stage: str) -> Iterator[Run]:
    """Check what can be checked early, join the other processes, open the event file.

    Raises:
        ConfigError: arguments contradict each other or the machine.
        CheckpointError: there is nothing to resume from.
        OutputError: a folder cannot be written to.
    """
    resume, last = args.resume or env.resume_ckpt, env.model_dir / LAST[stage]
    if resume and args.init_from:
        raise ConfigError("--resume and --init-from exclude each other: a resumed run already has its weights")
    if resume:
        require_state(last)
    distributed.check_gpus(args.gpus)
    require_writable(env.model_dir)
    require_writable(env.tfevent_path)
    with (
        distributed.process_group(cfg.ddp_backend, cfg.ddp_timeout_seconds) as device,
        open_tracker(cfg, env, stage, device, resume, args.dry_run, args.profile) as tracker,
    ):
        yield Run(cfg, env, device, tracker, last, resume, args.init_from)


@contextmanager
def interrupts_noted(run: Run) -> Iterator[None]:
    """Within, the first Ctrl-C asks the run to stop after its step; the second one stops it at once."""

    def note(signum: int, frame: FrameType | None) -> None:
        if run.stop_requested:
            raise KeyboardInterrupt
        run.stop_requested = True

    previous: Any = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def run_script(main: Callable[[], None], after_interrupt: str = "interrupted") -> None:
    """Run `main`; turn a `UserError` into one line and exit status 2, Ctrl-C into `after_interrupt` and 130."""
    keep_freed_memory()
    if "--log-json" in sys.argv:
        use_json_lines()
    try:
        main()
    except UserError as error:
        if "--traceback" in sys.argv:
            raise
        if distributed.is_main() or error.met_by_one:
            print(f"error: {error.one_line()}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        if distributed.is_main():
            print(after_interrupt, file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
