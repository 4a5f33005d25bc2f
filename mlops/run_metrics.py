"""What a single run tells Prometheus: a file for node-exporter's textfile collector, or sent to a pushgateway."""

from pathlib import Path

from prometheus_client import CollectorRegistry, push_to_gateway, write_to_textfile

from ldm3d.errors import OutputError

TIMEOUT_SECONDS = 30


def write(path: Path, registry: CollectorRegistry) -> None:
    """Write the metrics, atomically. Raises `OutputError`."""
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def push(url: str, job: str, registry: CollectorRegistry) -> None:
    """Send the metrics to a pushgateway, in place of what this job sent before. Raises `OutputError`."""
    try:
        push_to_gateway(url, job, registry, timeout=TIMEOUT_SECONDS)
    except (OSError, ValueError) as error:
        raise OutputError(f"--push {url}: the metrics were not taken: {error}") from error
