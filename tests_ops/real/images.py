"""The image, built from the unmodified Dockerfile by buildah, and containers of it under podman.

Images of Debian's packages stand in for those of a registry. Building again costs seconds: buildah keeps the layers,
and finds them by the digests of what they are made of.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import programs

BASE = "localhost/ldm3d-test-base:bookworm"
"""Not the name that the Dockerfile says: that would stay behind as an image that it is not. BASE_IMAGE is for this."""
DEBIAN = "python3,python3-venv,python3-pip,ca-certificates"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = os.environ | {"CONTAINERS_CONF": str(Path(__file__).parent / "containers.conf")}
BUILD = ("--layers", "--isolation=chroot", "--pull-never", "--format=docker")


def podman(*words: object, check: bool = True, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """Run podman; its failure fails the test, unless `check` is false."""
    # Without systemd nobody runs health checks by a clock, which podman calls an error; the tests run them.
    done = programs.run("podman", "--log-level=fatal", *words, env=ENVIRONMENT, timeout=timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def service_image(variant: str = "cpu", target: str = "prod") -> str:
    """Name of the image of this checkout's code, built if need be.

    Args:
        variant: cpu or cuda.
        target: prod or dev.
    """
    programs.need("buildah", "podman", "runc", "mmdebstrap")
    name = f"localhost/ldm3d-test:{variant}-{target}"
    build(name, programs.ROOT / "mlops/docker/Dockerfile", programs.ROOT, *options(variant, target))
    return name


def options(variant: str, target: str) -> list[str]:
    given = {"VARIANT": variant, "BASE_IMAGE": base_image(), "TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
    return [f"--target={target}", *(f"--build-arg={name}={value}" for name, value in given.items())]


def build(name: str, file: Path, context: Path, *given: object) -> None:
    """Build with this machine's package index, which is mounted and so leaves no trace in the image."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["buildah", "bud", *BUILD, *pip_mounts(Path(folder)), *given, "--tag", name, "--file", file, context]
        done = programs.run(*command, env=ENVIRONMENT, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def pip_mounts(folder: Path) -> list[str]:
    """How this machine's pip finds packages, as mounts for a build."""
    listed = programs.run(programs.PYTHON, "-m", "pip", "config", "list").stdout.splitlines()
    config = {key.split(".")[-1]: value.strip("'\"") for key, value in (line.split("=", 1) for line in listed)}
    used = ("cert", "find-links", "index-url", "extra-index-url", "timeout")
    known = {key: config[key] for key in used if key in config}
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in known.items()))
    files = [word.removeprefix("file://") for word in known.get("extra-index-url", "").split()]
    folders = [str(Path(path).parent) for path in files if path.startswith("/")]
    paths = [known.get("cert", ""), *known.get("find-links", "").split(), *folders]
    mounts = [(str(file), "/etc/pip.conf"), *((path, path) for path in paths if path.startswith("/"))]
    return [f"--volume={source}:{target}:ro" for source, target in mounts]


def base_image() -> str:
    """Debian with Python, made of packages, in place of the official image of Python."""
    return debian_image(BASE, DEBIAN)


def debian_image(name: str, packages: str) -> str:
    """Name of an image of Debian 12 with these packages (separated by commas), made if need be."""
    if podman("image", "exists", name, check=False).returncode == 0:
        return name
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "root.tar"
        made = programs.run("mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", tar, timeout=900)
        assert made.returncode == 0, made.stderr[-3000:]
        podman("import", f"--change=ENV=PATH={PATH}", tar, name)
    return name


def size_mib(name: str) -> float:
    """What an image takes on the disk, with its base."""
    return float(json.loads(podman("image", "inspect", name).stdout)[0]["Size"]) / 2**20
