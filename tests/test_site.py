"""The documentation site has every page, and its hooks do what the pages need. Where MkDocs is, the site is built."""

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import DOCUMENTS, FENCE, ROOT, each_document, read, site_hooks

hooks = site_hooks()
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
NO_PAGES = (".github",)
"""Forms that a code host fills in."""


class Loader(yaml.SafeLoader):
    """Passes over what only MkDocs can make of its file."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
SITE: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def pages() -> list[str]:
    """Documents as the site has them: a notebook is a page too."""
    paths = [path.relative_to(ROOT) for path in DOCUMENTS]
    return [path.with_suffix(".md").as_posix() for path in paths if path.parts[0] not in NO_PAGES]


def test_the_site_has_every_page_once_and_no_other() -> None:
    assert sorted(hooks.named(SITE["nav"])) == sorted(pages()), (
        "name each page in `nav` of mkdocs.yml, where a reader looks"
    )


def test_nothing_is_loaded_from_elsewhere() -> None:
    assert SITE["theme"]["font"] is False
    assert "analytics" not in SITE["extra"]
    scripts = [*SITE["extra_css"], *SITE["extra"]["polyfills"]]
    assert [name for name in scripts if not (ROOT / SITE["docs_dir"] / name).is_file()] == []


def formulas(text: str) -> list[str]:
    """What is written for MathJax, which the site has not: it would have to be loaded from elsewhere."""
    return re.findall(r"\$[^$`\n]+\$", re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


@each_document
def test_formulas_are_plain_text(document: Path) -> None:
    assert formulas(read(document)) == []


def test_a_formula_that_the_site_would_show_as_it_is_typed_is_seen() -> None:
    assert formulas("noise $z_s$ costs `$HOME` and\n```bash\necho $a $b\n```\n") == ["$z_s$"]


def problems_of_lists(text: str) -> list[str]:
    """Items that code hosts take for a list and Python-Markdown, which makes the site, for something else."""
    lines = FENCE.sub("", text).splitlines()
    found = []
    for before, line in zip(["", *lines], lines, strict=False):
        item = re.match(r"( *)([-*]|\d+\.) ", line)
        if item and 0 < len(item[1]) < 4:
            found.append(f"{line}: an item inside another must be indented by 4 spaces")
        elif item and before and not before.startswith((" ", "- ", "* ", "#")) and not re.match(r"\d+\. ", before):
            found.append(f"{line}: a list needs an empty line before it")
    return found


@each_document
def test_lists_are_lists_on_the_site_too(document: Path) -> None:
    assert problems_of_lists(read(document)) == []


def test_bad_lists_are_seen() -> None:
    assert len(problems_of_lists("Text:\n- one\n- two\n")) == 1
    assert len(problems_of_lists("- one\n  - two\n")) == 1
    assert problems_of_lists("# Head\n\n- one\n  more\n- two\n    - three\n\n1. x\n2. y\n") == []


def test_linked_files_that_are_no_pages_are_copied() -> None:
    text = (
        "![a](../figs/speed.png) [b](../LICENSE) [c](API.md#x) [d](https://x.org/LICENSE) [e](none.png) [f](../tests) "
        f"[h](/etc/hosts) [i](../../etc/hosts) [j]({Path(__file__)})"
    )
    assert list(hooks.linked("docs/PAGE.md", f"{text}\n```text\n[g](../Makefile)\n```")) == [
        "figs/speed.png",
        "LICENSE",
    ]


def test_a_notebook_becomes_a_page() -> None:
    png = base64.b64encode(b"picture").decode()
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text"]},
        {
            "cell_type": "code",
            "source": ["print(1)\n"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n", "2\n"]},
                {"output_type": "display_data", "data": {"image/png": png, "text/plain": ["<Figure>"]}},
            ],
        },
        {
            "cell_type": "code",
            "source": [],
            "outputs": [{"output_type": "execute_result", "data": {"text/plain": "```"}}],
        },
    ]
    made = hooks.notebook_page("a/nb.md", {"cells": cells})
    assert made["a/nb_0.png"] == b"picture"
    expected = "# Title\nText\n\n```python\nprint(1)\n```\n\n```text\n1\n2\n```\n\n![What this cell shows](nb_0.png)"
    assert made["a/nb.md"] == f"{expected}\n\n````text\n```\n````\n"
    assert hooks.on_page_markdown("[x](../nb.ipynb#part), `nb.ipynb`") == "[x](../nb.md#part), `nb.ipynb`"


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does it. With `--quiet`, `--strict` would let everything pass."""
    command = [MKDOCS, "build", "--strict", "--site-dir", site]
    silent = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=silent, capture_output=True, text=True, timeout=240)


needs_mkdocs = pytest.mark.skipif(not MKDOCS.exists(), reason="no .venv-docs: make docs makes it")


@needs_mkdocs
def test_the_site_is_built_without_a_warning_and_loads_nothing(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    html = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', html) == []


@needs_mkdocs
@pytest.mark.parametrize(
    ("text", "code"),
    [("[a](LICENSE)", 0), ("[a](none.md)", 1), ("[a](#none)", 1), ("[a](none.py)", 1), ("[a](docs)", 1)],
)
def test_a_dead_link_or_anchor_is_seen(tmp_path: Path, text: str, code: int) -> None:
    for folder in SITE["watch"]:
        (tmp_path / folder).mkdir() if "." not in folder else (tmp_path / folder).write_text(f"# Page\n\n{text}\n")
    shutil.copytree(ROOT / SITE["docs_dir"], tmp_path / SITE["docs_dir"])
    shutil.copy(ROOT / "LICENSE", tmp_path)
    whole = (ROOT / "mkdocs.yml").read_text()
    nav = whole[whole.index("\nnav:") : whole.index("\nvalidation:")]
    (tmp_path / "mkdocs.yml").write_text(whole.replace(nav, "\nnav: [README.md]\n"))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == code, done.stdout + done.stderr
