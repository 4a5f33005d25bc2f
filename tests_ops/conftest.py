"""What the tests of the operational files share. They run in `.venv-ops`; what they start for real runs in `.venv`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests_ops")]
