"""The page and the picture of the architecture show the rooms that there are."""

from xml.etree import ElementTree

from document_names import in_tree, is_path, made_by
from documents import ROOMS, ROOT, SCRIPTS, first_column, section
from test_import_direction import upward_imports

ARCHITECTURE, PICTURE = (ROOT / "docs" / name for name in ("ARCHITECTURE.md", "architecture.svg"))


def listed_rooms() -> list[str]:
    """Rooms in the order of the tables."""
    text = section(ARCHITECTURE.read_text(), "The direction of imports")
    return [span.removesuffix(".py") for span in first_column(text) if span.endswith(".py")]


def test_architecture_lists_every_room_once() -> None:
    assert sorted(listed_rooms()) == sorted(ROOMS)


def test_architecture_lists_rooms_in_the_order_of_imports() -> None:
    assert upward_imports(ROOT / "ldm3d", listed_rooms()) == []


def picture_names() -> set[str]:
    """File and room names in the picture."""
    elements = ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
    return {word for element in elements if element.get("class") == "code" for word in (element.text or "").split()}


def test_picture_shows_every_room_and_script_and_no_other() -> None:
    names = picture_names()
    assert names >= ROOMS
    assert {*SCRIPTS, "utils.py"} <= names
    others = {name for name in names - ROOMS if not in_tree(name, ROOT)}
    assert {name for name in others if not (is_path(name) and made_by(name))} == set()
