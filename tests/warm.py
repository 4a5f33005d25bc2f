"""Start the project's scripts in processes of their own, without each of them paying for its imports.

    python tests/warm.py serve      imports everything once, then forks for each request, a line of JSON on stdin
    python tests/warm.py REQUEST    becomes the one script that is asked for

A request is `{"script", "args", "cwd", "env", "stdout", "stderr", "timeout", "faults"}`. The forked process is a real
one: it has its own signals, limits, exit status and files, and ends by itself as the script does when it is started
by hand. The script "torchrun" is torch's own; the processes that it starts are forked, too.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import faults
import torch
from torch import nn
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.optim import AdamW

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "download_brats_data",
    "train_autoencoder",
    "train_diffusion",
    "inference",
    "evaluate",
    "visualize_image",
)


def serve() -> dict[str, Any]:
    """Answer requests until stdin ends; return in each forked process, with its request."""
    sys.path[0] = str(ROOT)
    for name in SCRIPTS:
        importlib.import_module(name)
    AdamW([nn.Parameter(torch.zeros(1))])  # the first optimizer makes torch import its compiler
    SubprocessHandler._popen = lambda _, command, env: Rank(command, env)  # type: ignore[method-assign]
    gc.freeze()  # else the first collection in each child would copy all that the parent holds
    for line in sys.stdin:
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a killed script has left running
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
        print(json.dumps(answer), flush=True)
    raise SystemExit


class Rank:
    """What torchrun holds of a process that it has started: `subprocess.Popen`, as far as it asks for that."""

    def __init__(self, command: tuple[str, ...], env: dict[str, str]):
        seconds_left, _ = signal.getitimer(signal.ITIMER_REAL)
        sys.stdout.flush()  # else it would be written by both
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            script = command.index("-u") + 1
            self._become(list(command[script:]), env, seconds_left)
            leave(outcome(command[script]))

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    @staticmethod
    def _become(arguments: list[str], env: dict[str, str], seconds_left: float) -> None:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun has handlers of its own
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds_left)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(env)
        sys.argv = arguments


def become(request: dict[str, Any]) -> None:
    """Turn this process into what a shell would start."""
    if hasattr(os, "setsid"):
        os.setsid()  # signals to the group reach the script and its loader processes, as Ctrl-C does, and no one else
        signal.alarm(request["timeout"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # forget the server's
    os.chdir(request["cwd"])
    sys.path[0] = str(ROOT)
    sys.argv = [str(ROOT / request["script"]), *request["args"]]
    for name, *arguments in request["faults"]:
        getattr(faults, name)(*arguments)


def outcome(script: str) -> int:
    """Run the script; the exit status that Python would give it."""
    try:
        if script == "torchrun":
            torchrun.main()
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End as Python does, but leave it to the system to clear memory: half a second less for each script."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    request = serve() if sys.argv[1] == "serve" else json.loads(sys.argv[1])
    become(request)
    leave(outcome(request["script"]))
