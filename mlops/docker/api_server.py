"""Start the service: the web process, and beside it the worker that generates.

python mlops/docker/api_server.py
python mlops/docker/api_server.py --host 0.0.0.0 --port 8000 --data-dir service_data --workers 1

Everything else is set by environment variables `LDM3D_...`: see docs/API.md.
"""

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm3d.errors import ConfigError, OutputError, UserError  # noqa: E402
from mlops.api.settings import Settings, load_settings  # noqa: E402
from mlops.commands import EXIT_USER_ERROR, Parser  # noqa: E402

SHUTDOWN_SECONDS = 20
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A worker that has lived so long has started well: the next one is not waited for."""


class Workers:
    """The worker processes: one that dies is started again; all end with this process, however it ends.

    Args:
        count: how many.
        give_up: called where a worker cannot start because of what the operator has set.
    """

    def __init__(self, count: int, give_up: "threading.Event"):
        self.give_up = give_up
        self.ending = threading.Event()
        self._threads = [threading.Thread(target=self._keep_one) for _ in range(count)]
        self._running: list[subprocess.Popen[bytes]] = []
        for thread in self._threads:
            thread.start()

    def _keep_one(self) -> None:
        from mlops.api import metrics  # not before `count_into_files`

        pause = 1.0
        while not self.ending.is_set():
            began = time.monotonic()
            # Its stdin is never written to: it closes when this process ends, and so ends the worker.
            try:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "mlops.api.worker", "--attached"],
                    stdin=subprocess.PIPE,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                )
            except OSError as error:  # no memory, no file handles: perhaps later
                print(f"warning: a worker cannot be started: {error}", file=sys.stderr)
                self.ending.wait(LONGEST_PAUSE_SECONDS)
                continue
            self._running.append(worker)
            code = worker.wait()
            self._running.remove(worker)
            metrics.bury(worker.pid)
            if self.ending.is_set():
                return
            if code == EXIT_USER_ERROR:
                self.give_up.set()
                os.kill(os.getpid(), signal.SIGTERM)
                return
            pause = 1.0 if time.monotonic() - began > STEADY_SECONDS else min(2 * pause, LONGEST_PAUSE_SECONDS)
            print(f"warning: a worker has ended (exit status {code}); starting another", file=sys.stderr)
            self.ending.wait(pause)

    def end(self) -> None:
        """Stop them; the jobs that they have wait for the next start."""
        self.ending.set()
        for worker in list(self._running):
            worker.terminate()
        until = time.monotonic() + SHUTDOWN_SECONDS
        for thread in self._threads:
            thread.join(max(0.1, until - time.monotonic()))
        for worker in list(self._running):
            worker.kill()


def main() -> int:
    args = parse()
    given = {name: value for name, value in vars(args).items() if value is not None}
    try:
        settings = load_settings(**given)
        for name, value in given.items():  # the worker must see the same
            os.environ[f"LDM3D_{name.upper()}"] = str(value)
        count_into_files(settings)
        return serve(settings)
    except UserError as error:
        print(f"error: {error.one_line()}", file=sys.stderr)
        return EXIT_USER_ERROR


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="address to listen at; 127.0.0.1 by default")
    parser.add_argument("--port", type=int, help="8000 by default")
    parser.add_argument("--data-dir", dest="data_dir", help="where everything is kept; service_data by default")
    parser.add_argument("--workers", type=int, help="worker processes beside the web process; 0: they run elsewhere")
    return parser.parse_args()


def count_into_files(settings: Settings) -> None:
    """Let all processes of this machine count their metrics in one folder, which begins empty.

    Raises:
        OutputError: it cannot be made.
    """
    folder = settings.data_dir / "metrics" / f"{socket.gethostname()[:40]}-{settings.port}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{settings.data_dir}: cannot be written: {error.strerror}") from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder.resolve())


def serve(settings: Settings) -> int:
    """Serve until a signal comes."""
    import uvicorn

    from mlops.api import tracing
    from mlops.api.app import create_app
    from mlops.api.connections import GuardedProtocol

    tracing.start("ldm3d-api")
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=GuardedProtocol,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=True,
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=10,
        log_level="warning",
    )
    listener = listen(settings.host, settings.port)
    many_connections()
    refused = threading.Event()
    workers = Workers(settings.workers, refused)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
    # In a thread: what the signal interrupts may hold the queue's lock.
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=app.state.service.ask_for_reload).start())
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"listening at http://{shown}:{port}{settings.root_path}/", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(config).run([listener])
    except SystemExit:
        if not refused.is_set():
            raise
    finally:
        workers.end()
        tracing.stop()
    return EXIT_USER_ERROR if refused.is_set() else 0


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises `ConfigError` where it is taken, or is not this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        # Python adds the address, which stands here already.
        reason = (error.strerror or str(error)).split(" (while")[0]
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}; LDM3D_PORT names another port") from error


def many_connections() -> None:
    """Slow clients hold connections: let there be as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # macOS says that there is no limit, and takes no number as large
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())
