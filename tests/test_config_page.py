"""docs/CONFIG.md is what the code says of its keys, and complete."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from documents import ROOT, first_column, section
from pydantic import Field

from ldm3d import config_page
from ldm3d.config import load_config
from ldm3d.definitions import Positive, Size, Strict
from ldm3d.errors import ConfigError
from ldm3d.schema import Config, Environment

PAGE = ROOT / "docs" / "CONFIG.md"


def test_the_page_is_what_the_code_says() -> None:
    written = config_page.config_page()
    assert PAGE.read_text(encoding="utf-8") == written, "run: python -m ldm3d.config_page > docs/CONFIG.md"


def test_the_page_has_every_key_of_every_section() -> None:
    """Against the models, not against what the page is made with."""
    sections = [(f"`{key}`", Config.model_fields[key].annotation) for key in ("autoencoder_train", "data", "sampling")]
    for heading, model in [*sections, ("top level", Config), ("environment file", Environment)]:
        keys = [field.alias or name for name, field in model.model_fields.items()]
        assert first_column(section(PAGE.read_text(), heading)) == keys, heading
    assert first_column(section(PAGE.read_text(), "type `rflow`"))[0] == "type"


class Every(Strict):
    """One key of each kind."""

    whole: Positive
    """A."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """B, over
    two lines."""
    size: Size | None = None
    """C."""
    levels: Positive | tuple[bool, ...] = 2
    """D."""
    choice: Literal["x", "y", 3] = "x"
    """E."""
    where: Path | None = None
    """F."""


def test_types_limits_and_defaults_are_said() -> None:
    assert config_page.section("It", Every).rstrip().splitlines() == [
        "## It",
        "",
        "One key of each kind.",
        "",
        "| Key | Type | Default | Meaning |",
        "| --- | --- | --- | --- |",
        "| `whole` | integer > 0 | required | A. |",
        "| `share` | number ≥ 0, < 1 | `0.5` | B, over two lines. |",
        "| `size` | 3 x integer > 0, ≤ 4096 or `null` | `null` | C. |",
        "| `levels` | integer > 0 or list of: `true` or `false` | `2` | D. |",
        '| `choice` | `"x"`, `"y"` or `3` | `"x"` | E. |',
        "| `where` | path or `null` | `null` | F. |",
    ]


@pytest.mark.parametrize("override", ["keep_last=2.0", 'keep_last="2"', "amp=1"])
def test_nothing_is_converted_as_the_page_says(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(ROOT / "config" / "config_demo.json", [override])
