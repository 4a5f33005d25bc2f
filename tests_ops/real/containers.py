"""Containers of the project's image, run to their end or beside a test, always hardened."""

import json
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

from images import podman

HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=512")
"""How the image is to be run everywhere."""
LIMITED = (*HARDENED, "--memory=4g")


def run(image: str, *words: object, check: bool = True, **environment: object) -> Any:
    """Run a container to its end. `words` are podman's options, then, after "--", what the program is given."""
    options, given = parted(words)
    return podman("run", "--rm", *LIMITED, *variables(environment), *options, image, *given, check=check, timeout=900)


def parted(words: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What stands before and after "--"."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def variables(environment: dict[str, object]) -> list[str]:
    return [f"--env={name}={value}" for name, value in environment.items()]


def python(image: str, *words: object, volume: str = "") -> str:
    mounts = [f"--volume={volume}:/data"] if volume else []
    return str(run(image, *mounts, "--entrypoint=python", "--", *words).stdout)


def shell(image: str, script: str, *options: object) -> str:
    return str(run(image, *options, "--entrypoint=bash", "--", "-c", script).stdout)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Running:
    """A container that runs on the host's network. `words` as for `run`."""

    def __init__(self, image: str, *words: object, **environment: object):
        self.name = f"ldm3d-test-{uuid.uuid4().hex[:8]}"
        options, given = parted(words)
        podman("run", "--detach", f"--name={self.name}", *LIMITED, *variables(environment), *options, image, *given)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        podman("rm", "--force", "--time=1", self.name)

    def exec(self, *words: object) -> Any:
        return podman("exec", self.name, *words, check=False)

    def is_healthy(self) -> bool:
        """What HEALTHCHECK's command says."""
        return podman("healthcheck", "run", self.name, check=False).returncode == 0

    def processes(self, what: str) -> set[str]:
        """Numbers of the processes whose command line begins with `what`."""
        each = "for p in /proc/[0-9]*; do"
        begins = f"tr '\\0' ' ' 2>/dev/null <$p/cmdline | grep -q '^{what}' && echo ${{p#/proc/}}"
        return set(self.exec("bash", "-c", f"{each} {begins}; done").stdout.split())

    def state(self) -> dict[str, Any]:
        return dict(json.loads(podman("inspect", self.name).stdout)[0]["State"])

    def log(self) -> str:
        done = podman("logs", self.name, check=False)
        return done.stdout + done.stderr

    def until(self, seen: Callable[[], Any], what: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}; {self.log()}"
            assert self.state()["Running"], self.log()
            time.sleep(0.5)
