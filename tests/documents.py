"""What the documents are made of: pages, blocks of code, words in backquotes, sections, links."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path.name for path in sorted(ROOT.glob("*.py")) if path.stem != "utils"]
ROOMS = {path.stem for path in (ROOT / "ldm3d").glob("*.py")} - {"__init__"}
FOLDERS = ("", "docs", "mlops/**", "benchmarks", "figs", "checkpoints/demo", ".github/**")
DOCUMENTS = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.md".lstrip("/")))]
DOCUMENTS += sorted(ROOT.glob("*.ipynb"))
"""Everything that is written for readers."""
README = ROOT / "README.md"
KINDS = {".py", ".sh", ".ps1", ".yml", ".yaml", ""}
SOURCES = [
    ROOT / "Makefile",
    *ROOT.glob("*.sh"),
    *ROOT.glob("*.bat"),
    *ROOT.glob("*.py"),
    *ROOT.glob("ldm3d/*.py"),
    *ROOT.glob("figs/*.py"),
    *(path for path in ROOT.glob("mlops/**/*") if path.is_file() and path.suffix in KINDS),
    *ROOT.glob("config/*.json"),
]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def code() -> str:
    """Everything that the project runs, as text."""
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


@cache
def words_of_code() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", code()))


def site_hooks() -> Any:
    """docs/site/hooks.py, which is no package."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(document: Path) -> str:
    """A document as Markdown, a notebook as its page on the site."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".ipynb":
        return str(site_hooks().notebook_page(document.name, json.loads(text))[document.name])
    return text


class Block(NamedTuple):
    language: str
    text: str


FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[Block]:
    return [
        Block(language, re.sub(f"^{indent}", "", body, flags=re.M)) for indent, language, body in FENCE.findall(text)
    ]


def spans(text: str) -> list[str]:
    """What stands in single backquotes."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def section(text: str, heading: str) -> str:
    """From the heading that contains `heading` to the next one of its level or above."""
    found = re.search(rf"^(#+) [^\n]*{re.escape(heading)}[^\n]*$", text, re.MULTILINE)
    assert found, f"no heading has {heading}"
    rest = text[found.end() :]
    following = re.search(
        rf"^#{{1,{len(found[1])}}} ", FENCE.sub(lambda fence: " " * len(fence[0]), rest), re.MULTILINE
    )
    return found[0] + (rest[: following.start()] if following else rest)


def first_column(text: str) -> list[str]:
    """Spans of the first cell of each row of the tables, headings left out."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [span for row in rows for span in spans(row)]


def anchors(text: str) -> set[str]:
    """The names that a Markdown page gives its headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
