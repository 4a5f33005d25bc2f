"""MkDocs builds the site from the pages where they lie, so that a link is right on a code host and on the site.

Pages are what `nav` in mkdocs.yml names. Other files of the repository that a page links to, pictures above all, are
copied beside them. A notebook `NAME.ipynb` is the page `NAME.md`.
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and what they show and link to."""
    from mkdocs.structure.files import File  # here, so that the tests need no MkDocs for the rest

    added: dict[str, bytes | str] = {}
    for page in named(config.nav):
        notebook = (ROOT / page).with_suffix(".ipynb")
        if (ROOT / page).is_file():
            added[page] = (ROOT / page).read_text(encoding="utf-8")
        elif notebook.is_file():
            added |= notebook_page(page, json.loads(notebook.read_text(encoding="utf-8")))
    for page in [name for name in added if name.endswith(".md")]:
        added |= {name: (ROOT / name).read_bytes() for name in linked(page, str(added[page]))}
    for name, content in added.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a notebook lead to its page."""
    return LINK.sub(lambda link: re.sub(r"\.ipynb$", ".md", link[0]), markdown)


def named(nav: Any) -> Iterator[str]:
    """Paths of all pages of a nav, in its order."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from named(item)


def linked(page: str, text: str) -> Iterator[str]:
    """Files of the repository that a page links to and that are no pages themselves."""
    for link in LINK.findall(FENCE.sub("", text)):
        path = Path(os.path.normpath(Path(page).parent / link)).as_posix()
        inside = not path.startswith(("../", "/"))
        if inside and not link.endswith((".md", ".ipynb")) and (ROOT / path).is_file():
            yield path


def notebook_page(page: str, notebook: dict[str, Any]) -> dict[str, bytes | str]:
    """A notebook as a page in Markdown, and its pictures."""
    parts: list[str] = []
    pictures: dict[str, bytes | str] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(fenced(source, "python"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{Path(page).stem}_{len(pictures)}.png"
                pictures[str(Path(page).with_name(name))] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What this cell shows]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))).rstrip():
                parts.append(fenced(text, "text"))
    return {page: "\n\n".join(parts) + "\n", **pictures}


def fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
