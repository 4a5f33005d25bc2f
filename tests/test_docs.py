"""The documents say what is so: files, commands, options, config keys and error messages that they name are real."""

import ast
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
import torch
from documents import (
    DOCKER,
    FENCE,
    ROOMS,
    ROOT,
    SCRIPTS,
    SLURM,
    blocks,
    commands,
    first_column,
    options_of,
    problems_of_command,
    section,
    spans,
    targets,
)
from test_import_direction import upward_imports
from torch.distributed.run import get_args_parser

import utils
from ldm3d.latents import LatentStatistics
from ldm3d.samples import write_sample
from ldm3d.sampling import Sampler, VolumeId
from ldm3d.schema import Config, Environment

DOCUMENTS = [path for where in ("*.md", "docs/*.md", "mlops/**/*.md") for path in sorted(ROOT.glob(where))]
README, ARCHITECTURE, PICTURE = (ROOT / name for name in ("README.md", "docs/ARCHITECTURE.md", "docs/architecture.svg"))
SUFFIXES = {"py", "md", "json", "sh", "bat", "txt", "svg", "png", "nii", "gz", "pt", "safetensors", "csv", "example"}
KINDS = {".py", ".sh", ".ps1", ".yml", ".yaml", ""}
SOURCES = [
    ROOT / "Makefile",
    *ROOT.glob("*.sh"),
    *ROOT.glob("*.bat"),
    *ROOT.glob("*.py"),
    *ROOT.glob("ldm3d/*.py"),
    *(path for path in ROOT.glob("mlops/**/*") if path.is_file() and path.suffix in KINDS),
    *ROOT.glob("config/*.json"),
]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def code() -> str:
    """Everything that the project runs, as text."""
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the documents tell their reader to be."""
    monkeypatch.chdir(ROOT)


@each_document
def test_commands_are_understood_by_the_programs_themselves(document: Path) -> None:
    found = commands(document.read_text())
    assert [problem for words in found for problem in problems_of_command(words, document.parent)] == []


def test_readme_shows_every_script_and_both_launchers() -> None:
    shown = {Path(word).name for words in commands(README.read_text()) for word in words}
    assert {*SCRIPTS, "train_LDM.sh", "train_autoencoder_multigpu.bat", "torchrun"} <= shown


def test_readme_names_every_make_target_and_no_other() -> None:
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(map(shlex.join, commands(README.read_text())))))
    assert named == targets()


def scripts_of_target(target: str) -> list[list[str]]:
    """Calls of scripts in a recipe of the Makefile, as they are typed by hand."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+) :?= (.*)$", text, re.MULTILINE)) | {"PY": "python"}
    (recipe,) = re.findall(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.MULTILINE)
    lines = [line.strip().lstrip("@") for line in recipe.splitlines()]
    calls = [
        re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], line) for line in lines if line.startswith("$(PY)")
    ]
    assert calls
    return [shlex.split(call) for call in calls]


@pytest.mark.parametrize("target", ["demo", "sample"])
def test_readme_shows_by_hand_what_make_does(target: str) -> None:
    shown = commands(README.read_text())
    assert [call for call in scripts_of_target(target) if call not in shown] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_a_script_stands_in_its_section(script: str) -> None:
    named = set(spans(section(README.read_text(), f"`{script}`")))
    everywhere = {"--traceback", "--log-json"}  # said once, of all scripts
    assert options_of(script) - everywhere <= named
    assert everywhere <= set(spans(README.read_text()))


@each_document
def test_options_that_are_named_exist(document: Path) -> None:
    known = set().union(*map(options_of, SCRIPTS)) | set(re.findall(r"--?[a-z]+", (ROOT / "train_LDM.sh").read_text()))
    programs = [*ROOT.glob("mlops/**/*.py"), *ROOT.glob("ldm3d/*.py")]
    known |= {o for path in programs for o in re.findall(r'"(--?[a-z][a-z-]*)"', path.read_text())}
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    known |= {option for path in ROOT.glob("mlops/**/*.sh") for option in re.findall("--[a-z-]+", path.read_text())}
    known |= SLURM | DOCKER
    named = {span.split()[0] for span in spans(document.read_text()) if re.match("--?[a-z]", span)}
    assert named - known == set()


def test_option_tables_name_options_of_their_scripts_only() -> None:
    for heading in re.findall(r"^### (.*`\w+\.py`.*)$", README.read_text(), re.MULTILINE):
        known = set().union(*(options_of(script) for script in spans(heading)), {"--traceback", "--log-json"})
        named = {span for span in first_column(section(README.read_text(), heading)) if span.startswith("-")}
        assert named <= known, heading


# Config keys.


def exists(key: str, root: Any = Config) -> bool:
    """Whether the schema has a key such as `data.on_error`."""
    models = [root]
    for part in key.split("."):
        fields = [f for model in models for name, f in model.model_fields.items() if part in (f.alias, name)]
        if not fields:
            return False
        models = [m for f in fields for m in [f.annotation, *getattr(f.annotation, "__args__", ())] if is_section(m)]
    return True


def is_section(annotation: Any) -> bool:
    return hasattr(annotation, "model_fields")


def keys_of(content: Any, beginning: str = "") -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{beginning}{key}"
        yield from keys_of(value, f"{beginning}{key}.")


def problems_of_keys(text: str) -> list[str]:
    """Keys with a dot in spans, keys that are set, and keys of JSON blocks, which the schema does not have."""
    dotted = [span for span in spans(text) if re.fullmatch(r"\w+(\.\w+)+(=.*)?", span) and not is_path(span)]
    named = [span.split("=")[0] for span in dotted if span.split(".")[0] in Config.model_fields]
    named += [key for span in spans(text) for key in re.findall(r"--set '?([\w.]+)=", span)]
    for block in blocks(text):
        if block.language == "json":
            content = json.loads(block.text)
            named += [key for key in keys_of(content) if not exists(key, Environment)]
    return [key for key in named if not exists(key)]


@each_document
def test_config_keys_that_are_named_exist(document: Path) -> None:
    assert problems_of_keys(document.read_text()) == []


def test_tables_of_keys_hold_keys() -> None:
    environment = first_column(section(README.read_text(), "The environment"))
    assert set(environment) == set(Environment.model_fields)
    text = section(README.read_text(), "Configurations")
    keys = [span for span in first_column(text) if "/" not in span]
    assert keys
    assert [key for key in keys if not exists(key)] == []
    top_level = {field.alias or name for name, field in Config.model_fields.items()}
    assert top_level - set(spans(text)) == set()


def test_every_config_is_in_a_table() -> None:
    listed = {span for span in first_column(section(README.read_text(), "Configurations")) if "/" in span}
    assert {f"config/{path.name}" for path in (ROOT / "config").glob("*.json")} - {"config/schema.json"} == listed


# Files and names.


def problems_of_paths(text: str, folder: Path, code: str) -> list[str]:
    """Paths in spans that are neither in the tree nor named by the code that makes them."""
    paths = [span for span in spans(text) if re.fullmatch(r"[\w./<>*+-]+", span) and is_path(span)]
    # A table that says what is in a folder names its files without it.
    folders = [place / span for span in spans(text) if span.endswith("/") for place in (ROOT, folder)]
    return [path for path in paths if not (in_tree(path, folder, *folders) or made_by(path, code))]


def is_path(span: str) -> bool:
    return "/" in span or span.rpartition(".")[2] in SUFFIXES


def in_tree(path: str, *folders: Path) -> bool:
    path = path.removeprefix("app/")  # where the tree is in a bundle
    if path.startswith("/"):
        return False
    places = (ROOT, *folders, ROOT / "ldm3d", ROOT / "mlops" / "api", ROOT / "tests")
    return any((place / path).exists() or ("*" in path and any(place.glob(path))) for place in places)


def made_by(path: str, code: str) -> bool:
    """Whether the code writes or reads a file of this name, `<...>` standing for anything."""
    pieces = [piece for piece in re.split(r"<[^>]+>|\*", path.rstrip("/").removeprefix("./")) if len(piece) > 1]
    return all(piece in code for piece in pieces)


@each_document
def test_paths_that_are_named_exist_or_are_made(document: Path, code: str) -> None:
    assert problems_of_paths(document.read_text(), document.parent, code) == []


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text())
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not leads_somewhere(link, document)] == []


def leads_somewhere(link: str, document: Path) -> bool:
    if link.startswith("https://"):
        return True
    path, _, anchor = link.partition("#")
    target = (document.parent / path) if path else document
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


def anchors(text: str) -> set[str]:
    """The names that a Markdown page gives its headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_names_in_backquotes_are_words_of_the_code(document: Path, code: str) -> None:
    words = set(re.findall(r"\w+", code))
    words |= {f"{word}_total" for word in words}  # which Prometheus's client adds to a counter's name
    assert {
        span for span in spans(document.read_text()) if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", span)
    } - words == set()


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


# What programs say and write.


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


def test_what_the_nan_guide_looks_up_is_said_by_the_code(code: str) -> None:
    """The first column of its table: words that stand in a message."""
    text = section(NAN_GUIDE.read_text(), "In one minute")
    cells = re.findall(r"^\| (?!What you see|---)([^|]*) \|", text, re.MULTILINE)
    assert len(cells) >= 9
    joined = re.sub(r'"\s+f?"', "", code)  # a text that goes over two lines
    assert [s for cell in cells for s in spans(cell) if not s.startswith("--") and s not in joined] == []


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


# The architecture.


def listed_rooms() -> list[str]:
    """Rooms in the order of the tables."""
    text = section(ARCHITECTURE.read_text(), "The direction of imports")
    return [span.removesuffix(".py") for span in first_column(text) if span.endswith(".py")]


def test_architecture_lists_every_room_once() -> None:
    assert sorted(listed_rooms()) == sorted(ROOMS)


def test_architecture_lists_rooms_in_the_order_of_imports() -> None:
    assert upward_imports(ROOT / "ldm3d", listed_rooms()) == []


def picture_names() -> set[str]:
    """File and room names in the picture."""
    elements = ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
    return {word for element in elements if element.get("class") == "code" for word in (element.text or "").split()}


def test_picture_shows_every_room_and_script_and_no_other(code: str) -> None:
    names = picture_names()
    assert names >= ROOMS
    assert {*SCRIPTS, "utils.py"} <= names
    others = {name for name in names - ROOMS if not in_tree(name, ROOT)}
    assert {name for name in others if not (is_path(name) and made_by(name, code))} == set()


def test_the_speed_table_is_what_was_measured() -> None:
    table = README.read_text().split("<!-- speed table -->\n")[1].split("<!-- /speed table -->")[0]
    assert table == (ROOT / "benchmarks" / "results" / "speed.md").read_text()


# The checks can fail.

BAD_PAGE = """
```bash
python inference.py -c config/config_demo.json -e config/environment.json --nonsense
python no_such_script.py
torchrun --nproc_per_node=2 inference.py -c config/config_demo.json -e config/environment.json --num 2
make no-such-target
./train_LDM.sh --cores 4
train_autoencoder_multigpu.bat 4 config/none.json true false
python train_diffusion.py -c config/config_demo.json -e config/environment.json --set data.nothing=1
python train_diffusion.py -c config/config_demo.json -e config/environment.json --res
python -m mlops.backup create --form service_data
LDM3D_PORT=1 python -m mlops.none
python mlops/docker/none.py
mlops/docker/setup_docker.sh --cores 4
mlops/docker/none.sh
mlops/azure/deploy_azure.ps1 -Envronment dev -WhatIf
docker run image --entrypoint python -m mlops.batch --cores 4
kubectl apply -k mlops/kubernetes-overlays/none
sudo sh -c 'cd /
  promtool check rules mlops/none.yml'
no-such-program --help
```
```json
{"data": {"nothing": 1}}
```
`data.none` `no/such/file.py` `nosuch.safetensors` `results/nowhere/synimg_<seed>.nii.gz`
"""


@pytest.mark.parametrize("words", commands(BAD_PAGE), ids=" ".join)
def test_bad_commands_are_seen(words: list[str]) -> None:
    assert len(problems_of_command(words)) == 1


def test_bad_keys_and_paths_are_seen(code: str) -> None:
    assert problems_of_keys(BAD_PAGE) == ["data.none", "data.nothing"]
    wrong = ["no/such/file.py", "nosuch.safetensors", "results/nowhere/synimg_<seed>.nii.gz"]
    assert problems_of_paths(BAD_PAGE, ROOT, code) == wrong


@pytest.mark.parametrize("link", ["none.md", "#no-such-heading", "LICENSE#nothing"])
def test_bad_links_are_seen(link: str) -> None:
    assert not leads_somewhere(link, README)
