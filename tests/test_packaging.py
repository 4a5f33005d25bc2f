"""The package: what is in the wheel, that its commands are the scripts, and that what is said twice is said alike."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm3d import __version__, entry_points
from ldm3d.errors import UserError
from mlops.deployment.release_notes import notes

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "utils")
# What must not get into a wheel, as it may lie about in a checkout.
PRIVATE = ("tests/test_x.py", "data/case.nii.gz", "checkpoints/run/autoencoder.safetensors", "results/a.json")
PRIVATE += ("mlops/api/app.py", "ldm3d/notes.txt", "ldm3d/__pycache__/x.pyc", "config/notes.txt", ".env")


def python(*arguments: object, cwd: Path, **more: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **more)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `python -m build` does, of a checkout with all kinds of other files in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", *(f"{script}.py" for script in SCRIPTS)):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "utils.py", folder)
    for name in ("ldm3d", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    built = python("-c", "from setuptools import build_meta; print(build_meta.build_wheel('dist'))", cwd=folder)
    assert built.returncode == 0, built.stderr
    return folder / "dist" / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip puts into site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(installed: Path) -> Message:
    return Parser().parsestr((installed / f"ldm3d-{__version__}.dist-info" / "METADATA").read_text())


def test_the_wheel_has_library_scripts_and_configs_and_nothing_else(installed: Path) -> None:
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    about = f"ldm3d-{__version__}.dist-info"
    expected = {f"ldm3d/{path.name}" for path in (ROOT / "ldm3d").glob("*.py")} | {"ldm3d/py.typed"}
    expected |= {f"ldm3d/scripts/{name}.py" for name in (*SCRIPTS, "utils")} | {"ldm3d/scripts/LICENSE"}
    expected |= {f"ldm3d/scripts/config/{path.name}" for path in (ROOT / "config").iterdir()}
    expected |= {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    assert found == expected | {f"{about}/licenses/LICENSE"}
    assert (installed / about / "top_level.txt").read_text().split() == ["ldm3d"]


def test_the_scripts_in_it_are_those_of_the_repository(installed: Path) -> None:
    for name in (*SCRIPTS, "utils"):
        assert (installed / f"ldm3d/scripts/{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()


def test_the_metadata_is_whole(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] in (ROOT / "LICENSE").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    classifiers = metadata.get_all("Classifier", [])
    assert not any(classifier.startswith("License ::") for classifier in classifiers)  # PEP 639
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    low, high = re.findall(r"3\.(\d+)", metadata["Requires-Python"].partition(",")[2] + metadata["Requires-Python"])[:2]
    assert promised == [f"3.{n}" for n in range(min(int(low), int(high)), max(int(low), int(high)))]
    assert metadata.get_all("Project-URL") is None, "there is no public address yet"


def parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_requirements_pin_what_the_package_asks_for() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    ranges = dict(re.findall(r"([\w.-]+?)(>=.*)", line)[0] for line in PROJECT["project"]["dependencies"])
    assert ranges.keys() == pinned.keys()
    for name, wanted in ranges.items():
        low, _, high = wanted.removeprefix(">=").partition(",<")
        assert parts(low) <= parts(pinned[name]) < parts(high or "999"), name


# The commands


def test_every_script_has_its_command() -> None:
    commands = dict(PROJECT["project"]["scripts"])
    assert commands.pop("ldm3d-copy-configs") == "ldm3d.entry_points:copy_configs"
    assert commands == {f"ldm3d-{name.replace('_', '-')}": f"ldm3d.entry_points:{name}" for name in SCRIPTS}
    for name in SCRIPTS:
        assert getattr(entry_points, name).args == (name,)


def test_a_command_of_the_wheel_runs_its_script(installed: Path, tmp_path: Path) -> None:
    """Away from the repository; the command file is what pip makes of the entry point."""
    command = tmp_path / "ldm3d-visualize-image"
    command.write_text("import sys\nfrom ldm3d.entry_points import visualize_image\nsys.exit(visualize_image())\n")
    done = python(command, "none.nii.gz", cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert (done.returncode, done.stderr) == (2, "error: none.nii.gz: there is no such file\n")


SCRIPT = """
import argparse
import multiprocessing

import utils


def work(number):
    return utils.double(number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("number", type=int)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(parser.prog, pool.map(work, [args.number]))
"""


def test_a_script_is_the_main_program_also_for_processes_that_it_spawns(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(SCRIPT)
    (tmp_path / "utils.py").write_text("def double(number):\n    return 2 * number\n")
    command = tmp_path / "bin" / "ldm3d-stage"
    command.parent.mkdir()
    command.write_text(
        "from pathlib import Path\nfrom ldm3d import entry_points\n"
        f"if __name__ == '__main__':\n    entry_points.SCRIPTS = Path({str(tmp_path)!r})\n"
        "    entry_points.run_script('stage')\n"
    )
    done = python(command, 21, cwd=command.parent, env={"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.returncode) == ("ldm3d-stage [42]\n", 0), done.stderr


def test_configs_come_with_the_package(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from ldm3d.entry_points import copy_configs; sys.exit(copy_configs())"
    done = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    ours = {path.name: path.read_bytes() for path in (ROOT / "config").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "config").iterdir()} == ours
    assert done.stdout == f"{len(ours)} files in config\n"


def test_configs_that_are_there_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ldm3d-copy-configs", "--output", str(tmp_path)])
    assert entry_points.copy_configs() == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: exists already; name another folder with --output\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["ldm3d-copy-configs", "--output", str(tmp_path / "file" / "config")])
    assert entry_points.copy_configs() == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file/config: cannot be written: Not a directory\n"


# The version, said in one place and repeated in others


def test_the_version_is_the_same_wherever_it_is_repeated() -> None:
    kinds = {".md", ".yml", ".yaml", ".json", ".sh", ".ps1", ""}
    files = [path for path in (ROOT / "mlops").rglob("*") if path.is_file() and path.suffix in kinds]
    said = {
        (str(path.relative_to(ROOT)), version)
        for path in [*files, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for version in re.findall(r"\bldm3d(?:-train)?:(\d+\.\d+\.\d+)|ARG VERSION=(\d\S+)", path.read_text("utf-8"))
        for version in version
        if version
    }
    assert len(said) > 5
    assert {version for _, version in said} == {__version__}, said


def test_the_citation_names_the_version_and_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == PROJECT["project"]["authors"]
    assert {"cff-version", "message", "title"} <= citation.keys()
    assert json.loads(json.dumps(citation)) == citation, "a date or a number where text is meant"


CHANGES = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-12-24

### Added

- A thing.

## [0.1.0] - 2026-11-30

- The first.

[0.1.0]: https://example.org
"""


def test_release_notes_are_the_version_s_section() -> None:
    assert notes(CHANGES, "0.2.0") == "### Added\n\n- A thing.\n"
    assert notes(CHANGES, "0.1.0") == "- The first.\n"
    for version in ("Unreleased", "0.1", "0.3.0"):
        with pytest.raises(UserError, match=f"nothing about {version}; it has sections on Unreleased, 0.2.0, 0.1.0"):
            notes(CHANGES, version)


def test_the_changelog_has_notes_for_the_next_release() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert notes(text, __version__ if f"## [{__version__}]" in text else "Unreleased")
