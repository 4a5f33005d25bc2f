"""What goes out works where nothing of this checkout is: the wheel, and an exported MONAI bundle, each in a fresh
environment. Needs what pip is told to look for; a wheel of torch is installed each time."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from programs import PYTHON, ROOT, run

pytestmark = pytest.mark.timeout(2400)
WEIGHTS = ("-c", "config/config_demo.json", "--model-dir", "checkpoints/demo")
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def fresh(folder: Path, *packages: object) -> Path:
    """The `bin` of a new environment with these packages."""
    assert run(PYTHON.resolve(), "-m", "venv", folder / "venv", timeout=1500).returncode == 0
    pip = (folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = run(*pip, *packages, timeout=1500)
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def at(folder: Path, *command: object) -> "subprocess.CompletedProcess[str]":
    done = run(*command, cwd=folder, env=ALONE, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done


def made_here(folder: Path, count: int) -> list[bytes]:
    """Volumes of inference.py in this checkout."""
    files = (*WEIGHTS[:2], "-e", "config/environment_sample.json")
    at(ROOT, PYTHON, "inference.py", *files, "--num", count, "--output", folder)
    return volumes(folder)


def volumes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))]


def test_a_monai_bundle_in_an_environment_that_has_what_its_metadata_say(tmp_path: Path) -> None:
    at(ROOT, PYTHON, "-m", "ldm3d.bundle", *WEIGHTS, "--output", tmp_path / "brains")
    metadata = json.loads((tmp_path / "brains/configs/metadata.json").read_text())
    wanted = {"torch": metadata["pytorch_version"], "monai": metadata["monai_version"]}
    wanted |= {"numpy": metadata["numpy_version"]} | metadata["required_packages_version"]
    python = fresh(tmp_path, *(f"{name}=={version}" for name, version in wanted.items())) / "python"
    at(tmp_path / "brains", python, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--num", 2)
    ours = made_here(tmp_path / "ours", 2)
    assert len(ours) == 2
    assert volumes(tmp_path / "brains/volumes") == ours


def test_the_wheel_s_commands_away_from_the_repository(tmp_path: Path) -> None:
    at(ROOT, PYTHON, "-m", "ldm3d.bundle", *WEIGHTS, "--format", "huggingface", "--output", tmp_path / "hub")
    at(ROOT, "git", "archive", "--format=tar", "--prefix=source/", f"--output={tmp_path / 'source.tar'}", "HEAD")
    at(tmp_path, "tar", "-xf", "source.tar")
    at(tmp_path, PYTHON, "-m", "pip", "wheel", "--quiet", "--no-deps", "./source")
    (wheel,) = tmp_path.glob("ldm3d-*.whl")
    commands = fresh(tmp_path, "--constraint", ROOT / "requirements.txt", wheel)
    place = tmp_path / "empty"
    place.mkdir()
    at(place, commands / "ldm3d-copy-configs")
    made = ("-e", "config/environment_demo.json", "--phantom", 2, "--size", 24, 32, 24, "--spacing", 6)
    at(place, commands / "ldm3d-download-brats-data", *made)
    files = ("-c", tmp_path / "hub/config.json", "-e", tmp_path / "hub/environment.json")
    at(tmp_path / "hub", commands / "ldm3d-inference", *files, "--num", 1)
    assert volumes(tmp_path / "hub/volumes") == made_here(tmp_path / "ours", 1)
    names = {path.name for path in commands.parent.glob("lib/python3*/site-packages/*")}
    assert not names & {"utils.py", "inference.py", "config", "mlops", "tests"}
