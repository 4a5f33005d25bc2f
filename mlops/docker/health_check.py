"""Whether the program of this container lives, for HEALTHCHECK and probes; exit status 0 if so.

python mlops/docker/health_check.py
python mlops/docker/health_check.py --ready

MODE says what is asked: api answers /health, with --ready /ready; a worker says that it lives in data_dir, with --ready
that it has loaded its weights. Other modes end by themselves, and their exit status says it all.
"""

import os
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm3d.errors import UserError
from mlops.api.presence import workers
from mlops.api.settings import Settings, load_settings
from mlops.commands import Parser, run_command

TIMEOUT_SECONDS = 5
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}
"""How the address of a listener is reached from its own machine, where that is another one."""


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ready", action="store_true", help="whether it can work, not only whether it lives")
    args = parser.parse_args()
    match os.environ.get("MODE"):
        case "api":
            ask_service(load_settings(), "/ready" if args.ready else "/health")
        case "worker":
            ask_worker(load_settings(), args.ready)
    return 0


def ask_service(settings: Settings, path: str) -> None:
    """Raises `UserError` where the service does not answer, or not with 200."""
    address = EVERY_ADDRESS.get(settings.host, settings.host)
    url = f"http://{address}:{settings.port}{path}"
    # It answers to its own names only.
    host = {"Host": settings.trusted_hosts[0].replace("*", "x")} if settings.trusted_hosts else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(urllib.request.Request(url, headers=host), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        raise UserError(f"{path}: {error.read(500).decode(errors='replace')}") from error
    except OSError as error:
        raise UserError(f"{url}: {error}") from error


def ask_worker(settings: Settings, ready: bool) -> None:
    """Raises `UserError` where no worker of this machine has said lately that it lives."""
    states = [
        status.state
        for status in workers(settings.data_dir / "workers")
        if status.name.startswith(f"{socket.gethostname()[:40]}-")
    ]
    if not states:
        raise UserError("no worker of this container has given a sign of life")
    if ready and set(states) == {"starting"}:
        raise UserError("the worker is still starting")


if __name__ == "__main__":
    run_command(main)
