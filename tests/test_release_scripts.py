"""mlops/deployment/*.sh: what a workflow does in a shell stops at the first thing that is wrong."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGES, GATE = (ROOT / "mlops" / "deployment" / name for name in ("images.sh", "model_gate.sh"))
DIGEST = f"sha256:{'a' * 64}"
GITHUB = {
    "GITHUB_SERVER_URL": "https://github.example",
    "GITHUB_REPOSITORY": "lab/ldm3d",
    "GITHUB_REF": "refs/tags/v0.1.0",
}
Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """A script, with programs of these names and texts instead of the real ones; they write down their arguments."""

    def run(script: Path, *words: object, **programs: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in programs.items():
            path = tmp_path / "bin" / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{text}\n')
            path.chmod(0o755)
        environment = os.environ | GITHUB | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        line = ["bash", str(script), *map(str, words)]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def digests(tmp_path: Path) -> Path:
    for folder, names in (("digests", ("cpu", "cuda")), ("sboms", ("cpu.cdx.json", "cuda.cdx.json"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(DIGEST + "\n")
    return tmp_path / "digests"


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_each_image_is_signed_verified_and_named_by_its_digest(call: Call, digests: Path, tmp_path: Path) -> None:
    image = f"registry.example/ldm3d@{DIGEST}"
    assert call(IMAGES, "sign", "registry.example/ldm3d", digests, "sboms", cosign="").returncode == 0
    assert calls(tmp_path)[:2] == [
        f"cosign sign --yes {image}",
        f"cosign attest --yes --type cyclonedx --predicate sboms/cpu.cdx.json {image}",
    ]
    assert call(IMAGES, "verify", "registry.example/ldm3d", digests, cosign="").returncode == 0
    identity = "https://github.example/lab/ldm3d/.github/workflows/deploy.yml@refs/tags/v0.1.0"
    assert f"--certificate-identity {identity} " in calls(tmp_path)[-1]
    said = call(IMAGES, "arguments", "registry.example/ldm3d", digests)
    assert said.stdout.splitlines() == ["--image", f"cpu={image}", "--image", f"cuda={image}"]


@pytest.mark.parametrize("command", ["sign", "verify"])
def test_an_image_that_cannot_be_signed_or_is_not_stops_the_release(command: str, call: Call, digests: Path) -> None:
    more = ["sboms"] if command == "sign" else []
    said = call(IMAGES, command, "registry.example/ldm3d", digests, *more, cosign='[[ "$*" != *cpu* ]] && exit 1')
    assert said.returncode != 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "cpu").write_text("latest"), "cpu: holds no digest"),
        (lambda folder: (folder / "cpu").write_text(f"{DIGEST} --x"), "cpu: holds no digest"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no digests"),
        (lambda folder: (folder.parent / "sboms/cuda.cdx.json").unlink(), "cuda.cdx.json: missing"),
    ],
)
def test_what_is_no_digest_is_signed_by_nobody(
    change: Callable[[Path], object], said: str, call: Call, digests: Path, tmp_path: Path
) -> None:
    change(digests)
    done = call(IMAGES, "sign", "registry.example/ldm3d", digests, "sboms", cosign="")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not any("cuda" in made for made in calls(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"), [((), "nothing: no such"), (("sign", "x"), "sign IMAGE"), (("go",), "go: no")]
)
def test_mistakes(words: tuple[str, ...], said: str, call: Call) -> None:
    done = call(IMAGES, *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def az(exists: str) -> str:
    return f'case "$*" in *exists*) {exists} ;; esac'


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_gates_answer_is_the_scripts(status: int, call: Call, tmp_path: Path) -> None:
    assert call(GATE, "account", "new", az=az("echo true"), python3=f"exit {status}").returncode == status
    assert "--champion" in calls(tmp_path)[-1]


def test_only_an_answer_that_there_is_no_champion_counts_as_none(call: Call, tmp_path: Path) -> None:
    done = call(GATE, "account", "new", az=az("echo false"), python3="")
    assert (done.returncode, done.stderr) == (0, "notice: there is no champion yet\n")
    assert calls(tmp_path)[-1].startswith("python3 -m mlops.pipelines.gate --candidate ")
    assert "--champion" not in calls(tmp_path)[-1]
    for silent in ("exit 1", "true", "echo maybe"):
        done = call(GATE, "account", "new", az=az(silent), python3="")
        assert (done.returncode, done.stderr) == (2, "error: champion: cannot be asked for\n")
    assert (
        call(GATE, "account", "new", az="exit 3", python3="").stderr == "error: new/metrics.json: cannot be fetched\n"
    )


@pytest.mark.parametrize("words", [(), ("account",), ("", "new"), ("account", ""), ("account", "new; rm")])
def test_a_candidate_must_be_named(words: tuple[str, ...], call: Call, tmp_path: Path) -> None:
    assert call(GATE, *words, az="", python3="").returncode == 2
    assert calls(tmp_path) == []
