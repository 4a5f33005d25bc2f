"""What CHANGELOG.md says of a version, as the notes of its release.

python -m mlops.deployment.release_notes 0.1.0
"""

import re
from pathlib import Path

from ldm3d.errors import UserError
from mlops.commands import Parser, run_command

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def notes(changelog: str, version: str) -> str:
    """The section `## [version] - date`, without its heading.

    Raises:
        UserError: there is no such section, or nothing stands in it.
    """
    sections = re.split(r"^## \[(.+?)\].*$", changelog, flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    text = re.sub(r"^\[.+?\]: .*$", "", found.get(version, ""), flags=re.MULTILINE).strip()
    if not text:
        there = ", ".join(found) or "none"
        raise UserError(f"CHANGELOG.md: nothing about {version}; it has sections on {there}")
    return text + "\n"


def main() -> int:
    parser = Parser(prog="python -m mlops.deployment.release_notes", description="The notes of a release.")
    parser.add_argument("version", help="as in CHANGELOG.md: 0.1.0, or Unreleased")
    print(notes(CHANGELOG.read_text(encoding="utf-8"), parser.parse_args().version), end="")
    return 0


if __name__ == "__main__":
    run_command(main)
