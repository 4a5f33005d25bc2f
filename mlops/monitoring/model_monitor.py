"""Looks at what the service generates, and compares versions of a model.

    python -m mlops.monitoring.model_monitor serve [--port 9108]     figures of the volumes, for Prometheus
    python -m mlops.monitoring.model_monitor compare demo/1 demo/2   which version is better, or not yet known
    python -m mlops.monitoring.model_monitor caller key:q3k9x0ab     what a caller is called in the service's metrics

The service's data folder, LDM3D_DATA_DIR, is read and never written to. What the service counts itself (requests,
latency, queue, errors, devices) is on its own /metrics.
"""

import argparse
import logging
import os
import signal
import threading
from pathlib import Path

from prometheus_client import start_http_server

from ldm3d.errors import ConfigError, DataError
from mlops.api.settings import load_settings
from mlops.api.usage import pseudonym
from mlops.commands import Parser, run_command
from mlops.monitoring.comparison import compare
from mlops.monitoring.quality_metrics import REGISTRY
from mlops.monitoring.watching import Watcher

log = logging.getLogger(__name__)

PAUSE_SECONDS = 15.0
NICENESS = 10
"""The service comes first."""


def main() -> int:
    parser = Parser(
        prog="python -m mlops.monitoring.model_monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    serving = commands.add_parser("serve", help="look at each finished volume, and serve the figures")
    serving.add_argument("--port", type=int, default=9108, help="where Prometheus asks, on all addresses; 9108")
    comparing = commands.add_parser("compare", help="which of two versions is better, as far as that is known")
    comparing.add_argument("one", metavar="MODEL/VERSION")
    comparing.add_argument("other", metavar="MODEL/VERSION")
    comparing.add_argument("--alpha", type=probability, default=0.05, help="chance of a wrong answer; 0.05")
    naming = commands.add_parser("caller", help="what a caller is called in metrics")
    naming.add_argument("id", metavar="ID", help="as the audit log names it")
    args = parser.parse_args()
    data_dir = load_settings().data_dir
    if args.command == "serve":
        serve(data_dir, args.port)
    elif args.command == "compare":
        print(compare(data_dir, version(args.one), version(args.other), args.alpha))
    else:
        print(pseudonym(data_dir, args.id))
    return 0


def serve(data_dir: Path, port: int) -> None:
    """Look and serve until a signal comes.

    Raises:
        ConfigError: the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    os.nice(NICENESS)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    try:
        server, _ = start_http_server(port, registry=REGISTRY)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at port {port}: {error}") from error
    log.info("figures at http://0.0.0.0:%s/metrics", server.server_port)
    watcher = Watcher(data_dir)
    while not ending.is_set():
        try:
            watcher.look()
        except DataError as error:  # the service has not started yet; an alert says so if it never does
            log.warning("%s", error.one_line())
        except Exception:  # one job must not end the looks at all others; the alert Ldm3dMonitorStuck tells if it does
            log.exception("a look ended early")
        ending.wait(PAUSE_SECONDS)


def version(text: str) -> tuple[str, str]:
    """Names of model and version. Raises `ConfigError`."""
    model, slash, name = text.partition("/")
    if not (model and slash and name):
        raise ConfigError(f"{text}: name a version as MODEL/VERSION, demo/1")
    return model, name


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value


if __name__ == "__main__":
    run_command(main)
