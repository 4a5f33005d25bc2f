"""A comparison as metrics: a file for node-exporter, or sent to a pushgateway."""

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile

from ldm3d.errors import OutputError

JOB = "ldm3d_drift"
_TIMEOUT_SECONDS = 30


def write_metrics(path: Path, result: dict[str, Any]) -> CollectorRegistry:
    """Write the metrics of drift.json's content, atomically, and return them."""
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"ldm3d_drift_{name}", text, labels, registry=registry)

    gauge("detected", "Whether new volumes differ from those trained on.").set(bool(result["drifted"]))
    gauge("alpha", "Probability of a false alarm that a run accepts.").set(result["alpha"])
    volumes = gauge("volumes", "New volumes by what became of them.", "state")
    volumes.labels("judged").set(result["volumes"]["judged"])
    volumes.labels("unreadable").set(len(result["volumes"]["unreadable"]))
    detected = gauge("feature_detected", "Whether a feature differs.", "feature")
    p_value = gauge("feature_p_value", "Probability by chance, corrected for the number of tests.", "feature")
    psi = gauge("feature_psi", "Population stability index.", "feature")
    for comparison in result["comparisons"]:
        name = comparison["name"]
        detected.labels(name).set(name in result["drifted"])
        p_value.labels(name).set(comparison["p_value"])
        if comparison["psi"] is not None:
            psi.labels(name).set(comparison["psi"])
        if name == "latents":
            mmd = gauge("latent_mmd", "Squared maximum mean discrepancy of latents.")
            mmd.set(comparison["statistic"])
    gauge("last_run_timestamp_seconds", "When new volumes were last judged.").set_to_current_time()
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return registry


def push(url: str, registry: CollectorRegistry) -> None:
    """Send the metrics to a pushgateway, in place of what this job sent before. Raises `OutputError`."""
    try:
        push_to_gateway(url, JOB, registry, timeout=_TIMEOUT_SECONDS)
    except (OSError, ValueError) as error:
        raise OutputError(f"--push {url}: the metrics were not taken: {error}") from error
