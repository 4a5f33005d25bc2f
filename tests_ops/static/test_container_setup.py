"""setup_docker.ps1 and setup_docker.sh: the same options, the same calls of docker, the same errors."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_powershell
from programs import ROOT

SH = ROOT / "mlops/docker/setup_docker.sh"
PS1 = ROOT / "mlops/docker/setup_docker.ps1"
PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
REST = "Arguments"


def nodes(node: tree_sitter.Node, kind: str) -> list[tree_sitter.Node]:
    """All nodes of a kind below this one, in the file's order."""
    return ([node] if node.type == kind else []) + [found for child in node.children for found in nodes(child, kind)]


def syntax_errors(text: str) -> list[int]:
    """Lines, from 1, at which the grammar does not know how to go on."""
    root = PARSER.parse(text.encode()).root_node
    missing = [node for node in everything(root) if node.is_missing]
    return [node.start_point.row + 1 for node in nodes(root, "ERROR") + missing]


def everything(node: tree_sitter.Node) -> list[tree_sitter.Node]:
    return [node] + [found for child in node.children for found in everything(child)]


def content(node: tree_sitter.Node) -> str:
    return (node.text or b"").decode().strip("$'\"")


def ps1_options(text: str) -> dict[str, tuple[list[str], str]]:
    """Each parameter's allowed values and default, without the one that takes the rest."""
    found = {}
    block = nodes(PARSER.parse(text.encode()).root_node, "param_block")[0]
    for parameter in nodes(block, "script_parameter"):
        name = content(next(child for child in parameter.children if child.type == "variable"))
        sets = [node for node in nodes(parameter, "attribute") if b"ValidateSet" in (node.text or b"")]
        allowed = [content(node) for one in sets for node in nodes(one, "string_literal")]
        default = [
            content(node)
            for one in nodes(parameter, "script_parameter_default")
            for node in nodes(one, "string_literal")
        ]
        if name != REST:
            found[name.lower()] = (allowed, default[0])
    return found


def test_powershells_grammar_knows_the_script() -> None:
    assert syntax_errors(PS1.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("function Start-Api {", "function Start-Api "),
        ("foreach ($Try in 1..60) {", "foreach ($Try in 1..60 {"),
        ("'the first key; it is shown this once:'", "'the first key; it is shown this once:"),
        ("switch ($Mode) {", "switch $Mode) {"),
        ("    return\n        }\n", "    return\n"),
        ("[string] $Mode = 'api',", "[string] $Mode = 'api'"),
    ],
)
def test_a_syntax_error_is_found(old: str, new: str) -> None:
    text = PS1.read_text()
    assert old in text and syntax_errors(text.replace(old, new, 1))


def test_both_scripts_have_the_same_options(docker: "Docker") -> None:
    assert option_faults(docker, PS1.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[ValidateSet('dev', 'prod')]", "[ValidateSet('dev', 'production')]", "environment"),
        ("$Mode = 'api'", "$Mode = 'train'", "mode"),
        ("[string] $Variant", "[string] $Device", "variant"),
    ],
)
def test_a_difference_of_options_is_found(docker: "Docker", old: str, new: str, fault: str) -> None:
    text = PS1.read_text()
    assert old in text and any(fault in found for found in option_faults(docker, text.replace(old, new)))


def option_faults(docker: "Docker", ps1: str) -> list[str]:
    """Where the shell script, asked by running it, has other options, values or defaults."""
    options = ps1_options(ps1)
    named = docker.run("--nonsense", "x").stderr
    faults = [] if re.findall(r"--(\w+)", named)[1:] == [*options] else [f"options: {named}, not {[*options]}"]
    built = docker.build(docker.run())
    defaults = {"environment": built["--target"], "variant": built["VARIANT"], "mode": "api"}
    for name, (allowed, default) in options.items():
        said = docker.run(f"--{name}", "nonsense").stderr
        if f"must be one of {' '.join(allowed)}\n" not in said:
            faults.append(f"{name}: {allowed} in PowerShell; the shell: {said}")
        if defaults.get(name) != default:
            faults.append(f"{name}: default {default} in PowerShell, {defaults.get(name)} in the shell")
    return faults


class Docker:
    """A `docker` that writes down how it is called, and answers as it is told: `fails` is what a failing call has."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "calls"
        self.has_keys, self.fails = False, ""
        program = folder / "docker"
        program.write_text(
            "#!/bin/bash\n"
            f"{{ printf '%s\\x1f' \"$@\"; echo; }} >>{self.log}\n"
            'if [[ $* == ps* || ( $* == *"keys list" && -n $HAS_KEYS ) ]]; then echo there; fi\n'
            'if [[ -n $FAILS && $* == *"$FAILS"* ]]; then exit 7; fi\n'
        )
        program.chmod(0o755)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        self.log.unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAILS": self.fails,
            "HAS_KEYS": "yes" * self.has_keys,
        }
        return subprocess.run([SH, *words], env=environment, capture_output=True, text=True, timeout=60)

    @property
    def calls(self) -> list[list[str]]:
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [line.split("\x1f")[:-1] for line in lines]

    def build(self, done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
        """Options and build arguments of the build."""
        assert done.returncode == 0, done.stderr
        words = self.calls[0]
        assert words[0] == "build"
        pairs = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        return pairs | {word: words[at + 1] for at, word in enumerate(words) if word.startswith("--")}


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


@pytest.mark.parametrize(
    ("options", "target", "variant", "tag"),
    [
        ((), "prod", "cpu", "ldm3d:{}-cpu"),
        (("--environment", "dev", "--variant", "cuda"), "dev", "cuda", "ldm3d:{}-cuda-dev"),
    ],
)
def test_it_builds_what_is_asked_for(
    docker: Docker, options: tuple[str, ...], target: str, variant: str, tag: str
) -> None:
    version = re.search(r'__version__ = "(.*)"', (ROOT / "ldm3d/__init__.py").read_text())
    built = docker.build(docker.run(*options))
    assert version and (built["--tag"], built["VERSION"]) == (tag.format(version[1]), version[1])
    assert (built["--target"], built["VARIANT"]) == (target, variant)
    assert Path(built["--file"]) == ROOT / "mlops/docker/Dockerfile" and Path(docker.calls[0][-1]) == ROOT
    for call in (call for call in docker.calls if call[0] == "run"):
        assert ("--gpus" in call, "/tmp:exec" in call) == (variant == "cuda", variant == "cuda")


def test_every_container_is_hardened_and_published_for_this_machine_alone(docker: Docker) -> None:
    started = []
    for words in ([], ["--mode", "train"], ["--mode", "jupyter", "--environment", "dev"]):
        assert docker.run(*words).returncode == 0
        started += [" ".join(call) for call in docker.calls if call[0] == "run"]
    assert len(started) >= 6
    for call in started:
        assert "--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges" in call
        assert all(address.startswith("127.0.0.1:") for address in re.findall(r"--publish (\S+)", call))


def test_the_first_start_makes_a_key_and_later_ones_do_not(docker: Docker) -> None:
    assert "the first key" in docker.run().stdout
    assert any("mlops.api.keys create" in " ".join(call) for call in docker.calls)
    docker.has_keys = True
    assert "ready: http://127.0.0.1:8000/" in docker.run().stdout
    assert not any("create" in call for call in docker.calls)


def test_training_runs_both_stages_and_hands_on_the_arguments(docker: Docker) -> None:
    assert docker.run("--mode", "train", "--", "--set", "a.b=two words").returncode == 0
    last = [call for call in docker.calls if "MODE=train" in call]
    assert [word for call in last for word in call if word.startswith("STAGE")] == [
        "STAGE=autoencoder",
        "STAGE=diffusion",
    ]
    assert all(call[-2:] == ["--set", "a.b=two words"] for call in last)
    assert not any("--phantom" in call for call in docker.calls), "data that are there were made again"
    docker.fails = "exists()"
    docker.run("--mode", "train")
    assert any("--phantom" in call for call in docker.calls)


@pytest.mark.parametrize("failing", ["build", "keys list", "keys create", "--detach", "STAGE=autoencoder"])
def test_it_stops_at_the_first_call_that_fails(docker: Docker, failing: str) -> None:
    docker.fails = failing
    done = docker.run("--mode", "train" if "STAGE" in failing else "api")
    assert done.returncode == 7 and failing in " ".join(docker.calls[-1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mode", "jupyter"), "--mode jupyter needs --environment dev"),
        (("--mode",), "--mode needs a value"),
        (("api",), "api: no such option"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_built(docker: Docker, words: tuple[str, ...], said: str) -> None:
    done = docker.run(*words)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and docker.calls == []


def test_without_docker_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = subprocess.run(["/bin/bash", SH], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: docker is not installed, or not on PATH\n")


def test_both_scripts_give_docker_the_same_options(docker: Docker) -> None:
    assert options_of_docker(docker) == written_options(PS1.read_text())


def test_another_option_in_one_script_is_found(docker: Docker) -> None:
    assert options_of_docker(docker) != written_options(PS1.read_text().replace("'--read-only', ", ""))


def written_options(ps1: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ps1.split("#>")[1]))


def options_of_docker(docker: Docker) -> set[str]:
    """Every option in the calls of all modes together."""
    docker.fails, calls = "exists()", []
    for words in ([], ["--mode", "train", "--variant", "cuda"], ["--mode", "jupyter", "--environment", "dev"]):
        docker.run(*words)
        calls += docker.calls
    return {word for call in calls for word in call if re.fullmatch(r"--[a-z][a-z-]+", word)}


def test_help_names_every_option() -> None:
    done = subprocess.run(["bash", SH, "--help"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  (--\w+)  ", done.stdout, re.MULTILINE)) == {"--environment", "--mode", "--variant"}
    assert "set -euo" not in done.stdout
