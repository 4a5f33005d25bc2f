"""The worker process: takes jobs from the queue, keeps weights warm, loads new versions, and tidies up.

python -m mlops.api.worker

With `--attached` it ends when its stdin is closed: so `mlops/docker/api_server.py` starts it.
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

import ldm3d.quick_start  # noqa: F401  before all that imports monai
from ldm3d.allocator import keep_freed_memory
from ldm3d.console import log
from ldm3d.errors import ConfigError, OutputError, UserError, WeightsError
from ldm3d.files import write_text
from mlops.api import device, metrics, tracing
from mlops.api.catalogue import activate, prepare, read_active
from mlops.api.generation import Generation
from mlops.api.jobs import JobStore, open_store
from mlops.api.models import Models
from mlops.api.presence import Presence, is_alive
from mlops.api.queue import POLL_SECONDS, RELOAD, Queue, QueueDown
from mlops.api.records import Outcome, Record, read_json
from mlops.api.settings import Settings, load_settings
from mlops.api.upkeep import expire, recover
from mlops.api.weights_store import prune
from mlops.commands import EXIT_USER_ERROR, Parser

UPKEEP_SECONDS = 5.0
TIDY_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 5.0
LEAST_PATIENCE_SECONDS = 600.0
"""A worker hangs that makes no step for so long, and as long as a job may take: another one is started."""


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
        place = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.models = Models(settings.data_dir / "models", place, settings.max_batch, settings.memory_gib)
        hangs_after = max(settings.job_seconds, LEAST_PATIENCE_SECONDS)
        self.presence = Presence(settings.data_dir / "workers", str(place), hangs_after)
        self._trial = settings.data_dir / "trial.json"
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
            error = self.reload(*self._fatal_trial())
            if error and read_active(self.settings.data_dir) is None:
                raise UserError(error)
            self._warm_up()
            device.watch(self.models.device)
            pause = POLL_SECONDS
            while not self.stopping.is_set():
                try:
                    pause = 0.0 if self._work_once() else POLL_SECONDS
                except (QueueDown, OSError, OutputError) as down:  # a disk that is full may have room again
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
        wish = ""
        while name and name.startswith(RELOAD):  # one reload answers all wishes that wait
            wish, name = max(wish, name), self.queue.get()
        if wish:
            self.reload(wish)
        if name:
            self._carry_out(name)
        return True

    def _carry_out(self, name: str) -> None:
        record = self.store.claim(name, self.presence.name)
        if record is None:
            return
        self.presence.say("busy", self.models.loaded)
        try:
            self._make(record)
        except OSError:
            self.store.release(name)
            raise
        finally:
            self._last_job = time.monotonic()
            self.presence.say("idle", self.models.loaded)

    def _make(self, record: Record) -> None:
        try:
            sampler, max_batch = self.models.get(record.digest)
        except UserError as error:
            log(f"warning: job {record.id}: {error}")
            text = f"version {record.version} cannot be used any more; ask again for what is served now"
            self.store.finish(record.id, Outcome(state="failed", finished=datetime.now(UTC), error=text))
            metrics.count_end(record.request.model, record.version, bool(record.shadow_of), "failed")
            return
        generation = Generation(
            self.store, self.presence.name, sampler, max_batch, self.settings.job_seconds, self._is_stopping
        )
        for unfinished in generation.run(record):
            self.queue.put(unfinished)

    def _is_stopping(self) -> bool:
        self.presence.stir()
        return self.stopping.is_set()

    def reload(self, name: str = "", refused: str = "") -> str | None:
        """Try what `models.yaml` names, and serve it if all of it works. Otherwise nothing changes.

        Args:
            name: of the request to do so.
            refused: digest of weights that are not to be tried, as a worker has died of them.

        Returns:
            What is wrong.
        """
        data_dir, error = self.settings.data_dir, None
        served = self._served()
        try:
            wanted = prepare(self.settings.models_file, self.settings)
            for digest in wanted.digests - served:
                if served and digest == refused:
                    raise WeightsError(f"a worker has died of trying the weights {digest[:12]}; reload to try again")
                self._try_out(digest, name)
            activate(wanted, data_dir)
            served = wanted.digests
            for version in wanted.versions:
                metrics.expect(version.model, version.version)
            log(f"serving {', '.join(version.name for version in wanted.versions)}")
        except UserError as problem:
            error = problem.one_line()
            log(f"warning: models were not changed: {error}")
        except Exception as problem:  # weights of strange shapes fail anywhere in torch
            error = f"a new version failed when it was tried: {type(problem).__name__}"
            log(f"warning: models were not changed: {error}: {problem}")
        metrics.RELOAD_FAILED.set(error is not None)
        self._tidy_versions(served)
        try:
            if name:
                write_text(data_dir / "reload.json", json.dumps({"name": name, "error": error}))
        except OutputError as full:
            log(f"warning: {full}")
        return error

    def _served(self) -> set[str]:
        """Digests of what is served now; none where `active.json` is damaged, which is replaced then."""
        try:
            active = read_active(self.settings.data_dir)
        except ConfigError as damaged:
            log(f"warning: {damaged}")
            return set()
        return active.digests if active else set()

    def _try_out(self, digest: str, wish: str) -> None:
        """A trial may end the process, for want of memory: a mark tells the next worker not to try the same again."""
        trial = {"digest": digest, "worker": self.presence.name, "wish": wish}
        write_text(self._trial, json.dumps(trial))
        try:
            self.models.try_out(digest)
        finally:
            self._trial.unlink(missing_ok=True)

    def _fatal_trial(self) -> tuple[str, str]:
        """The wish and the weights of which a worker has died. At the next start or wish they are tried again."""
        trial = read_json(self._trial)
        if trial is None or is_alive(self._trial.parent / "workers", trial["worker"]):
            return "", ""
        self._trial.unlink(missing_ok=True)
        return trial["wish"], trial["digest"]

    def _tidy_versions(self, served: set[str]) -> None:
        """Let go of what is not served, in memory and, after a while, on the disk."""
        self.models.keep(served)
        if self.presence.state != "starting" and self.models.loaded:
            self.presence.say("idle", self.models.loaded)
            self._last_job = time.monotonic()
        try:
            prune(self.settings.data_dir, served | self._digests_of_jobs())
        except UserError as error:
            log(f"warning: {error}")

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
        """Now and then remove what is too old; bring back jobs of dead workers and lost entries of the queue."""
        now = time.monotonic()
        self.presence.stir()
        # First, since on a full disk nothing else may work.
        if now >= self._next_tidying:
            self._next_tidying = now + min(TIDY_SECONDS, 60 * self.settings.retention_minutes)
            metrics.DISK_BYTES.set(expire(self.store))
        if now >= self._next_upkeep:
            self._next_upkeep = now + UPKEEP_SECONDS
            folder = self.settings.data_dir / "workers"
            waiting = recover(self.store, lambda name: name == self.presence.name or is_alive(folder, name))
            known = self.queue.names()
            for name in waiting:
                if name not in known:
                    self.queue.put(name)


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
        if settings.worker_metrics_port and not args.attached:  # beside a web process that serves them
            metrics.serve(settings.worker_metrics_port)
        tracing.start("ldm3d-worker")
        worker = Worker(settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stopping.set())
        signal.signal(signal.SIGHUP, lambda *_: worker.reload_asked.set())
        if args.attached:
            threading.Thread(target=die_with_parent, args=(worker.stopping,), daemon=True).start()
        worker.run()
        tracing.stop()
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
