"""What the documents are made of, and what is wrong with the commands that they show."""

import argparse
import importlib
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch.distributed.run import get_args_parser

import utils
from ldm3d.config import load_config, load_environment
from ldm3d.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path.name for path in sorted(ROOT.glob("*.py")) if path.stem != "utils"]
ROOMS = {path.stem for path in (ROOT / "ldm3d").glob("*.py")} - {"__init__"}

# What a document is made of.


class Block(NamedTuple):
    language: str
    text: str


FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[Block]:
    return [
        Block(language, re.sub(f"^{indent}", "", body, flags=re.M)) for indent, language, body in FENCE.findall(text)
    ]


def spans(text: str) -> list[str]:
    """What stands in single backquotes."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def section(text: str, heading: str) -> str:
    """From the heading that contains `heading` to the next one of its level or above."""
    found = re.search(rf"^(#+) [^\n]*{re.escape(heading)}[^\n]*$", text, re.MULTILINE)
    assert found, f"no heading has {heading}"
    rest = text[found.end() :]
    following = re.search(
        rf"^#{{1,{len(found[1])}}} ", FENCE.sub(lambda fence: " " * len(fence[0]), rest), re.MULTILINE
    )
    return found[0] + (rest[: following.start()] if following else rest)


def first_column(text: str) -> list[str]:
    """Spans of the first cell of each row of the tables, headings left out."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [span for row in rows for span in spans(row)]


START_OF_COMMAND = re.compile(r"(python3?|torchrun|make|(\./|mlops/)[\w/]+\.(sh|ps1)) ")


def commands(text: str) -> list[list[str]]:
    """Command lines as words: those of shell blocks, and spans that are one."""
    shell = [block.text for block in blocks(text) if block.language in ("bash", "bat", "powershell")]
    lines = [line for body in shell for line in whole_lines(body)]
    lines += [span for span in spans(text) if START_OF_COMMAND.match(span)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def whole_lines(body: str) -> list[str]:
    """Lines of a shell block; one that goes on, behind a backslash or in quotes, is one."""
    lines = [""]
    for line in body.replace("\\\n", " ").splitlines():
        lines[-1] += line
        try:
            shlex.split(lines[-1], comments=True)
        except ValueError:
            lines[-1] += "\n"
        else:
            lines.append("")
    return lines


ENVIRONMENTS = {".venv-azure/run", ".venv-mlflow/run"}
"""Targets of the Makefile that are files; they are shown where they can be had by themselves."""


def targets() -> set[str]:
    found = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found == set(phony.split())
    assert all(name in (ROOT / "Makefile").read_text() for name in ENVIRONMENTS)
    return found


# The scripts' own parsers.


class Parsed(Exception):
    """Ends a script where its arguments have been parsed."""


def parse(script: str, arguments: list[str]) -> tuple[utils.Parser, argparse.Namespace]:
    """What a script's own code makes of its arguments. Raises `SystemExit` where it refuses them."""
    module = importlib.import_module(script.removesuffix(".py"))
    results = []

    def recorded(parser: utils.Parser, *given: Any) -> argparse.Namespace:
        args = argparse.ArgumentParser.parse_args(parser, *given)
        results.append((parser, args))
        return args

    with (
        mock.patch.object(utils.Parser, "parse_args", recorded),
        mock.patch.object(utils, "read_settings", side_effect=Parsed),
        mock.patch("sys.argv", [script, *arguments]),
        suppress(Parsed),
    ):
        getattr(module, "parse", module.main)()
    return results[-1]


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def options_of(script: str) -> set[str]:
    required = {
        "evaluate.py": ["-c", "x", "--synthetic", "x"],
        "visualize_image.py": ["x"],
        "download_brats_data.py": [],
    }.get(script, ["-c", "x", "-e", "x"])
    return options(parse(script, required)[0]) - {"-h", "--help"}


def problems_of_script(script: str, arguments: list[str]) -> list[str]:
    """What is wrong with a call of a script."""
    if script not in SCRIPTS:
        return [f"there is no {script}"]
    try:
        parser, args = parse(script, arguments)
    except SystemExit:
        return [f"{script} refuses {arguments}"]
    names = {word.split("=")[0] for word in arguments if re.match("--?[a-z]", word)}
    problems = [f"{script}: {name} is only short for an option" for name in names - options(parser)]
    try:
        if "config_file" in args:
            load_config(args.config_file, args.set)
        if "environment_file" in args:
            load_environment(args.environment_file)
    except UserError as error:
        problems.append(f"{script}: {error}")
    return problems


def problems_of_launcher(script: str, arguments: list[str]) -> list[str]:
    """What is wrong with a call of train_LDM.sh, which hands what is behind `--` to both stages."""
    text = (ROOT / script).read_text()
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, handed = arguments[:split], arguments[split + 1 :]
    problems = [
        f"{script} has no {word}" for word in own if word.startswith("-") and not re.search(rf"{word}[ )]", text)
    ]
    values = dict(zip(own[::2], own[1::2], strict=True))
    files = ["-c", values.get("--config", "config/config_train_multigpu.json")]
    files += ["-e", values.get("--env", "config/environment.json")]
    return problems + problems_of_script("train_autoencoder.py", [*files, *handed])


def problems_of_module(module: str, arguments: list[str]) -> list[str]:
    """What is wrong with a call of a command of `mlops`."""
    path = ROOT / module.replace(".", "/")
    files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
    if not files:
        return [f"there is no {module}"]
    known = {"--help", *re.findall(r'"(--?[a-z][a-z-]*)"', files[0].read_text())}
    return [f"{module} has no {word}" for word in arguments if re.match("--?[a-z]", word) and word not in known]


def problems_of_shell_script(path: str, folder: Path, arguments: list[str]) -> list[str]:
    """What is wrong with a call of a shell script of `mlops`, named from the root or from the page's folder."""
    script = next((place / path for place in (ROOT, folder) if (place / path).is_file()), None)
    if script is None:
        return [f"there is no {path}"]
    text = script.read_text()
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if path.endswith(".ps1"):
        names = {word.lstrip("-").split(":")[0] for word in own if word.startswith("-")}
        common = {"WhatIf", "Confirm"} if "SupportsShouldProcess" in text else set()
        known = common | set(re.findall(r"\]\s*\$(\w+)", text))
    else:
        names = {word for word in own if word.startswith("-")}
        known = set(re.findall(r"--[a-z-]+", text))
    return [f"{path} has no {name}" for name in sorted(names - known)]


def problems_inside(words: list[str]) -> list[str]:
    """What is wrong with the part of another program's command that is ours: a module, a script, files of the tree."""
    problems = []
    for place, word in enumerate(words):
        if word == "-m" and words[place + 1].startswith("mlops"):
            problems += problems_of_module(words[place + 1], words[place + 2 :])
        elif word in SCRIPTS:
            problems += problems_of_script(word, words[place + 1 :])
        elif re.match(r"@?(mlops|config|docs)/", word) and not (ROOT / word.lstrip("@")).exists():
            problems.append(f"there is no {word}")
        elif re.search(r"\s", word):  # a command in quotes
            problems += [p for line in whole_lines(word) if line for p in problems_inside(shlex.split(line))]
    return problems


# Of sbatch and docker, which are not here to be asked.
SLURM = {"--requeue", "--signal"}
DOCKER = {"-f", "--build-arg", "--format", "--no-healthcheck"}
OTHERS = {"amtool", "az", "cd", "curl", "docker", "export", "kind", "kubectl", "minikube", "mlflow", "pip"}
OTHERS |= {"promtool", "ruff", "source", "sudo", "tar", "tensorboard"}
"""Programs whose own options nobody checks here; what the documents ask of the service, test_api_docs.py runs."""


def problems_of_command(words: list[str], folder: Path = ROOT) -> list[str]:
    """What is wrong with a command that a document in `folder` shows."""
    while words and re.match(r"\w+=(?!\$\()", words[0]):
        words = words[1:]
    if not words or "=$(" in words[0]:
        return []
    program, *rest = words
    name = Path(program).name
    if name in ("python", "python3") and rest[0].endswith(".py"):
        if "/" in rest[0]:
            copies = [*ROOT.glob(rest[0]), *ROOT.glob(f"mlops/*/{Path(rest[0]).name}")]
            return [] if copies else [f"there is no {rest[0]}"]
        return problems_of_script(rest[0], rest[1:])
    if name in ("python", "python3") and rest[:1] == ["-m"] and rest[1].startswith("mlops"):
        return problems_of_module(rest[1], rest[2:])
    if name in ("python", "python3"):
        own = rest[:1] == ["-m"] and rest[1].startswith("ldm3d")
        return [f"no module {rest[1]}"] if own and rest[1].removeprefix("ldm3d.") not in ROOMS else []
    if name == "torchrun":
        try:
            args = get_args_parser().parse_args(rest)
        except SystemExit:
            return [f"torchrun refuses {rest}"]
        return problems_of_script(args.training_script, args.training_script_args)
    if name == "make":
        return [f"Makefile has no {word}" for word in rest if "=" not in word and word not in targets() | ENVIRONMENTS]
    if name.endswith(".bat"):
        _, config, amp, compiled = rest
        fine = (ROOT / name).is_file() and (ROOT / config).is_file() and {amp, compiled} <= {"true", "false"}
        return [] if fine else [f"{name} refuses {rest}"]
    if name == "train_LDM.sh":
        return problems_of_launcher(name, rest)
    if name.endswith((".sh", ".ps1")):
        return problems_of_shell_script(program, folder, rest)
    if name == "srun":
        return problems_of_command(rest)
    return problems_inside(rest) if name in OTHERS else [f"nobody checks {name}"]
