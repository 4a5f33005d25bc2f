"""What is wrong with the names in documents: config keys, files, links, routes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from documents import ROOT, anchors, blocks, code, spans

from ldm3d.config import OLD_KEYS
from ldm3d.schema import Config, Environment
from mlops.api.security import ACCESS

SUFFIXES = {"py", "md", "json", "sh", "bat", "txt", "svg", "png", "nii", "gz", "pt", "safetensors", "csv", "example"}

# Config keys.


def exists(key: str, root: Any = Config) -> bool:
    """Whether the schema has a key such as `data.on_error`."""
    models = [root]
    for part in key.split("."):
        fields = [f for model in models for name, f in model.model_fields.items() if part in (f.alias, name)]
        if not fields:
            return False
        models = [m for f in fields for m in [f.annotation, *getattr(f.annotation, "__args__", ())] if is_section(m)]
    return True


def is_section(annotation: Any) -> bool:
    return hasattr(annotation, "model_fields")


def keys_of(content: Any, beginning: str = "") -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{beginning}{key}"
        yield from keys_of(value, f"{beginning}{key}.")


def problems_of_keys(text: str) -> list[str]:
    """Keys with a dot in spans, keys that are set, and keys of JSON blocks, which the schema does not have."""
    dotted = [span for span in spans(text) if re.fullmatch(r"\w+(\.\w+)+(=.*)?", span) and not is_path(span)]
    named = [span.split("=")[0] for span in dotted if span.split(".")[0] in Config.model_fields]
    named += [key for span in spans(text) for key in re.findall(r"--set '?([\w.]+)=", span)]
    for block in blocks(text):
        if block.language == "json":
            content = json.loads(block.text)
            named += [key for key in keys_of(content) if not exists(key, Environment)]
    return [key for key in named if not exists(key) and key not in OLD_KEYS]


# Files and links.


def problems_of_paths(text: str, folder: Path) -> list[str]:
    """Paths in spans that are neither in the tree nor named by the code that makes them, or by code in the text."""
    own = "\n".join(block.text for block in blocks(text) if block.language == "python")
    paths = [span for span in spans(text) if re.fullmatch(r"[\w./<>*+-]+", span) and is_path(span)]
    # A table that says what is in a folder names its files without it.
    folders = [place / span for span in spans(text) if span.endswith("/") for place in (ROOT, folder)]
    return [path for path in paths if not (in_tree(path, folder, *folders) or made_by(path) or path in own)]


def is_path(span: str) -> bool:
    return "/" in span or span.rpartition(".")[2] in SUFFIXES


def in_tree(path: str, *folders: Path) -> bool:
    path = path.removeprefix("app/")  # where the tree is in a bundle
    if path.startswith("/"):
        return False
    places = (ROOT, *folders, ROOT / "ldm3d", ROOT / "mlops" / "api", ROOT / "tests")
    return any((place / path).exists() or ("*" in path and any(place.glob(path))) for place in places)


def made_by(path: str) -> bool:
    """Whether the code writes or reads a file of this name, `<...>` and `NAME` standing for anything."""
    pieces = [
        piece for piece in re.split(r"<[^>]+>|\*|\bNAME\b", path.rstrip("/").removeprefix("./")) if len(piece) > 1
    ]
    return all(piece in code() for piece in pieces)


def leads_somewhere(link: str, document: Path) -> bool:
    if link.startswith("https://"):
        return True
    path, _, anchor = link.partition("#")
    if document.suffix == ".ipynb" and re.fullmatch(rf"{document.stem}_\d+\.png", path):  # an output, in the file
        return True
    target = (document.parent / path) if path else document
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


# Routes of the service.

ROUTE = re.compile(r"/v1/[\w/.$<>{}-]+|(?:(?<=:\d{4})|(?<![\w./-]))/(?:health|ready|metrics|openapi\.json)(?![\w./-])")


def problems_of_routes(text: str) -> list[str]:
    """Routes in a text that the service does not have; what stands for `{id}` may be anything."""
    known = [re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)) for _, path in ACCESS]
    named = [route.rstrip("./") for route in ROUTE.findall(text)]
    return [route for route in named if not any(re.fullmatch(path, route) for path in known)]
