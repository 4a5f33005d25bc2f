"""ldm3d.quick_start: programs import monai without what they do not use, and take nothing from anybody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_import_direction import imports

ROOT = Path(__file__).resolve().parents[1]
ASK = """
import sys
import train_autoencoder
from ldm3d.quick_start import UNUSED_BY_US
assert "monai.networks.nets" in sys.modules
print(*(name for name in UNUSED_BY_US if name in sys.modules))
import matplotlib.pyplot, pandas, tensorboard
from scipy import ndimage, stats
stats.norm, ndimage.zoom
import mlflow
assert mlflow.whole
"""
MLFLOW = """
try:
    import pandas
    whole = True
except ImportError:
    whole = False
"""


def test_a_script_starts_without_what_it_does_not_use_and_can_import_it_later(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text(MLFLOW)  # which monai imports if it is there
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "tensorboard\n"), done.stderr  # for what it logs


@pytest.mark.parametrize("program", ["utils.py", "mlops/api/worker.py", "mlops/batch/__main__.py"])
def test_programs_import_it_before_anything_else_of_ours(program: str) -> None:
    ours = [name for name in imports(ROOT / program) if name.startswith(("ldm3d", "mlops"))]
    assert ours[0] == "ldm3d.quick_start"
