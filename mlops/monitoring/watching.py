"""Looks at each finished volume once, and keeps the figures of each version's last ones up to date."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from ldm3d.errors import ConfigError, DataError
from mlops.api.catalogue import read_active
from mlops.monitoring import quality_metrics as metrics
from mlops.monitoring.finished import FinishedJob, job_names, read_job
from mlops.monitoring.quality import (
    EmptyVolume,
    Measured,
    Reference,
    feature_means,
    has_reference,
    measure,
    pair_difference,
    read_reference,
)

log = logging.getLogger(__name__)

MOST_VOLUMES = 200
"""Of a version; older ones are forgotten."""
LOOK_SECONDS = 300.0
"""One look ends after this time, so that the figures move while there is much to read."""


class Window:
    """The last different volumes of a version.

    Args:
        digest: of its weights.
    """

    def __init__(self, digest: str):
        self.digest = digest
        self.has_reference = False
        self.volumes: dict[str, Measured] = {}
        """By recipe, in the order in which they were read."""

    def add(self, recipe: str, measured: Measured) -> None:
        self.volumes[recipe] = measured
        while len(self.volumes) > MOST_VOLUMES:
            del self.volumes[next(iter(self.volumes))]


class Watcher:
    """Figures of the volumes in a data folder.

    Args:
        data_dir: the service's data folder; it is only read.
    """

    def __init__(self, data_dir: Path):
        self.data_dir = data_dir
        self._seen: dict[str, tuple[str, str]] = {}
        """Versions of the jobs that need not be looked at again."""
        self._windows: dict[tuple[str, str], Window] = {}
        self._told: set[tuple[str, str]] = set()
        """Versions that metrics tell of."""

    def look(self) -> None:
        """Read what has finished since the last look.

        Raises:
            DataError: there is no data folder.
        """
        started = time.monotonic()
        names = job_names(self.data_dir)
        self._seen = {name: self._seen[name] for name in names if name in self._seen}
        jobs = self._new_jobs(names)
        changed: set[tuple[str, str]] = set()
        for job in reversed(jobs):
            if time.monotonic() - started > LOOK_SECONDS:
                break
            self._seen[job.folder.name] = job.version
            if self._read(job):
                changed.add(job.version)
        self._expect_faults()
        self._forget_versions()
        for version, window in self._windows.items():
            # The reference may come after the volumes.
            if version in changed or window.has_reference != has_reference(self.data_dir, window.digest):
                self._tell(version, window)
        metrics.LAST_LOOK.set(time.time())
        metrics.LOOK_SECONDS.set(time.monotonic() - started)

    def _new_jobs(self, names: list[str]) -> list[FinishedJob]:
        """Jobs that were not read yet, newest first; those that would fall out of their window again are passed."""
        new, counts = [], dict[tuple[str, str], int]()
        for job in self._unseen(names):
            if counts.get(job.version, 0) < MOST_VOLUMES:
                new.append(job)
                counts[job.version] = counts.get(job.version, 0) + len(job.volumes())
            else:
                self._seen[job.folder.name] = job.version
        return new

    def _unseen(self, names: list[str]) -> Iterator[FinishedJob]:
        for name in names:
            if name not in self._seen and (job := read_job(self.data_dir, name)):
                yield job

    def _read(self, job: FinishedJob) -> bool:
        """Measure a job's volumes; whether its version has something new."""
        window = self._windows.get(job.version)
        if window is None or window.digest != job.record.digest:  # the version's name stands for other weights now
            window = self._windows[job.version] = Window(job.record.digest)
        for path in job.volumes():
            try:
                if job.recipe(path) not in window.volumes:
                    window.add(job.recipe(path), measure(path))
            except DataError as error:
                if not path.exists():  # removed meanwhile, which is its caller's right
                    continue
                fault = "empty" if isinstance(error, EmptyVolume) else "damaged"
                metrics.BAD.labels(*job.version, fault).inc()
                log.warning("%s", error.one_line())
            metrics.VOLUMES.labels(*job.version).inc()
        return bool(job.volumes())

    def _tell(self, version: tuple[str, str], window: Window) -> None:
        window.has_reference = has_reference(self.data_dir, window.digest)
        volumes, reference = list(window.volumes.values()), read_reference(self.data_dir, window.digest)
        metrics.WINDOW.labels(*version).set(len(volumes))
        metrics.REFERENCE.labels(*version).set(reference is not None)
        if volumes:
            for name, value in feature_means(volumes).items():
                metrics.FEATURE.labels(*version, name).set(value)
        if len(volumes) > 1:
            metrics.PAIR_DIFFERENCE.labels(*version).set(pair_difference(volumes))
            if reference:
                self._compare(version, volumes, reference)

    def _compare(self, version: tuple[str, str], volumes: list[Measured], reference: Reference) -> None:
        metrics.DISTANCE.labels(*version).set(reference.distance(volumes))
        metrics.DIVERSITY.labels(*version).set(reference.diversity(volumes))
        for name, value in reference.deviations(volumes).items():
            metrics.DEVIATION.labels(*version, name).set(value)

    def _served(self) -> set[tuple[str, str]] | None:
        try:
            active = read_active(self.data_dir)
        except ConfigError:  # damaged; the service says so, and replaces it
            return None
        return {(version.model, version.version) for version in active.versions} if active else set()

    def _expect_faults(self) -> None:
        """Count from 0 on, before there is a volume: the very first bad one is a rise. After a look, as what a monitor
        finds at its start is nothing new.
        """
        for version in (self._served() or set()) | self._windows.keys():
            self._told.add(version)
            metrics.expect_faults(*version)

    def _forget_versions(self) -> None:
        """A version is forgotten when it is not served any more and its last job is gone."""
        served = self._served()
        if served is None:
            return
        for version in self._told - set(self._seen.values()) - served:
            self._told.discard(version)
            self._windows.pop(version, None)
            metrics.forget(*version)
