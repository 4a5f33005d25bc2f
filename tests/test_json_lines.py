"""ldm3d.json_lines and console: with `--log-json` everything that a script says on stderr is a JSON object."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT, STEPS_PER_EPOCH, Desk, Result
from test_scripts import STAGE_1, STAGE_2, both_stages, give_autoencoder

from ldm3d import distributed
from ldm3d.console import log, progress
from ldm3d.json_lines import JsonLines

Run = Callable[..., Result]


def objects(text: str) -> list[dict[str, Any]]:
    """Each line as what it stands for; a number too large for JSON, NaN and infinity are no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What comes through from here on; pytest gives each phase of a test another stderr, so it is no fixture."""
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", JsonLines(plain))
    return plain


def only(stream: io.StringIO) -> dict[str, Any]:
    (found,) = objects(stream.getvalue())
    return found


def test_a_log_line_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    said = stream(monkeypatch)
    log("two\nlines of “text”", event="told", number=3, path=Path("a/b"))
    found = only(said)
    assert datetime.fromisoformat(found.pop("time")).utcoffset() is not None
    assert found == {"level": "info", "event": "told", "message": "two\nlines of “text”", "number": 3, "path": "a/b"}


@pytest.mark.parametrize(
    ("text", "level", "event", "message"),
    [
        ("warning: left out: x", "warning", "log", "left out: x"),
        ("notice: no perceptual loss", "warning", "log", "no perceptual loss"),
        ("error: data: no such folder", "error", "error", "data: no such folder"),
        ("interrupted; go on with --resume", "info", "interrupted", "interrupted; go on with --resume"),
        ("epoch 1: fine", "info", "log", "epoch 1: fine"),
    ],
)
def test_the_first_word_gives_the_level(
    text: str, level: str, event: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = stream(monkeypatch)
    print(text, file=sys.stderr)
    found = only(said)
    assert (found["level"], found["event"], found["message"]) == (level, event, message)


def test_what_json_cannot_say_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    said = stream(monkeypatch)
    log("x", best=float("inf"), terms={"kl": float("nan"), "l1": [1.0, -float("inf")]})
    found = only(said)
    assert (found["best"], found["terms"]) == (None, {"kl": None, "l1": [1.0, None]})


def test_a_line_that_comes_in_pieces_is_one_object_and_an_empty_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said = stream(monkeypatch)
    for piece in ("half ", "a line", "\n", "\n", "  \n"):
        sys.stderr.write(piece)
    assert only(said)["message"] == "half a line"


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = stream(monkeypatch)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    log("nothing", event="told")
    assert said.getvalue() == ""


def test_progress_is_objects_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said = stream(monkeypatch)
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    assert [*progress(range(5), "counting")] == [0, 1, 2, 3, 4]
    found = objects(said.getvalue())
    assert [(line["event"], line["done"], line["total"]) for line in found] == [("progress", 1, 5), ("progress", 3, 5)]
    assert found[0]["seconds_left"] == 80.0 and found[0]["message"] == "counting: 1/5, 80 s left"


ANYTHING = """
import logging, os, sys, threading, traceback, warnings
logging.getLogger("early").addHandler(logging.StreamHandler())
from ldm3d.json_lines import use_json_lines
use_json_lines()
warnings.warn("old", FutureWarning)
logging.getLogger("early").error("bound before")
logging.getLogger("late").error("bound never")
print("printed", file=sys.stderr)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
if not os.fork():
    sys.stderr.write("of a child\\n")
    os._exit(0)
os.wait()
raise KeyError("what")
"""


def test_whoever_writes_in_python_writes_objects() -> None:
    done = subprocess.run([sys.executable, "-c", ANYTHING], cwd=ROOT, capture_output=True, text=True, check=False)
    found = objects(done.stderr)
    said = [(line["level"], line["message"]) for line in found]
    assert {("warning", "old"), ("error", "bound before"), ("error", "bound never"), ("info", "printed")} <= {*said}
    assert ("info", "of a child") in said and any("ZeroDivisionError" in message for _, message in said)
    assert found[0]["category"] == "FutureWarning" and found[0]["place"] == "<string>:6"
    last = found[-1]
    assert (last["event"], last["level"], last["message"]) == ("error", "error", "KeyError: 'what'")
    assert last["traceback"].startswith("Traceback") and done.returncode == 1


# ---------------------------------------------------------------- scripts


def events(done: Result) -> list[str]:
    return [line["event"] for line in objects(done.stderr)]


@both_stages
def test_a_training_says_objects_only(script: str, trained: Desk, desk: Desk, run: Run) -> None:
    give_autoencoder(desk, trained, script)
    interrupted = run(script, "--log-json", "--profile", 1, faults=[("signal_at_step", "SIGINT", STEPS_PER_EPOCH + 1)])
    assert interrupted.code == 130 and events(interrupted)[-1] == "interrupted"
    assert events(interrupted).count("epoch") == 1 and events(interrupted).count("profile") == 1
    resumed = run(script, "--resume", "--log-json", "--set", "data.num_workers=1")
    assert resumed.code == 0, resumed.stderr
    epochs = [line for line in objects(resumed.stderr) if line["event"] == "epoch"]
    assert [(line["epoch"], line["step"], line["volumes_seen"]) for line in epochs] == [
        (epoch, epoch * STEPS_PER_EPOCH, epoch * STEPS_PER_EPOCH * 2) for epoch in (2, 3, 4)
    ]
    for line in epochs:
        assert line["loss"] > 0 and line["validation"] and line["volumes_per_second"] > 0 and line["peak_gib"] > 0
    assert ("terms" in epochs[0]) and (sum(epochs[0]["terms"].values()) == pytest.approx(epochs[0]["loss"])) == (
        script == STAGE_1
    )


MISTAKES = {
    "an argument": (["--nonsense"], "unrecognized arguments: --nonsense"),
    "a key": (["--set", "data.nothing=1"], "data.nothing"),
    "a resume from nothing": (["--resume"], "there is no checkpoint to resume from"),
    "no steps to profile": (["--profile", 0], "--profile 0: the number of steps must be 1 or more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_object(mistake: str, desk: Desk, run: Run) -> None:
    arguments, message = MISTAKES[mistake]
    done = run(STAGE_1, "--log-json", *arguments)
    (found,) = objects(done.stderr)
    assert done.code == 2 and (found["event"], found["level"]) == ("error", "error")
    assert message in found["message"]


def test_warnings_of_a_run_are_objects(desk: Desk, run: Run, trained: Desk) -> None:
    """A weight that looks like the tutorial's makes a warning; a loss that is not finite ends the run."""
    done = run(STAGE_1, "--log-json", "--set", "autoencoder_train.kl_weight=1e-7", "--set", "autoencoder_train.lr=1e18")
    found = objects(done.stderr)
    assert [line["level"] for line in found if "kl_weight" in line["message"]] == ["warning"]
    assert done.code == 2 and found[-1]["event"] == "error" and "not finite" in found[-1]["message"]


def test_other_scripts_say_objects_too(desk: Desk, model: Path, run: Run) -> None:
    done = run("inference.py", "--log-json", "--steps", 2)
    assert done.code == 0 and objects(done.stderr) == []
    done = run(STAGE_2, "--log-json", "--dry-run")
    assert done.code == 0 and "dry run: one step" in objects(done.stderr)[-1]["message"]
