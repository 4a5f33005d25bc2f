"""What Prometheus reads. Web and worker count into files of one folder, so that one address tells of all processes."""

import logging
import os
import threading
import time
from pathlib import Path

# The client decides at its import whether it counts into files.
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).mkdir(parents=True, exist_ok=True)

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    start_http_server,
)
from prometheus_client.mmap_dict import MmapedDict

from ldm3d.errors import ConfigError

log = logging.getLogger("ldm3d.service")

KINDS = ("counter", "histogram", "gauge_mostrecent", "gauge_livemostrecent", "gauge_livesum", "gauge_min")
RESERVED_BYTES = 2**20
OF_THE_DEAD = 0
"""No process has this number: files of all that have ended."""
_reading = threading.Lock()


def _reserve(folder: Path, pid: int) -> None:
    """Take the room of a process's files at once. They are mapped into memory: written to where a full disk has no
    room for them, they would end the process with a bus error.
    """
    for kind in KINDS:
        with open(folder / f"{kind}_{pid}.db", "ab") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVED_BYTES)


if "PROMETHEUS_MULTIPROC_DIR" in os.environ and hasattr(os, "posix_fallocate"):  # macOS has none
    _reserve(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]), os.getpid())

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

REQUESTS = Counter("ldm3d_http_requests", "Requests answered.", ["method", "route", "status"])
REQUEST_SECONDS = Histogram(
    "ldm3d_http_request_seconds",
    "Time to the end of the answer; event streams and waiting requests are left out.",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
JOBS_ACCEPTED = Counter("ldm3d_jobs_accepted", "Jobs accepted.", ["model", "version", "shadow"])
JOBS_REFUSED = Counter("ldm3d_jobs_refused", "Jobs refused for want of room.")
JOBS_ENDED = Counter("ldm3d_jobs_ended", "Jobs ended.", ["model", "version", "shadow", "state"])
JOB_SECONDS = Histogram(
    "ldm3d_job_seconds", "From acceptance to the end of a job that was done.", ["model", "version"], buckets=SECONDS
)
VOLUMES = Counter("ldm3d_volumes", "Volumes generated.", ["model", "version", "shadow"])
BATCH_SECONDS = Histogram(
    "ldm3d_batch_seconds", "Sampling and decoding of a batch.", ["model", "version"], buckets=SECONDS
)
BATCH_VOLUMES = Histogram("ldm3d_batch_volumes", "Volumes sampled together.", buckets=(1, 2, 4, 8, 16, 32))
# Whoever looked last knows best.
QUEUE_JOBS = Gauge("ldm3d_queue_jobs", "Jobs that wait.", multiprocess_mode="mostrecent")
RUNNING_JOBS = Gauge("ldm3d_running_jobs", "Jobs that run.", multiprocess_mode="mostrecent")
OLDEST_SECONDS = Gauge(
    "ldm3d_queue_oldest_seconds", "Age of the oldest job that waits.", multiprocess_mode="mostrecent"
)
QUEUE_LIMIT = Gauge("ldm3d_queue_limit_jobs", "Jobs that may wait or run.", multiprocess_mode="mostrecent")
DISK_BYTES = Gauge("ldm3d_results_bytes", "Room that results take.", multiprocess_mode="mostrecent")
DISK_LIMIT = Gauge("ldm3d_results_limit_bytes", "Room that results may take.", multiprocess_mode="mostrecent")
DISK_FREE = Gauge("ldm3d_data_free_bytes", "Free on the disk of the data folder.", multiprocess_mode="mostrecent")
READY = Gauge("ldm3d_ready", "1 if a request would be worked on, as /ready says.", multiprocess_mode="mostrecent")
AUDIT_FAILED = Gauge("ldm3d_audit_failed", "1 while the audit log cannot be written.", multiprocess_mode="mostrecent")
RELOAD_FAILED = Gauge(
    "ldm3d_reload_failed", "1 if models.yaml could not be served when it was last read.", multiprocess_mode="mostrecent"
)
CALLER_VOLUMES = Counter(
    "ldm3d_caller_volumes", "Volumes asked for, by pseudonym of the caller.", ["caller", "model", "version"]
)
WORKERS = Gauge("ldm3d_workers", "Workers by what they do.", ["state"], multiprocess_mode="mostrecent")
MODELS_LOADED = Gauge("ldm3d_models_loaded", "Versions in memory of a worker.", multiprocess_mode="livesum")
WORKER_BYTES = Gauge("ldm3d_worker_memory_bytes", "Resident memory of the workers.", multiprocess_mode="livesum")
# Several workers on one device tell the same of it.
DEVICE_USED = Gauge(
    "ldm3d_device_memory_used_bytes",
    "Memory that nobody can have any more; of cpu, within the container's limit.",
    ["device"],
    multiprocess_mode="livemostrecent",
)
DEVICE_TOTAL = Gauge(
    "ldm3d_device_memory_total_bytes", "All memory of the device.", ["device"], multiprocess_mode="livemostrecent"
)
DEVICE_USE = Gauge(
    "ldm3d_device_use_ratio",
    "Share of the time that the device computes; of cpu, the worker's share of its cores.",
    ["device"],
    multiprocess_mode="livemostrecent",
)
STARTED = Gauge("ldm3d_start_time_seconds", "When the process began.", multiprocess_mode="min")
STARTED.set(time.time())


# A worker by itself knows nothing of these: its zeros would be read as figures.
OF_THE_WEB_PROCESS = (
    *(REQUESTS, REQUEST_SECONDS, JOBS_ACCEPTED, JOBS_REFUSED, CALLER_VOLUMES),
    *(QUEUE_JOBS, RUNNING_JOBS, OLDEST_SECONDS, QUEUE_LIMIT, DISK_LIMIT, DISK_FREE, WORKERS, READY, AUDIT_FAILED),
)


def count_end(model: str, version: str, is_shadow: bool, state: str) -> None:
    """Count a job that has ended."""
    JOBS_ENDED.labels(model, version, "yes" if is_shadow else "no", state).inc()


def expect(model: str, version: str) -> None:
    """Begin to count at 0 what may happen to a version: a first failure must be seen as a rise."""
    for is_shadow in ("yes", "no"):
        for state in ("done", "failed"):
            JOBS_ENDED.labels(model, version, is_shadow, state)


def exposition() -> tuple[bytes, str]:
    """The metrics of all processes as text, and its media type."""
    with _reading:
        return generate_latest(_registry()), CONTENT_TYPE_LATEST


def bury(pid: int) -> None:
    """Keep what a worker that has ended counted, but not its files: of one that ends again and again they would fill
    the disk, and each scrape reads all of them.
    """
    folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    multiprocess.mark_process_dead(pid)
    with _reading:
        try:
            if hasattr(os, "posix_fallocate"):
                _reserve(folder, OF_THE_DEAD)
            for kind in ("counter", "histogram", "gauge_mostrecent"):
                _take_over(folder / f"{kind}_{pid}.db", folder / f"{kind}_{OF_THE_DEAD}.db")
            (folder / f"gauge_min_{pid}.db").unlink(missing_ok=True)  # the web process began before
        except Exception as error:  # a full disk, a file cut short by the kill: a worker must be started all the same
            log.warning("figures of the worker %s that has ended stay where they are: %s", pid, error)


def _take_over(dead: Path, kept: Path) -> None:
    if not dead.exists():
        return
    values = MmapedDict(str(kept))
    for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(str(dead)):
        old, when = values.read_value(key)
        newest = max((timestamp, value), (when, old))
        written = newest[::-1] if dead.name.startswith("gauge") else (old + value, timestamp)
        values.write_value(key, *written)
    values.close()
    dead.unlink()


def serve(port: int) -> None:
    """Serve the metrics of a worker that runs without a web process beside it, on all addresses.

    Raises:
        ConfigError: the port is taken.
    """
    for metric in OF_THE_WEB_PROCESS:
        REGISTRY.unregister(metric)
    try:
        start_http_server(port, registry=_registry())
    except OSError as error:
        raise ConfigError(f"LDM3D_WORKER_METRICS_PORT {port}: cannot listen there: {error.strerror}") from error


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return registry
