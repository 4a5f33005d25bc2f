"""A worker's sign of life."""

import subprocess
import sys
from pathlib import Path

from service import ROOT, until

from mlops.api.presence import is_alive, workers

HANGS = """
import sys, threading
from pathlib import Path
from mlops.api import presence
presence.BEAT_SECONDS = 0.05
own = presence.Presence(Path(sys.argv[1]), "cpu", 0.3)
print(own.name, flush=True)
for line in sys.stdin:  # as long as there are any
    own.stir()
threading.Event().wait()
"""


def test_a_worker_that_hangs_is_ended_and_is_known_to_be_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as worker:  # type: ignore[call-overload]
        name = worker.stdout.readline().strip()
        beats: list[float] = []

        def has_beaten() -> bool:
            worker.stdin.write("on\n")
            worker.stdin.flush()
            beats.extend(status.said for status in workers(tmp_path))
            return len(set(beats)) > 12  # which take longer than it may hang

        until(has_beaten, "it goes on", 20)
        assert is_alive(tmp_path, name)
        worker.stdin.close()
        assert worker.wait(20) == 1
        assert "has hung for 0.3 s, and ends" in worker.stderr.read()
    assert not is_alive(tmp_path, name)
