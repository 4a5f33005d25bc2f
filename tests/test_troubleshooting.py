"""docs/TROUBLESHOOTING.md shows what the programs really say; and what says it where nothing else provokes it."""

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from documents import ROOT, anchors, blocks, first_column, section
from test_docs_readme import message_patterns  # noqa: F401 (a fixture)
from torch._utils import ExceptionWrapper

import train_autoencoder
import utils
from ldm3d.errors import MEMORY_GUIDE, ConfigError, shortage
from ldm3d.nifti import write_volume
from mlops.api import metrics
from mlops.batch.__main__ import run as run_batch
from mlops.commands import run_command
from mlops.monitoring import data_drift

PAGE = ROOT / "docs" / "TROUBLESHOOTING.md"
TEXT = PAGE.read_text()
CODE = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("ldm3d/*.py"), *ROOT.glob("mlops/**/*.py")]
CODE += [*ROOT.glob("mlops/**/*.sh"), *ROOT.glob("mlops/api/static/*.js")]
SHOWN = [block.text.strip().splitlines() for block in blocks(TEXT) if block.language == "text"]
PROVOKED = [(lines[0][2:], lines[1:]) for lines in SHOWN if lines[0].startswith("$ ")]
SAID = [line for lines in SHOWN if not lines[0].startswith("$ ") for line in lines]
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.89 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 14.00 GiB memory in use. Of the allocated memory ..."
)
"""As torch 2.13 words it, of which there was no GPU to hear it from."""


def end_of(main: Callable[[], None], capsys: Any) -> tuple[Any, list[str]]:
    """Exit status of a script, and the lines that it said on stderr."""
    with pytest.raises(SystemExit) as stopped:
        utils.run_script(main)
    return stopped.value.code, capsys.readouterr().err.splitlines()


def raises(error: Exception) -> None:
    raise error


# What the page shows.


@pytest.mark.parametrize(("command", "said"), PROVOKED, ids=[command[7:90] for command, _ in PROVOKED])
def test_a_shown_command_says_what_is_shown(
    command: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "demo").symlink_to(ROOT / "checkpoints" / "demo")
    monkeypatch.chdir(tmp_path)
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, lines = end_of(importlib.import_module(script.removesuffix(".py")).main, capsys)
    assert code == 2
    assert lines[: len(said)] == said


@pytest.fixture(scope="module")
def code() -> str:
    """What the programs are made of; a text that goes over two lines is one."""
    return re.sub(r'"\s+f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in CODE))


def test_shown_lines_are_those_of_the_code(message_patterns: list[re.Pattern[str]], code: str) -> None:  # noqa: F811
    said = [line for line in SAID if not line.startswith("{")]
    assert len(said) >= 20
    whole = [pattern.fullmatch for pattern in message_patterns]
    rest = [line for line in said if not any(fits(line) or fits(line.removeprefix("error: ")) for fits in whole)]
    rest = [line for line in rest if line.removeprefix("error: ") not in code]
    # Of two the code puts beginning and end together: how much memory is needed, and the download's digest.
    begun = [line for line in rest if any(pattern.match(line) for pattern in message_patterns)]
    ended = [line for line in rest if line.partition("; ")[2] in code]
    assert set(begun) | set(ended) == set(rest) and len(rest) <= 2


def cells(heading: str) -> list[str]:
    """What stands in backquotes in the first column of a table."""
    return first_column(section(TEXT, heading))


def test_what_is_looked_up_by_its_words_is_said_by_the_code(code: str) -> None:
    words = cells("By message")
    assert len(words) >= 35
    assert [text for text in words if text not in code] == []
    assert words == sorted(words, key=str.casefold)


def test_details_of_the_service_are_those_of_the_code(message_patterns: list[re.Pattern[str]], code: str) -> None:  # noqa: F811
    details = re.findall(r"^\| \d{3} \| `([^`]+)` \|", TEXT, re.MULTILINE)
    assert len(details) >= 10
    known = [text for text in details if any(pattern.fullmatch(text) for pattern in message_patterns)]
    # One is Starlette's own, one ends with the command that makes a key.
    rest = {text.split("; make one:")[0] for text in details if text not in known} - {"Not Found"}
    assert [text for text in rest if text not in code] == []


def test_every_section_is_led_to() -> None:
    headings = anchors(TEXT) - {"when-something-goes-wrong", "by-symptom", "by-message"}
    led_to = set(re.findall(r"\(#([\w-]+)\)", section(TEXT, "By symptom") + section(TEXT, "Asking for help")))
    assert headings - led_to - {"asking-for-help"} == set()
    assert MEMORY_GUIDE.removeprefix(f"docs/{PAGE.name}#") in headings


# What the page relies on.


def test_no_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def allocate() -> None:
        torch.empty(2**60)

    said = "error: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    code, (line,) = end_of(allocate, capsys)
    assert code == 2 and line.startswith(said) and line.endswith(f"; lower batch_size, or see {MEMORY_GUIDE}")
    assert end_of(lambda: np.empty(2**59), capsys)[1][0].startswith("error: out of memory: Unable to allocate")
    for loading in (allocate, lambda: np.empty(2**59)):
        (line,) = end_of(loaded(loading).reraise, capsys)[1]
        assert re.match("error: out of memory: (DefaultCPUAllocator: can't|Unable to) allocate", line)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = end_of(partial(raises, torch.OutOfMemoryError(CUDA)), capsys)[1]
    assert line.startswith("error: rank 1: out of memory: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    assert "Including" not in line


def loaded(work: Callable[[], object]) -> ExceptionWrapper:
    """The error of `work` as torch hands it on from a process that loads data."""
    try:
        work()
    except Exception:
        return ExceptionWrapper(where="in DataLoader worker process 0")
    raise AssertionError("nothing went wrong")


def test_no_memory_is_one_line_of_the_services_commands_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_drift, "run", lambda: np.empty(2**59))
    for start, advice in (
        (lambda: run_batch(lambda: torch.empty(2**60)), "lower --batch-size, or see"),
        (lambda: run_command(lambda: np.empty(2**59)), "see"),
        (lambda: run_command(data_drift.main), "see"),
    ):
        with pytest.raises(SystemExit) as stopped:
            start()
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith("error: out of memory: ")
        assert line.endswith(f"; {advice} {MEMORY_GUIDE}")
    for run in (run_batch, run_command):
        with pytest.raises(RuntimeError, match="shapes"):
            run(partial(raises, RuntimeError("shapes do not fit")))
    monkeypatch.setattr("sys.argv", ["batch", "--traceback"])
    with pytest.raises(torch.OutOfMemoryError):
        run_batch(partial(raises, torch.OutOfMemoryError(CUDA)))


def test_other_errors_are_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortage(RuntimeError("shapes do not fit")) is None
    with pytest.raises(RuntimeError, match="shapes"):
        utils.run_script(partial(raises, RuntimeError("shapes do not fit")))
    monkeypatch.setattr("sys.argv", ["script", "--traceback"])
    with pytest.raises(torch.OutOfMemoryError):
        utils.run_script(partial(raises, torch.OutOfMemoryError(CUDA)))


def test_rank_0_is_waited_for_where_all_have_met_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """torchrun ends rank 0 as soon as another process ends: nobody would say what is wrong. Who is left was alone."""
    waited: list[float] = []
    monkeypatch.setattr(utils.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected, said in (("0", [], ""), ("1", [utils.SECONDS_FOR_RANK_0], "rank 1: ")):
        monkeypatch.setenv("RANK", rank)
        code, lines = end_of(partial(raises, ConfigError("what is wrong")), capsys)
        assert code == 2 and waited == expected
        assert lines == [f"error: {said}what is wrong"]


def test_a_dry_run_goes_without_a_volume_to_validate_with() -> None:
    """As a process has none where there are more of them than held-out volumes."""
    stage = mock.Mock(train_step=lambda *_: {"l1": 0.5}, validate=lambda batches: ({"batches": len(list(batches))}, []))
    run = mock.Mock(cfg=tiny.config(), device=tiny.CPU)
    train_autoencoder.dry_run(stage, ([tiny.batch()], []), run)


def test_a_taken_port_for_figures_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: Any, **__: Any) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(metrics, "start_http_server", taken)
    monkeypatch.setattr(metrics, "OF_THE_WEB_PROCESS", ())
    with pytest.raises(
        ConfigError, match="LDM3D_WORKER_METRICS_PORT 9100: cannot listen there: Address already in use"
    ):
        metrics.serve(9100)


def test_one_usable_case_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    volume = np.random.default_rng(0).random((8, 8, 8), dtype=np.float32)
    write_volume(tmp_path / "data" / "a.nii.gz", volume, (6, 6, 6))
    environment = tmp_path / "environment.json"
    folders = {name: str(tmp_path / name) for name in ("model_dir", "tfevent_path", "output_dir")}
    environment.write_text(str({**folders, "data_base_dir": str(tmp_path / "data")}).replace("'", '"'))
    arguments = ["-c", str(ROOT / "config" / "config_demo.json"), "-e", str(environment), "--dry-run"]
    monkeypatch.setattr("sys.argv", ["train_autoencoder.py", *arguments])
    code, lines = end_of(importlib.import_module("train_autoencoder").main, capsys)
    assert code == 2 and lines[-1] in SAID
