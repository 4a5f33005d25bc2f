"""What the README tells of the house, of what programs say and of what they write; the same of the guide to NaN."""

import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from documents import README, ROOT, SCRIPTS, SOURCES, blocks, code, section, spans

import utils
from ldm3d.latents import LatentStatistics
from ldm3d.samples import write_sample
from ldm3d.sampling import Sampler, VolumeId


def test_layout_lists_what_is_there() -> None:
    (tree,) = blocks(section(README.read_text(), "Layout of the house"))
    listed = {line.split()[0] for line in tree.text.splitlines()}
    assert [name for name in listed if not (ROOT / name).exists()] == []
    assert {*SCRIPTS, "utils.py", *(path.name for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.bat")])} <= listed


def test_readme_says_how_many_phantoms_the_demo_has() -> None:
    (count,) = re.findall(r"^NUM_PHANTOMS := (\d+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = README.read_text()
    assert f"({count} brains" in text
    assert f"-e config/environment_demo.json --phantom {count}\n" in text


def test_readme_keeps_the_place_for_the_demos_figures() -> None:
    assert len(re.findall(r"<!-- demo figures -->.*?<!-- /demo figures -->", README.read_text(), re.DOTALL)) == 1


def test_the_speed_table_is_what_was_measured() -> None:
    table = README.read_text().split("<!-- speed table -->\n")[1].split("<!-- /speed table -->")[0]
    assert table == (ROOT / "benchmarks" / "results" / "speed.md").read_text()


def refusals() -> list[tuple[str, str]]:
    """Commands of the troubleshooting section with the message shown below each."""
    shown = [block.text for block in blocks(section(README.read_text(), "Troubleshooting")) if block.language == "text"]
    return [(command[2:], message) for command, message in (text.strip().split("\n") for text in shown)]


@pytest.mark.parametrize(("command", "message"), refusals(), ids=lambda text: text[:60])
def test_shown_messages_are_what_the_scripts_say(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        utils.run_script(importlib.import_module(script.removesuffix(".py")).main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [message]


def test_at_least_five_messages_are_shown() -> None:
    assert len(refusals()) >= 5


def test_readme_says_what_a_sidecar_says(tmp_path: Path) -> None:
    cfg = tiny.config()
    statistics = LatentStatistics(torch.zeros(1, 1, 1, 1), 1.25)
    sampler = Sampler(tiny.autoencoder(cfg), tiny.unet(cfg), statistics, tiny.diffusion_card(cfg), tiny.CPU)
    write_sample(tmp_path / "x.nii.gz", sampler, VolumeId(0, 1), torch.zeros(1, 8, 8, 8), "ddim", 2)
    (path,) = tmp_path.glob("*.json")
    (sentence,) = re.findall(r"A sidecar says how its volume was made: (.*?)\.\s", README.read_text(), re.DOTALL)
    assert spans(sentence) == list(json.loads(path.read_text()))


# The guide to NaN.

NAN_GUIDE = ROOT / "docs" / "NaN_FIX_GUIDE.md"
FOUND = ("weights: ", "forward pass: ", "in the backward pass: ", "the step is finite here: ")


def said_lines(text: str) -> list[str]:
    """Lines of output in a document that a user goes by: errors, notices, findings of a replay."""
    lines = [line for block in blocks(text) if block.language == "text" for line in block.text.splitlines()]
    return [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "notice: ", *FOUND))]


@pytest.fixture(scope="module")
def message_patterns() -> list[re.Pattern[str]]:
    """Texts of the code, with anything where values go."""
    patterns = []
    for node in (node for path in SOURCES if path.suffix == ".py" for node in ast.walk(ast.parse(path.read_text()))):
        parts: list[Any] = node.values if isinstance(node, ast.JoinedStr) else []
        texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if len(re.findall("[a-z]", "".join(text or "" for text in texts))) >= 7:  # what says little fits all
            patterns.append(re.compile("".join(".*" if text is None else re.escape(text) for text in texts)))
    return patterns


def test_messages_in_the_nan_guide_are_those_of_the_code(message_patterns: list[re.Pattern[str]]) -> None:
    lines = said_lines(NAN_GUIDE.read_text())
    assert len(lines) >= 12
    assert [line for line in lines if not any(pattern.fullmatch(line) for pattern in message_patterns)] == []
    assert not any(pattern.fullmatch("training was stopped at step 7: no reason") for pattern in message_patterns)


def test_what_the_nan_guide_looks_up_is_said_by_the_code() -> None:
    """The first column of its table: words that stand in a message."""
    text = section(NAN_GUIDE.read_text(), "In one minute")
    cells = re.findall(r"^\| (?!What you see|---)([^|]*) \|", text, re.MULTILINE)
    assert len(cells) >= 9
    joined = re.sub(r'"\s+f?"', "", code())  # a text that goes over two lines
    assert [s for cell in cells for s in spans(cell) if not s.startswith("--") and s not in joined] == []
