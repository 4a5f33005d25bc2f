"""The documents say what is so: files, commands, options, config keys and routes that they name are real."""

import re
import shlex
from pathlib import Path

import pytest
from document_commands import (
    DOCKER,
    SLURM,
    TENSORBOARD,
    commands,
    options_of,
    options_of_module,
    problems_of_command,
    programs,
    targets,
)
from document_names import exists, leads_somewhere, problems_of_keys, problems_of_paths, problems_of_routes
from documents import FENCE, README, ROOT, SCRIPTS, each_document, first_column, read, section, spans, words_of_code
from torch.distributed.run import get_args_parser

from ldm3d.schema import Config, Environment


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the documents tell their reader to be."""
    monkeypatch.chdir(ROOT)


@each_document
def test_commands_are_understood_by_the_programs_themselves(document: Path) -> None:
    found = commands(read(document))
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


# Options.


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_a_script_stands_in_its_section(script: str) -> None:
    named = set(spans(section(README.read_text(), f"`{script}`")))
    everywhere = {"--traceback", "--log-json"}  # said once, of all scripts
    assert options_of(script) - everywhere <= named
    assert everywhere <= set(spans(README.read_text()))


@each_document
def test_options_that_are_named_exist(document: Path) -> None:
    known = set().union(*map(options_of, SCRIPTS)) | set(re.findall(r"--?[a-z]+", (ROOT / "train_LDM.sh").read_text()))
    known |= {option for module in programs() for option in options_of_module(module)}
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    known |= {option for path in ROOT.glob("mlops/**/*.sh") for option in re.findall("--[a-z-]+", path.read_text())}
    known |= SLURM | DOCKER | TENSORBOARD
    named = {span.split()[0] for span in spans(read(document)) if re.match("--?[a-z]", span)}
    assert named - known == set()


def test_option_tables_name_options_of_their_scripts_only() -> None:
    for heading in re.findall(r"^### (.*`\w+\.py`.*)$", README.read_text(), re.MULTILINE):
        known = set().union(*(options_of(script) for script in spans(heading)), {"--traceback", "--log-json"})
        named = {span for span in first_column(section(README.read_text(), heading)) if span.startswith("-")}
        assert named <= known, heading


# Config keys.


@each_document
def test_config_keys_that_are_named_exist(document: Path) -> None:
    assert problems_of_keys(read(document)) == []


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


@each_document
def test_paths_that_are_named_exist_or_are_made(document: Path) -> None:
    assert problems_of_paths(read(document), document.parent) == []


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", read(document))
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not leads_somewhere(link, document)] == []


@each_document
def test_names_in_backquotes_are_words_of_the_code(document: Path) -> None:
    words = words_of_code() | {f"{word}_total" for word in words_of_code()}  # counters have it
    assert {span for span in spans(read(document)) if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", span)} - words == set()


@each_document
def test_routes_that_are_named_exist(document: Path) -> None:
    assert problems_of_routes(read(document)) == []


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


def test_bad_keys_and_paths_are_seen() -> None:
    assert problems_of_keys(BAD_PAGE) == ["data.none", "data.nothing"]
    wrong = ["no/such/file.py", "nosuch.safetensors", "results/nowhere/synimg_<seed>.nii.gz"]
    assert problems_of_paths(BAD_PAGE, ROOT) == wrong


@pytest.mark.parametrize("link", ["none.md", "#no-such-heading", "LICENSE#nothing"])
def test_bad_links_are_seen(link: str) -> None:
    assert not leads_somewhere(link, README)


def test_bad_routes_are_seen() -> None:
    text = (
        "`GET /v1/job/{id}` or `curl http://127.0.0.1:8000/v1/samples/x`, and /metrics, /v1/jobs/$JOB/events, /ready/"
    )
    assert problems_of_routes(text) == ["/v1/job/{id}", "/v1/samples/x"]
