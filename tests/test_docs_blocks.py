"""Every block of code in the documents is what its language says, and what a Python block imports is there."""

import ast
import csv
import importlib
import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_batch
import yaml
from documents import FENCE, each_document, read

OF_NOTEBOOKS = {"IPython", "ipyniivue"}
"""What is there only where notebooks run."""


def parse_python(text: str) -> None:
    """Compiles it, a notebook's lines for its shell left out, and looks up what it imports."""
    code = "\n".join("" if line.startswith(("!", "%")) else line for line in text.splitlines())
    for node in ast.walk(compile(code, "block", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name not in OF_NOTEBOOKS:
                    importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] not in OF_NOTEBOOKS:
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


def parse_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)


def parse_batch(text: str) -> None:
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_batch.language()))
    if parser.parse(text.encode()).root_node.has_error:
        raise ValueError("is no batch file")


def parse_csv(text: str) -> None:
    rows = list(csv.reader(text.splitlines(), strict=True))
    if len(rows) < 2 or len({len(row) for row in rows}) != 1:
        raise ValueError("needs a heading and rows of its length")


def parse_powershell(text: str) -> None:
    """Its words are checked with those of all commands; here that what opens closes."""
    for opening, closing in ("()", "{}", "[]"):
        if text.count(opening) != text.count(closing):
            raise ValueError(f"{opening} without {closing}")


PARSERS: dict[str, Callable[[str], object]] = {
    "bash": parse_shell,
    "sh": parse_shell,
    "bat": parse_batch,
    "powershell": parse_powershell,
    "python": parse_python,
    "json": json.loads,
    "yaml": yaml.safe_load,
    "toml": tomllib.loads,
    "csv": parse_csv,
    "text": lambda text: None,
    "markdown": lambda text: None,
}


def problems_of_blocks(text: str) -> Iterator[str]:
    """Blocks that are not of their language, have none, or would not stay in their list on the site."""
    for indent, language, body in FENCE.findall(text):
        first = body.strip().partition("\n")[0]
        if 0 < len(indent) < 4:
            yield f"{first}: in a list a block must be indented by 4 spaces, else the site ends the list"
        if language not in PARSERS:
            yield f"{first}: the language {language!r} has no parser in {Path(__file__).name}"
            continue
        try:
            PARSERS[language]("\n".join(line.removeprefix(indent) for line in body.splitlines()) + "\n")
        except Exception as error:
            yield f"{first}: {error}"


@each_document
def test_blocks_are_of_their_language(document: Path) -> None:
    assert list(problems_of_blocks(read(document))) == []


@pytest.mark.parametrize(
    ("language", "body"),
    [
        ("bash", "if true; then"),
        ("sh", "echo 'open"),
        ("bat", "if exist ( echo"),
        ("powershell", "Get-Item (ls"),
        ("python", "def f(:"),
        ("python", "import ldm3d.nothing"),
        ("python", "from ldm3d.schema import Nothing"),
        ("json", '{"a": 1,}'),
        ("yaml", "a: [1"),
        ("toml", "a = "),
        ("csv", "image,label\na"),
        ("", "x"),
        ("cobol", "MOVE A TO B."),
    ],
)
def test_bad_blocks_are_seen(language: str, body: str) -> None:
    assert len(list(problems_of_blocks(f"Text\n\n```{language}\n{body}\n```\n"))) == 1


def test_a_block_that_would_leave_its_list_is_seen() -> None:
    assert len(list(problems_of_blocks("1. One\n\n   ```text\n   two\n   ```\n"))) == 1
    assert list(problems_of_blocks("1. One\n\n    ```json\n    {}\n    ```\n")) == []


def test_a_notebooks_lines_for_the_shell_are_no_python() -> None:
    assert list(problems_of_blocks("```python\n%matplotlib inline\n!ls\nimport json\nawait x\n```\n")) == []
