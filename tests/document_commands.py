"""What is wrong with the commands that the documents show, asked of the programs' own parsers."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from documents import ROOT, SCRIPTS, blocks, spans
from torch.distributed.run import get_args_parser

import utils
from ldm3d.config import load_config, load_environment
from ldm3d.errors import UserError

SHELLS = ("bash", "sh", "bat", "powershell")
START_OF_COMMAND = re.compile(r"((\.venv/bin/)?python3?|torchrun|make|(\./|mlops/)[\w/]+\.(sh|ps1)) ")


def commands(text: str) -> list[list[str]]:
    """Commands as words: those of shell blocks, of a notebook's cells, and spans that are one."""
    shell = [block.text for block in blocks(text) if block.language in SHELLS]
    shell += ["\n".join(re.findall("^[!%](.*)", cell.text, re.M)) for cell in blocks(text) if cell.language == "python"]
    lines = [line for body in shell for line in whole_lines(body)]
    # A program that is only named, without arguments, may need some.
    lines += [re.sub(r"(?<= -m )\S+$", r"\g<0> --help", span) for span in spans(text) if START_OF_COMMAND.match(span)]
    return [words for line in lines for words in single_commands(shlex.split(line, comments=True))]


def single_commands(words: list[str]) -> list[list[str]]:
    """The commands of a line that joins several, without what becomes of their output."""
    found: list[list[str]] = [[]]
    for before, word in zip(["", *words], words, strict=False):
        if word in ("|", "&&", "||", "&"):
            found.append([])
        elif not (word.startswith((">", "<", "2>")) or before in (">", ">>", "<", "2>")):
            found[-1].append(word)
    return [command for command in found if command]


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


class Parsed(BaseException):
    """Ends a program where its arguments are parsed."""


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


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in actions(parser) for option in action.option_strings}


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
    problems = problems_of_short_options(script, parser, arguments)
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


PACKAGES = ("mlops", "benchmarks", "figs", "docs", "ldm3d")


def source_of(module: str) -> Path | None:
    """The file behind `python -m module`; None where there is none."""
    path = ROOT / module.replace(".", "/")
    main, plain = path / "__main__.py", path.with_suffix(".py")
    if main.is_file():
        return main
    return plain if plain.is_file() and '__name__ == "__main__"' in plain.read_text() else None


@cache
def parser_of(module: str) -> argparse.ArgumentParser | None:
    """The parser that `python -m module` would use; None where it takes no arguments.

    It is had by starting the command's own code up to the place where arguments are parsed.
    """
    path = source_of(module)
    if path is None or "parse_args()" not in path.read_text():
        return None
    loaded = importlib.import_module(f"{module}.__main__" if path.name == "__main__.py" else module)
    found: list[argparse.ArgumentParser] = []

    def recorded(parser: argparse.ArgumentParser) -> argparse.Namespace:
        found.append(parser)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", recorded), suppress(Parsed):
        getattr(loaded, "parse", loaded.main)()
    return found[0]


@cache
def programs() -> list[str]:
    """All of our modules that can be started as `python -m` and take arguments."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in files]
    return [name for name in names if parser_of(name)]


def options_of_module(module: str) -> set[str]:
    """Options for users: those that a program gives to itself have no help."""
    parser = parser_of(module)
    shown = [action for action in actions(parser) if action.help != argparse.SUPPRESS] if parser else []
    return {option for action in shown for option in action.option_strings} - {"-h", "--help"}


def problems_of_module(module: str, arguments: list[str]) -> list[str]:
    """What is wrong with a call of a command of one of our packages."""
    path = source_of(module)
    if path is None:
        return [f"there is no {module}"]
    parser = parser_of(module)
    if parser is None:
        return [f"{module} takes no {arguments}"] if arguments not in ([], ["--help"]) else []
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            parser.parse_args(arguments)
    except SystemExit as stop:
        return [f"{module} refuses {arguments}"] if stop.code else []
    return problems_of_short_options(module, parser, arguments)


def problems_of_short_options(program: str, parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """argparse takes the beginning of an option for it; readers should not."""
    names = {word.split("=")[0] for word in arguments if re.match("--?[a-z]", word)}
    return [f"{program}: {name} is only short for an option" for name in sorted(names - options(parser))]


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
        if word == "-m" and words[place + 1].partition(".")[0] in PACKAGES:
            problems += problems_of_module(words[place + 1], words[place + 2 :])
        elif word in SCRIPTS:
            problems += problems_of_script(word, words[place + 1 :])
        elif re.match(r"@?(mlops|config|docs)/", word) and not (ROOT / word.lstrip("@")).exists():
            problems.append(f"there is no {word}")
        elif re.search(r"\s", word):  # a command in quotes
            problems += [p for line in whole_lines(word) if line for p in problems_inside(shlex.split(line))]
    return problems


TENSORBOARD = {"--logdir"}
# Of sbatch and docker, which are not here to be asked.
SLURM = {"--requeue", "--signal"}
DOCKER = {"-f", "--build-arg", "--format", "--no-healthcheck"}
OTHERS = {"amtool", "az", "cd", "curl", "cut", "docker", "export", "head", "jq", "kind", "kubectl", "minikube"}
OTHERS |= {"mlflow", "pip", "promtool", "ruff", "source", "sudo", "tar", "tensorboard"}
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
            modules = [".".join(copy.relative_to(ROOT).with_suffix("").parts) for copy in copies[:1]]
            return problems_of_module(modules[0], rest[1:]) if modules else [f"there is no {rest[0]}"]
        return problems_of_script(rest[0], rest[1:])
    if name in ("python", "python3"):
        own = rest[:1] == ["-m"] and rest[1].partition(".")[0] in PACKAGES
        return problems_of_module(rest[1], rest[2:]) if own else []
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
