"""setup_docker.sh as a user runs it, with podman in the place of docker."""

import os
import shlex
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import images
import programs
import pytest
from containers import free_port
from images import podman

pytestmark = pytest.mark.timeout(1800)

DOCKER = """#!/bin/bash
# Names are this test's own, so that nothing of the user's is touched; the host's network has a port of its own.
set -- "${{@//ldm3d-/{own}-}}"
set -- "${{@/#ldm3d:/localhost/ldm3d-test:setup-}}"
command=$1
shift
case $command in
  build) exec buildah bud {build} "$@" ;;
  run) exec podman --log-level=fatal run --env LDM3D_PORT={port} --env OMP_NUM_THREADS=1 "$@" ;;
  *) exec podman --log-level=fatal "$command" "$@" ;;
esac
"""


@pytest.fixture
def own() -> Iterator[str]:
    name = f"test{uuid.uuid4().hex[:8]}"
    yield name
    podman("rm", "--force", "--time=1", f"{name}-api", check=False)
    listed = podman("volume", "ls", "--quiet", "--filter", f"name={name}").stdout.split()
    podman("volume", "rm", "--force", *listed)


def test_the_service_is_ready_when_it_says_so_and_starts_again_with_its_keys(own: str, tmp_path: Path) -> None:
    images.service_image()  # so that the script's build finds its layers
    port = free_port()
    base = f"--build-arg=BASE_IMAGE={images.base_image()}"
    build = shlex.join([*images.BUILD, *images.pip_mounts(tmp_path), base])
    docker = tmp_path / "docker"
    docker.write_text(DOCKER.format(own=own, port=port, build=build))
    docker.chmod(0o755)

    def setup() -> str:
        command = [programs.ROOT / "mlops/docker/setup_docker.sh", "--environment", "prod", "--mode", "api"]
        environment = images.ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0 and done.stdout.endswith("ready: http://127.0.0.1:8000/\n"), (
            done.stdout + done.stderr
        )
        return done.stdout

    first = setup()
    key = next(word for word in first.split() if word.startswith("ldm3d_"))
    address, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{address}/v1/me", headers=headers).json()["role"] == "admin"
    before = podman("inspect", f"{own}-api", "--format={{.Id}}").stdout
    assert "ldm3d_" not in setup()
    assert podman("inspect", f"{own}-api", "--format={{.Id}}").stdout != before
    assert httpx.get(f"{address}/v1/me", headers=headers).json()["role"] == "admin"
