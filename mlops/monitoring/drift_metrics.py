"""A comparison as metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Gauge

JOB = "ldm3d_drift"
"""What a pushgateway keeps them under."""


def metrics_of(result: dict[str, Any]) -> CollectorRegistry:
    """The metrics of drift.json's content."""
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
    return registry
