"""What the monitor tells Prometheus. What the service counts itself is in `mlops/api/metrics.py`, and only there."""

from prometheus_client import CollectorRegistry, Counter, Gauge

REGISTRY = CollectorRegistry()
VERSION = ["model", "version"]

VOLUMES = Counter("ldm3d_quality_volumes", "Finished volumes that were looked at.", VERSION, registry=REGISTRY)
BAD = Counter(
    "ldm3d_quality_bad_volumes",
    "Finished volumes that cannot be read (damaged), or show no brain (empty).",
    [*VERSION, "fault"],
    registry=REGISTRY,
)
WINDOW = Gauge(
    "ldm3d_quality_window_volumes", "Different volumes that the figures below are of.", VERSION, registry=REGISTRY
)
FEATURE = Gauge(
    "ldm3d_quality_feature_mean",
    "Mean of a feature of the image; the names of ldm3d.brain, brain_volume_ml and intensities among them.",
    [*VERSION, "feature"],
    registry=REGISTRY,
)
PAIR_DIFFERENCE = Gauge(
    "ldm3d_quality_pair_difference",
    "Root mean square difference of two volumes, coarse, mean of all pairs; 0 where all are the same.",
    VERSION,
    registry=REGISTRY,
)
REFERENCE = Gauge(
    "ldm3d_quality_reference", "1 if the version came with a profile of its training data.", VERSION, registry=REGISTRY
)
DEVIATION = Gauge(
    "ldm3d_quality_deviation",
    "Mean of a feature less that of the training data, in standard deviations of the training data.",
    [*VERSION, "feature"],
    registry=REGISTRY,
)
DISTANCE = Gauge(
    "ldm3d_quality_reference_distance",
    "Energy distance of features to the training data; 0 for equal sets, a little below by chance.",
    VERSION,
    registry=REGISTRY,
)
DIVERSITY = Gauge(
    "ldm3d_quality_diversity_ratio",
    "Difference of two volumes against that of two training volumes; 1 is as varied.",
    VERSION,
    registry=REGISTRY,
)
LAST_LOOK = Gauge(
    "ldm3d_quality_last_look_timestamp_seconds", "When all jobs were last looked through.", registry=REGISTRY
)
LOOK_SECONDS = Gauge("ldm3d_quality_look_seconds", "How long that took.", registry=REGISTRY)

OF_A_VERSION = (VOLUMES, BAD, WINDOW, FEATURE, PAIR_DIFFERENCE, REFERENCE, DEVIATION, DISTANCE, DIVERSITY)


def expect_faults(model: str, version: str) -> None:
    """Begin to count at 0."""
    for fault in ("damaged", "empty"):
        BAD.labels(model, version, fault)


def forget(model: str, version: str) -> None:
    """Tell no more of a version that is not there any more."""
    for metric in OF_A_VERSION:
        metric.remove_by_labels({"model": model, "version": version})
