"""The bundle's installer, judged by shellcheck and shfmt."""

from pathlib import Path

import pytest
from programs import MANIFESTS, run, tool

INSTALLER = MANIFESTS / "deployment/install.sh"


def faults(script: Path) -> str:
    checked = run(tool("shellcheck"), "--severity=style", script)
    formatted = run(tool("shfmt"), "-d", "-i", "2", "-ci", script)
    return checked.stdout + formatted.stdout


def test_the_installer_is_clean() -> None:
    assert faults(INSTALLER) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ('cd "$(dirname "$0")"', "cd $(dirname $0)", "SC2046"),
        ('[ "$found" = "$wanted" ]', "[ $found = $wanted ]", "SC2086"),
        ("set -eu", "set -eu\n   here=.", "here=."),
    ],
)
def test_faults_are_named(tmp_path: Path, right: str, wrong: str, named: str) -> None:
    text = INSTALLER.read_text()
    assert right in text
    (tmp_path / "install.sh").write_text(text.replace(right, wrong))
    assert named in faults(tmp_path / "install.sh")
