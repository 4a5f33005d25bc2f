"""The worker process: takes jobs from the queue, keeps weights warm, loads new versions, and tidies up.

python -m mlops.api.worker
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime

import torch

from ldm3d.allocator import keep_freed_memory
from ldm3d.console import log
from ldm3d.errors import UserError
from ldm3d.files import write_text
from mlops.api import metrics
from mlops.api.catalogue import activate, prepare, read_active
from mlops.api.generation import Generation
from mlops.api.jobs import JobStore, open_store
from mlops.api.models import Models
from mlops.api.presence import Presence, is_alive
from mlops.api.queue import POLL_SECONDS, RELOAD, Queue, QueueDown
from mlops.api.records import Outcome
from mlops.api.settings import Settings, load_settings
from mlops.api.upkeep import expire, recover
from mlops.api.weights_store import prune
from mlops.commands import EXIT_USER_ERROR, Parser

UPKEEP_SECONDS = 5.0
TIDY_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 5.0


class Worker:
    """Works until it is told to stop.

    Attributes:
        stopping: set to make it end; its jobs are given back.
        reload_asked: set to make it read models.yaml again.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.store: JobStore = open_store(settings)
        self.queue = Queue(settings.queue_url, settings.data_dir / "queue.sqlite")
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.models = Models(settings.data_dir / "models", device, settings.max_batch, settings.memory_gib)
        self.presence = Presence(settings.data_dir / "workers", str(device))
        self.stopping = threading.Event()
        self.reload_asked = threading.Event()
        self._next_upkeep = self._next_tidying = 0.0
        self._last_job = time.monotonic()

    def run(self) -> None:
        """Serve until `stopping` is set.

        Raises:
            UserError: there is nothing that could be served.
        """
        try:
            error = self.reload()
            if error and read_active(self.settings.data_dir) is None:
                raise UserError(error)
            self._warm_up()
            pause = POLL_SECONDS
            while not self.stopping.is_set():
                try:
                    pause = 0.0 if self._work_once() else POLL_SECONDS
                except QueueDown as down:
                    pause = min(max(2 * pause, POLL_SECONDS), LONGEST_PAUSE_SECONDS)
                    log(f"warning: {down}; trying again in {pause:g} s")
                self.stopping.wait(pause)
        finally:
            self.presence.end()

    def _work_once(self) -> bool:
        """Do what is next; whether there was something."""
        if self.reload_asked.is_set():
            self.reload_asked.clear()
            self.reload()
        self._keep_order()
        name = self.queue.get()
        if name is None:
            self._rest_if_idle()
            return False
        if name.startswith(RELOAD):
            self.reload(name)
        else:
            self._carry_out(name)
        return True

    def _carry_out(self, name: str) -> None:
        record = self.store.claim(name, self.presence.name)
        if record is None:
            return
        self.presence.say("busy", self.models.loaded)
        try:
            sampler, max_batch = self.models.get(record.digest)
        except UserError as error:
            log(f"warning: job {name}: {error}")
            text = f"version {record.version} cannot be used any more; ask again for what is served now"
            self.store.finish(name, Outcome(state="failed", finished=datetime.now(UTC), error=text))
            return
        generation = Generation(
            self.store, self.presence.name, sampler, max_batch, self.settings.job_seconds, self.stopping.is_set
        )
        for unfinished in generation.run(record):
            self.queue.put(unfinished)
        self._last_job = time.monotonic()
        self.presence.say("idle", self.models.loaded)

    def reload(self, name: str = "") -> str | None:
        """Try what `models.yaml` names, and serve it if all of it works. Otherwise nothing changes.

        Args:
            name: of the request to do so.

        Returns:
            What is wrong.
        """
        data_dir, error = self.settings.data_dir, None
        before = read_active(data_dir)
        try:
            wanted = prepare(self.settings.models_file, self.settings)
            for digest in wanted.digests - (before.digests if before else set()):
                self.models.try_out(digest)
            activate(wanted, data_dir)
            prune(data_dir, wanted.digests | self._digests_of_jobs())
            self.models.keep(wanted.digests)
            log(f"serving {', '.join(version.name for version in wanted.versions)}")
        except UserError as problem:
            error = problem.one_line()
            log(f"warning: models were not changed: {error}")
        except Exception as problem:  # weights of strange shapes fail anywhere in torch
            error = f"a new version failed when it was tried: {type(problem).__name__}"
            log(f"warning: models were not changed: {error}: {problem}")
        write_text(data_dir / "reload.json", json.dumps({"name": name, "error": error}))
        return error

    def _digests_of_jobs(self) -> set[str]:
        records = (self.store.record(name) for name in self.store.unfinished_ids())
        return {record.digest for record in records if record}

    def _warm_up(self) -> None:
        active = read_active(self.settings.data_dir)
        for digest in active.digests if active else ():
            self.models.get(digest)
        self.presence.say("idle", self.models.loaded)
        self._last_job = time.monotonic()

    def _rest_if_idle(self) -> None:
        idle = time.monotonic() - self._last_job
        if self.settings.idle_minutes and self.models.loaded and idle > 60 * self.settings.idle_minutes:
            self.models.rest()
            self.presence.say("asleep", [])

    def _keep_order(self) -> None:
        """Bring back jobs of dead workers and lost entries of the queue; now and then remove what is too old."""
        now = time.monotonic()
        if now >= self._next_upkeep:
            self._next_upkeep = now + UPKEEP_SECONDS
            folder = self.settings.data_dir / "workers"
            waiting = recover(self.store, lambda name: name == self.presence.name or is_alive(folder, name))
            known = self.queue.names()
            for name in waiting:
                if name not in known:
                    self.queue.put(name)
        if now >= self._next_tidying:
            self._next_tidying = now + min(TIDY_SECONDS, 60 * self.settings.retention_minutes)
            metrics.DISK_BYTES.set(expire(self.store))


def die_with_parent(stopping: threading.Event) -> None:
    """Stop when the process at the other end of stdin has ended, however it ended."""
    sys.stdin.buffer.read()
    stopping.set()


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attached", action="store_true", help="end when stdin is closed: for api_server.py")
    args = parser.parse_args()
    keep_freed_memory()
    try:
        settings = load_settings()
        if settings.worker_metrics_port:
            metrics.serve(settings.worker_metrics_port)
        worker = Worker(settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stopping.set())
        signal.signal(signal.SIGHUP, lambda *_: worker.reload_asked.set())
        if args.attached:
            threading.Thread(target=die_with_parent, args=(worker.stopping,), daemon=True).start()
        worker.run()
    except UserError as error:
        print(f"error: {error.one_line()}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that waits for stdin, or torch's own, must not keep the process.
    os._exit(code)
