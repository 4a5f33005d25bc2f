"""The offline bundle, made, installed and used where there is no network; and refused where it is not whole."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from programs import PYTHON, ROOT, need, run

# Wheels of 300 MB are packed, unpacked and installed.
pytestmark = pytest.mark.timeout(1800)

HEALTH = """
import json, sys, time, urllib.request
for _ in range(600):
    try:
        print(urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5).read().decode())
        break
    except OSError:
        time.sleep(0.2)
"""
SERVE = "ip link set lo up; ../venv/bin/python mlops/docker/api_server.py 2>log & server=$!; "
SERVE += "../venv/bin/python health.py; kill $server; wait $server"
REACH = "../venv/bin/python -c 'import socket; socket.create_connection((\"192.0.2.1\", 80), 2)'"


def isolated(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command without a network and without this machine's settings of pip."""
    need("unshare", "ip")
    namespace = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    return run(*namespace, *command, cwd=folder, env=settings | {"PIP_CONFIG_FILE": "/dev/null"}, timeout=1500)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    weights = "checkpoints/demo"
    options = ("-c", "config/config_demo.json", "--model-dir", weights, "--output", folder)
    made = run(PYTHON, "-m", "mlops.deployment.bundle", "create", *options, cwd=ROOT, timeout=1500)
    assert made.returncode == 0, made.stderr
    archive = Path(json.loads(made.stdout)["archive"])
    assert run("sha256sum", "--check", f"{archive.name}.sha256", cwd=folder).returncode == 0
    with tarfile.open(archive) as tar:
        assert {(entry.uid, entry.uname, entry.mtime) for entry in tar} == {(0, "", 0)}
        tar.extractall(folder, filter="tar")
    archive.unlink()
    return folder / archive.name.removesuffix(".tar")


@pytest.fixture(scope="module")
def installed(unpacked: Path) -> Path:
    done = isolated(unpacked, "./install.sh", str(PYTHON.resolve()))
    assert done.returncode == 0, done.stderr
    assert "inference.py" in done.stdout
    return unpacked


@pytest.fixture
def copy(unpacked: Path, tmp_path: Path) -> Path:
    """The bundle as it was sent, to be damaged: files are shared until one is written anew."""
    target = tmp_path / "copy"
    shutil.copytree(unpacked, target, copy_function=os.link, ignore=shutil.ignore_patterns("venv", "volumes"))
    return target


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_there_is_no_network_where_it_is_installed(installed: Path) -> None:
    reached = isolated(installed / "app", "sh", "-c", REACH)
    assert reached.returncode != 0
    assert "unreachable" in reached.stderr


def test_the_environment_is_that_of_the_bundle_alone(installed: Path) -> None:
    listed = run(installed / "venv/bin/python", "-m", "pip", "list", "--format=json", env={"PATH": os.environ["PATH"]})
    names = {package["name"] for package in json.loads(listed.stdout)} - {"pip", "setuptools"}
    wheels = [path.name for path in (installed / "wheels").iterdir()]
    assert {"torch", "monai", "fastapi"} <= names
    assert len(names) == len([wheel for wheel in wheels if not wheel.startswith(("pip-", "setuptools-"))])


def test_it_makes_the_brain_that_is_made_here(installed: Path, tmp_path: Path) -> None:
    settings = ("-c", "../config.json", "-e", "../environment.json", "--num", "1", "--seed", "3", "--steps", "2")
    done = isolated(installed / "app", "../venv/bin/python", "inference.py", *settings)
    assert done.returncode == 0, done.stderr
    here = ("-c", "config/config_demo.json", "-e", "config/environment_sample.json", "--output", tmp_path)
    assert run(PYTHON, "inference.py", *here, *settings[4:], cwd=ROOT).returncode == 0
    ours, theirs = (folder / "synimg_3_0.nii.gz" for folder in (tmp_path, installed / "volumes"))
    assert hashlib.sha256(ours.read_bytes()).digest() == hashlib.sha256(theirs.read_bytes()).digest()


def test_it_serves(installed: Path) -> None:
    (installed / "app/health.py").write_text(HEALTH)
    settings = ("LDM3D_DATA_DIR=../service_data", "LDM3D_MODELS_FILE=../models.yaml")
    done = isolated(installed / "app", "env", *settings, "sh", "-c", SERVE)
    assert '"status"' in done.stdout, done.stdout + done.stderr + (installed / "app/log").read_text()


def test_a_damaged_wheel_is_refused(copy: Path) -> None:
    wheel = next((copy / "wheels").glob("nibabel-*"))
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    replace(wheel, bytes(content))
    done = isolated(copy, "./install.sh", str(PYTHON.resolve()))
    assert done.returncode == 2
    assert f"./wheels/{wheel.name}: FAILED" in done.stdout + done.stderr
    assert "error: the bundle is damaged" in done.stderr
    assert not (copy / "venv").exists()


def test_pip_refuses_it_too_where_somebody_has_changed_the_digests(copy: Path) -> None:
    wheel = next((copy / "wheels").glob("nibabel-*"))
    before, content = hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.read_bytes() + b" "
    replace(wheel, content)
    sums = (copy / "SHA256SUMS").read_text().replace(before, hashlib.sha256(content).hexdigest())
    replace(copy / "SHA256SUMS", sums.encode())
    done = isolated(copy, "./install.sh", str(PYTHON.resolve()))
    assert done.returncode == 2
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not list((copy / "venv/lib").glob("*/site-packages/nibabel"))


def test_what_is_missing_is_refused(copy: Path) -> None:
    (copy / "models/autoencoder.safetensors").unlink()
    done = isolated(copy, "./install.sh", str(PYTHON.resolve()))
    assert (done.returncode, "error: the bundle is damaged" in done.stderr) == (2, True)


def test_another_python_is_refused(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f"#!/bin/sh\n{PYTHON} \"$@\" | sed 's/cpython 3.[0-9]*/cpython 3.9/'\n")
    other.chmod(0o755)
    done = isolated(copy, "./install.sh", str(other))
    assert done.returncode == 2
    assert "error: this bundle is for cpython 3." in done.stderr
    assert done.stderr.strip().endswith("is cpython 3.9 Linux x86_64")
    done = isolated(copy, "./install.sh", "no-such-python")
    assert (done.returncode, "error: no-such-python: no such program" in done.stderr) == (2, True)
