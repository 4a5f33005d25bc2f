"""Who uses how much, as a metric. `/metrics` is open: it must not tell who the callers are, nor grow with them."""

import hashlib
import hmac
import secrets
from pathlib import Path

from ldm3d.errors import ConfigError
from mlops.api import metrics
from mlops.api.records import create_once

MOST_CALLERS = 20
"""Callers with a label of their own, in the order in which they came since the start; the others share one."""
OTHERS = "other"


def pseudonym(data_dir: Path, caller_id: str) -> str:
    """What a caller is called in metrics: the same after a restart and on every replica.

    Without the salt, which lies in the data folder, names could be guessed and tried.

    Raises:
        ConfigError: no caller was counted there yet.
    """
    try:
        salt = _salt(data_dir).read_bytes()
    except OSError as error:
        raise ConfigError(f"{_salt(data_dir)}: {error.strerror}; the service makes it with its first job") from error
    return hmac.new(salt, caller_id.encode(), hashlib.sha256).hexdigest()[:12]


def _salt(data_dir: Path) -> Path:
    return data_dir / "usage_salt"


class Usage:
    """Counts what callers ask for.

    Args:
        data_dir: the service's data folder.
    """

    def __init__(self, data_dir: Path):
        self._data_dir = data_dir
        self._labels: dict[str, str] = {}

    def count(self, caller_id: str, model: str, version: str, volumes: int) -> None:
        """Count a job that was accepted."""
        label = self._labels.get(caller_id, OTHERS)
        if label == OTHERS and len(self._labels) < MOST_CALLERS:
            try:
                label = self._labels[caller_id] = self._named(caller_id)
            except (OSError, ConfigError):  # the disk is full; the job is accepted all the same
                label = OTHERS
        metrics.CALLER_VOLUMES.labels(label, model, version).inc(volumes)

    def _named(self, caller_id: str) -> str:
        if not _salt(self._data_dir).exists():
            create_once(_salt(self._data_dir), secrets.token_hex(32), 0o600)
        return pseudonym(self._data_dir, caller_id)
