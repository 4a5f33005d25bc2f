"""Make many volumes with trained weights, shared out among shards: processes that know nothing of each other.

Volume i has the same bytes as the one that inference.py makes with the same weights, seed and settings, whatever the
number of shards. A shard that was stopped or killed goes on where it was when the same command is given again. The
shard that ends last writes manifest.json, which lists every file with its digest.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import ldm3d.quick_start  # noqa: F401  before all that imports monai
from ldm3d import __version__, distributed
from ldm3d.allocator import keep_freed_memory
from ldm3d.console import log
from ldm3d.errors import MEMORY_GUIDE, ConfigError, UserError, shortage
from ldm3d.json_lines import use_json_lines
from ldm3d.samplers import LARGEST_SEED, choose_sampler
from ldm3d.sampling import Sampler
from ldm3d.signals import StopRequest
from mlops.batch.records import MANIFEST, Begun, Head, Settings, begin, finish, read_begun
from mlops.batch.shard import make_shard, this_machine
from mlops.batch.store import Store, open_store
from mlops.commands import EXIT_USER_ERROR, Parser

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
EXAMPLES = """examples:
  python -m mlops.batch --weights checkpoints/demo --num 8 --output results/batch
  python -m mlops.batch --weights checkpoints/demo --num 10000 --shards 16 --shard 3 --output s3://bucket/brains
  python -m mlops.batch --finish --output s3://bucket/brains

exit status: 0 done, 2 something that you can mend, 143 stopped by SIGTERM (130: Ctrl-C), to be started again
"""


def main() -> None:
    args = parse()
    stop = StopRequest()
    with stop.noted():
        if args.finish:
            store = open_store(args.output)
            begun = read_begun(store)
            if unfinished := finish(store, begun):
                raise ConfigError(f"{store.name}: no manifest yet: {_shards(unfinished, begun)} not ended")
            log(f"{store.name}/{MANIFEST}: {begun.settings.num} volumes")
        else:
            sample(args, chosen_shard(args), stop)


def sample(args: argparse.Namespace, shard: int, stop: StopRequest) -> None:
    """Make one shard, and the manifest if it is the last.

    Raises:
        UserError: of many kinds; before anything is sampled, except where a file cannot be written.
        Stopped: as asked, after the batch that was under way.
    """
    store = open_store(args.output)
    with distributed.process_group(None, 0) as device:
        sampler = Sampler.from_folder(args.weights, device)
        scheduler, steps = choose_sampler(sampler.card.schedule, args.scheduler, args.steps)
        settings = Settings(
            num=args.num,
            seed=args.seed,
            shards=args.shards,
            scheduler=scheduler,
            steps=steps,
            dtype=args.dtype,
            weights_sha256=sampler.digests,
            code_version=__version__,
        )
        machine = this_machine(sampler)
        begun = begin(store, settings, machine)
        head = Head(shard=shard, settings=settings, machine=machine)
        make_shard(store, sampler, begun, head, args.batch_size, stop)
    tell_end(store, begun)


def tell_end(store: Store, begun: Begun) -> None:
    unfinished = finish(store, begun)
    if unfinished:
        log(f"{MANIFEST} follows: {_shards(unfinished, begun)} not ended")
    else:
        log(f"{store.name}/{MANIFEST}: {begun.settings.num} volumes, all shards have ended")


def _shards(unfinished: list[int], begun: Begun) -> str:
    shown = ", ".join(map(str, unfinished[:10])) + (f" and {len(unfinished) - 10} more" if len(unfinished) > 10 else "")
    one = len(unfinished) == 1
    return f"shard{'' if one else 's'} {shown} of {begun.settings.shards} {'has' if one else 'have'}"


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m mlops.batch",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to make; the same for all shards")
    what.add_argument("--weights", type=Path, metavar="DIR", help="folder with the published weights")
    what.add_argument("-n", "--num", type=positive, help="number of volumes of all shards together")
    what.add_argument("--seed", type=seed, default=0, help="the same seed gives the same volumes; 0 by default")
    what.add_argument(
        "--steps", type=positive, help="network evaluations per volume; as the weights suggest by default"
    )
    what.add_argument("--scheduler", help="ddpm, ddim, pndm or rflow, as far as the training allows")
    what.add_argument("--dtype", choices=("float32", "int16"), default="float32", help="number type of the files")
    what.add_argument("--output", required=True, help="a folder, or s3://..., gs://..., abfs://... (fsspec)")
    share = parser.add_argument_group("which part of it")
    share.add_argument("--shards", type=positive, default=1, help="number of shards, 1 by default")
    share.add_argument("--shard", type=int, help=f"which one, from 0; {INDEX_VARIABLE} by default")
    share.add_argument("--finish", action="store_true", help="sample nothing: only write manifest.json")
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=positive, default=1, help="volumes at once, 1 by default")
    how.add_argument("--log-json", action="store_true", help="every line on stderr is a JSON object")
    how.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    args = parser.parse_args()
    missing = [name for name in ("weights", "num") if getattr(args, name) is None]
    if missing and not args.finish:
        parser.error("these are needed: " + ", ".join(f"--{name}" for name in missing))
    return args


def chosen_shard(args: argparse.Namespace) -> int:
    """The shard that this process makes: as asked, or as Kubernetes has numbered the pod.

    Raises:
        ConfigError: nobody said which, or there is no such shard.
    """
    if distributed.launched_by_torchrun():
        raise ConfigError("RANK and WORLD_SIZE are set, as by torchrun: start one process for each shard instead")
    if args.shards > args.num:
        raise ConfigError(
            f"--shards {args.shards}: more than the {args.num} volumes; take --shards {args.num} or fewer"
        )
    index = os.environ.get(INDEX_VARIABLE, "")
    given, source = (args.shard, "--shard") if args.shard is not None else (index, INDEX_VARIABLE)
    if given == "" and args.shards == 1:
        return 0
    if given == "":
        raise ConfigError(f"--shard: say which of the {args.shards} shards, 0 to {args.shards - 1}")
    if not str(given).isdecimal() or int(given) >= args.shards:
        raise ConfigError(f"{source} {given}: must be between 0 and {args.shards - 1}, as --shards is {args.shards}")
    return int(given)


def positive(text: str) -> int:
    return _number(text, 1, 10**9, "a whole number between 1 and a billion")


def seed(text: str) -> int:
    return _number(text, 0, LARGEST_SEED, f"a whole number between 0 and {LARGEST_SEED}")


def _number(text: str, least: int, most: int, wanted: str) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


def run(command: Callable[[], None]) -> None:
    """Run `command`; a `UserError`, or a lack of memory, becomes one line and exit status 2, a stop 128 + signal."""
    keep_freed_memory()
    if "--log-json" in sys.argv:
        use_json_lines()
    try:
        command()
    except UserError as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {error.one_line()}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except (RuntimeError, MemoryError) as error:
        if "--traceback" in sys.argv or not (short := shortage(error)):
            raise
        print(f"error: out of memory: {short}; lower --batch-size, or see {MEMORY_GUIDE}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        word = "terminated" if signum == signal.SIGTERM else "interrupted"
        print(f"{word}: the same command goes on with what is missing", file=sys.stderr)
        raise SystemExit(128 + signum) from None


if __name__ == "__main__":
    run(main)
