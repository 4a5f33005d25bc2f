"""Pods of the manifests as processes of this machine: the same commands, arguments and variables.

Only what a cluster has and this machine has not is replaced, by its text: mounted folders, names of Services, ports.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
from kubernetes_objects import Object

ENTRYPOINT = ["bash", "mlops/docker/entrypoint.sh"]


def start(container: Object, log: Path, replaced: dict[str, str], given: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a container's program.

    Args:
        container: of a manifest.
        log: gets all that it says.
        replaced: texts of arguments and variables, and what stands for them here.
        given: variables that Kubernetes sets from elsewhere: fields of the pod, Secrets, the index of a Job's pod.
    """
    variables: dict[str, str] = {}
    for entry in container.get("env", []):
        value = given[entry["name"]] if "valueFrom" in entry else entry["value"]
        variables[entry["name"]] = _filled(value, variables, replaced)
    words = [_filled(word, variables, replaced) for word in container.get("args", [])]
    command = container.get("command", ENTRYPOINT)
    if command[:2] == ["tini", "--"] and not shutil.which("tini"):
        command = command[2:]
    words = [*command, *words]
    if os.geteuid() == 0:  # where this machine's user is root, the entry point is to believe that it is not
        words = ["unshare", "--user", "--map-user=10001", "--map-group=10001", *words]
    environment = {
        "PATH": f"{programs.PYTHON.parent}:{os.environ['PATH']}",
        "HOME": str(log.parent),
        "USER": "ldm3d",  # the image's list of users has 10001, this machine's has not
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with open(log, "ab") as file:
        return subprocess.Popen(
            words,
            cwd=programs.ROOT,
            env=environment | variables | given,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        )


def _filled(text: str, variables: dict[str, str], replaced: dict[str, str]) -> str:
    text = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)
    return exchanged(text, replaced)


def exchanged(text: str, replaced: dict[str, str]) -> str:
    """`text` with other texts in it, all at once: what comes in is not looked through."""
    return re.sub("|".join(map(re.escape, replaced)), lambda found: replaced[found[0]], text) if replaced else text


class Job:
    """What Kubernetes does for an Indexed Job: it starts each pod, and starts again what has failed or was evicted.

    Args:
        spec: of the Job.
        name: of the Job.
        folder: for logs.
        replaced: as of `start`.
    """

    def __init__(self, spec: Object, name: str, folder: Path, replaced: dict[str, str]):
        self.spec, self.name, self.folder, self.replaced = spec, name, folder, replaced
        self.failures, self.codes = 0, []  # type: tuple[int, list[int]]
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, index: int) -> str:
        return (self.folder / f"{index}.log").read_text()

    def run(self, evicted: int | None = None, when: Callable[[], Any] = lambda: False, seconds: float = 400) -> None:
        """Run it to its end; `evicted` is the pod that is evicted, once, as soon as `when` says so."""
        until = time.monotonic() + seconds
        running = {index: self._start(index) for index in range(self.spec["completions"])}
        disrupted = set()
        try:
            while running:
                assert time.monotonic() < until, f"{self.name} hangs\n" + "\n".join(
                    map(self.log, range(self.spec["completions"]))
                )
                time.sleep(0.2)
                if evicted is not None and evicted in running and evicted not in disrupted and when():
                    disrupted.add(evicted)
                    running[evicted].send_signal(signal.SIGTERM)
                for index, process in list(running.items()):
                    if (code := process.poll()) is None:
                        continue
                    self.codes.append(code)
                    del running[index]
                    if code == 0:
                        continue
                    assert code != 2, self.log(index)  # podFailurePolicy: FailJob
                    self.failures += index not in disrupted  # podFailurePolicy: Ignore
                    assert self.failures <= self.spec["backoffLimit"], self.log(index)
                    running[index] = self._start(index)
            assert evicted is None or disrupted, "it ended before it could be evicted"
        finally:
            for process in running.values():
                process.kill()
                process.wait()

    def _start(self, index: int) -> "subprocess.Popen[bytes]":
        [container] = self.spec["template"]["spec"]["containers"]
        given = {"JOB_NAME": self.name, "JOB_COMPLETION_INDEX": str(index)}
        return start(container, self.folder / f"{index}.log", self.replaced, given)
