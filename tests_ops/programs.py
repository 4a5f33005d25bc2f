"""Programs that judge or run our files: where they are, what they say, and skipping where one is not installed."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv/bin/python"
"""The project's own environment, with torch and the service."""
CHECKOV = ROOT / ".venv-checkov/bin/checkov"
MANIFESTS = ROOT / "mlops"

DEBIAN_PACKAGES = {
    "amtool": "prometheus-alertmanager",
    "ip": "iproute2",
    "kubectl": "kubernetes-client",
    "nsenter": "util-linux",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "promtool": "prometheus",
    "redis-server": "redis-server",
    "unshare": "util-linux",
}
"""Which package has a program, where it has another name."""


def tool(name: str) -> str:
    """A program that came with `requirements-ops.txt`."""
    return str(Path(sys.executable).parent / name)


def need(*programs: str) -> None:
    """Skip the test where a program is not installed, and say which Debian package has it."""
    missing = sorted({DEBIAN_PACKAGES.get(program, program) for program in programs if not shutil.which(program)})
    if missing:
        pytest.skip(f"not installed: Debian's {', '.join(missing)}")


def run(*command: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command and keep what it says; its exit status is the caller's to judge."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, **({"timeout": 300} | options))
