"""The tutorial: how it is run, in a copy of what it needs.

python tests/notebooks.py   runs it from top to bottom and writes what it shows into 3d_ldm_tutorial.ipynb
"""

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NAME = "3d_ldm_tutorial.ipynb"
NEEDED = (NAME, "config", "checkpoints/demo", "ldm3d")
SECONDS_OF_A_CELL = 240
"""After which a cell counts as hanging; a busy machine is slow."""
DIGEST = "sources_sha256"
"""Where the notebook's metadata says of which sources its outputs are."""
TIME_LEFT = re.compile(r"^.*: \d+/\d+(, \d+ s left)?\n", re.MULTILINE)


def read(path: Path = ROOT / NAME) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: NotebookNode) -> str:
    """Of the sources of all code cells."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def lay_out(folder: Path) -> None:
    """Copy what the tutorial needs of the repository."""
    for name in NEEDED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells in a fresh kernel of this Python whose current folder is `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has raised.
    """
    client = NotebookClient(
        notebook,
        timeout=SECONDS_OF_A_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    )
    settings = {"IPYTHONDIR": str(folder / ".ipython"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with mock.patch.dict(os.environ, settings):
        return client.execute()


def tidy(notebook: NotebookNode) -> None:
    """Leave out what is different in each run: how long something will take."""
    for output in (output for cell in code_cells(notebook) for output in cell.outputs if "text" in output):
        output.text = TIME_LEFT.sub("", output.text)
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("text", "some")]


def renew() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        notebook = run(read(), Path(folder))
    tidy(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        DIGEST: digest(notebook),
    }
    nbformat.write(notebook, ROOT / NAME)


if __name__ == "__main__":
    renew()
