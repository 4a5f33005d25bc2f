"""The tutorial runs from top to bottom, and what is committed of it is what a run of these cells has shown."""

import ast
import copy
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from document_commands import commands, problems_of_command
from documents import blocks, spans
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from notebooks import DIGEST, NAME, ROOT, code_cells, digest, lay_out, read, run

from ldm3d.cases import find_cases
from ldm3d.config import load_config
from ldm3d.interior import interior
from ldm3d.nifti import read_volume
from ldm3d.volumes import load_prepared

LARGEST_BYTES = 3 * 10**6
PICTURE = re.compile(r"^(show|plt\.show)\(", re.MULTILINE)
# Of somebody's machine, of a moment, or of something that went wrong.
UNWANTED = re.compile(r"(?i)/(home|root|tmp|users|work|opt)/|site-packages|traceback|warning|error|seconds|\d s left")


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return read()


@pytest.fixture(scope="module")
def text(committed: NotebookNode) -> str:
    """All that it says between the cells."""
    return "\n\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")


# It runs.


@pytest.mark.timeout(1200)  # 75 CPU seconds, which are many minutes beside other work
def test_it_runs_from_top_to_bottom_and_generates_brains(committed: NotebookNode, text: str, tmp_path: Path) -> None:
    """And so do the cells that its last section tells the reader to try."""
    lay_out(tmp_path)
    before = contents(tmp_path)
    tries = [new_code_cell(block.text) for block in blocks(text) if block.language == "python"]
    assert len(tries) == 2
    notebook = copy.deepcopy(committed)
    notebook.cells += tries
    done = [pictures(cell) for cell in code_cells(run(notebook, tmp_path))]
    assert done == [*(pictures(cell) for cell in code_cells(committed)), *(1 for _ in tries)]
    results = tmp_path / "results" / "tutorial"
    assert {path: content for path, content in contents(tmp_path).items() if results not in path.parents} == before
    samples = [read_volume(path)[0] for path in sorted((results / "samples").glob("*.nii.gz"))]
    assert len(samples) == len(list((results / "samples").glob("*.json"))) == 4
    cfg = load_config(ROOT / "config" / "config_demo.json")
    phantoms = [load_prepared(case, cfg.spacing) for case in find_cases(results / "data", cfg.data, cfg.channel)[:8]]
    assert is_like_brains(phantoms, samples)
    assert not is_like_brains(phantoms, [np.mean(phantoms, axis=0)])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".ipython" not in path.parts}


def pictures(cell: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def is_like_brains(real: list[np.ndarray], generated: list[np.ndarray]) -> bool:
    """Whether there is structure inside, which fog lacks."""
    found = interior(real, generated)
    return all((found[name]["value"] or 0) > 0.55 for name in ("sharpness", "interior_contrast"))


def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    broken = new_notebook(cells=[new_code_cell("number = 0"), new_code_cell("1 / number")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(broken, tmp_path)


# What is committed.


def problems_of_outputs(notebook: NotebookNode) -> list[str]:
    """What is wrong with the outputs, but for their size."""
    cells = code_cells(notebook)
    problems = []
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        problems.append("cells were not run once each, in order")
    if notebook.metadata.get(DIGEST) != digest(notebook):
        problems.append("a cell has changed since the outputs were made: python tests/notebooks.py")
    for number, cell in enumerate(cells, 1):
        if bool(pictures(cell)) != bool(PICTURE.search(cell.source)):
            problems.append(f"cell {number} has no picture, or one that it does not make")
        if "execution" in cell.metadata:
            problems.append(f"cell {number} says when it was run")
        if any(output.output_type == "error" for output in cell.outputs):
            problems.append(f"cell {number} ended with an error")
        unwanted = [match[0] for text in texts(cell) for match in UNWANTED.finditer(text)]
        problems += [f"cell {number} shows {text}" for text in unwanted]
    return problems


def texts(cell: NotebookNode) -> list[str]:
    """What the outputs say, pictures left out."""
    shown = [output.get("text", "") for output in cell.outputs]
    bundles = [output.get("data", {}) for output in cell.outputs]
    return shown + [
        json.dumps(content) for bundle in bundles for kind, content in bundle.items() if not kind.startswith("image/")
    ]


def test_the_committed_outputs_are_those_of_a_run_of_these_cells(committed: NotebookNode) -> None:
    assert problems_of_outputs(committed) == []
    assert (ROOT / NAME).stat().st_size <= LARGEST_BYTES


def forget_outputs(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        cell.outputs = []


def run_again(notebook: NotebookNode) -> None:
    code_cells(notebook)[2].execution_count = 99


def change_a_cell(notebook: NotebookNode) -> None:
    code_cells(notebook)[2].source += "\n"


def say(text: str) -> Callable[[NotebookNode], None]:
    output = NotebookNode(output_type="stream", name="stderr", text=text)
    return lambda notebook: code_cells(notebook)[1].outputs.append(output)


BREAKAGES = (forget_outputs, run_again, change_a_cell, say("in /home/me/x"), say("UserWarning: old"), say("9 s left"))


@pytest.mark.parametrize("break_it", BREAKAGES, ids=range(len(BREAKAGES)))
def test_bad_outputs_are_seen(committed: NotebookNode, break_it: Callable[[NotebookNode], None]) -> None:
    broken = copy.deepcopy(committed)
    break_it(broken)
    assert problems_of_outputs(broken) != []


# What it says.


def imported(notebook: NotebookNode) -> list[tuple[str, str]]:
    """Modules of `ldm3d` and the names that are imported from them."""
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [(str(node.module), name.name) for node in froms for name in node.names if str(node.module)[:5] == "ldm3d"]


def test_names_of_the_library_exist(committed: NotebookNode, text: str) -> None:
    names = imported(committed)
    assert len(names) > 20
    assert [f"{m}.{name}" for m, name in names if not hasattr(importlib.import_module(m), name)] == []
    code = "\n".join(path.read_text() for path in [*ROOT.glob("ldm3d/*.py"), *ROOT.glob("*.py")])
    code += "".join(cell.source for cell in code_cells(committed))
    words = {span for span in spans(text) if re.fullmatch(r"[A-Za-z_]\w+", span)}
    assert {word for word in words if not re.search(rf"\b{word}\b", code)} == set()


def test_commands_are_understood_and_links_and_files_are_there(text: str) -> None:
    shown = commands(text)
    assert len(shown) >= 7
    assert [problem for words in shown for problem in problems_of_command(words)] == []
    assert {"make", "python"} <= {words[0] for words in shown}
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("https://")]
    named = [span for span in spans(text) if re.fullmatch(r"[\w./]+", span) and re.search(r"/|\.py$|\.ipynb$", span)]
    named += [word for words in shown for word in words if word.startswith("requirements")]
    there = [*linked, *(name for name in named if not name.startswith("results/"))]
    assert there
    assert [name for name in there if not (ROOT / name).exists()] == []


def test_the_commands_are_those_of_the_demo(text: str) -> None:
    """Its last section says that they are."""
    readme = commands((ROOT / "README.md").read_text())
    scripts = [words for words in commands(text) if words[0] == "python" and words[1].endswith(".py")]
    assert len(scripts) == 5
    assert [shlex.join(words) for words in scripts if words not in readme] == []
