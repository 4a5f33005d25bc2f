"""The Dockerfiles, the locks and the shell scripts of mlops/docker, as the programs that read them see them."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
from programs import ROOT, tool

DOCKER = ROOT / "mlops/docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "mlflow.Dockerfile"]
SCRIPTS = sorted(DOCKER.glob("*.sh"))
LOCKS = sorted((DOCKER / "locks").glob("*.txt"))
CHECKOV_EXCEPTIONS = {"CKV_DOCKER_7": "the base image is a build argument, whose default has a tag"}
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "ldm3d/__init__.py").read_text())[1]  # type: ignore[index]


def test_hadolint_has_nothing_to_say() -> None:
    done = programs.run(tool("hadolint"), *DOCKERFILES)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11-slim-bookworm\nARG VARIANT=cpu\n\n# hadolint ignore=DL3006\n", "python\nFROM python\n", "DL3006"),
        (" --no-install-recommends tini", " tini", "DL3015"),
        ('CMD ["python", "mlops/docker/health_check.py"]', "CMD python mlops/docker/health_check.py", "DL3025"),
        ("WORKDIR /app\nCOPY LICENSE", "WORKDIR app\nCOPY LICENSE", "DL3000"),
        ("&& chmod +x mlops", "&& cd mlops && chmod +x $IT mlops", "SC2086"),
    ],
)
def test_hadolint_finds(old: str, new: str, rule: str, tmp_path: Path) -> None:
    done = programs.run(tool("hadolint"), broken(DOCKERFILES[0], tmp_path, old, new))
    assert rule in done.stdout


def test_checkov_has_nothing_to_say_but_what_it_gets_wrong(tmp_path: Path) -> None:
    """One start of it, which takes seconds, judges a broken copy too."""
    copy = broken(DOCKERFILES[0], tmp_path, "USER 10001:10001\n", "")
    copy.write_text(re.sub(r"HEALTHCHECK .*\n", "EXPOSE 22\n", copy.read_text()))
    command = [programs.CHECKOV, "--framework=dockerfile", "--skip-download", "--compact", "--quiet"]
    said = programs.run(*command, f"--skip-check={','.join(CHECKOV_EXCEPTIONS)}", "--file", *DOCKERFILES, copy).stdout
    failed = re.findall(r"Check: (\w+).*\n\s*FAILED.*\n\s*File: (\S+?):", said)
    assert {Path(file).name for _, file in failed} == {copy.name} != {"Dockerfile"}, said
    assert {rule for rule, _ in failed} == {"CKV_DOCKER_1", "CKV_DOCKER_2", "CKV_DOCKER_3"}


def stages(text: str) -> dict[str, str]:
    """Each stage's instructions by its name."""
    found = re.split(r"^FROM \S+(?: AS (\S+))?\n", text, flags=re.M)[1:]
    return dict(zip((name or "last" for name in found[::2]), found[1::2], strict=True))


def dockerfile_faults(text: str, ignore: str) -> list[str]:
    """What no linter knows: what belongs to which stage, and that a change of code comes last."""
    parts, faults = stages(text), []
    if [*parts][-2:] != ["dev", "prod"]:
        faults.append("prod is not the last stage, which is built where none is named")
    for name in ("dev", "prod"):
        copied = re.findall(r"^COPY --from=(\S+)", parts.get(name, ""), re.M)
        if copied != ["packages-dev" if name == "dev" else "packages", "code"]:
            faults.append(f"{name}: packages first, code last, each from its stage")
        if f"ARG VERSION={VERSION} " not in parts.get(name, ""):
            faults.append(f"{name}: VERSION is not {VERSION}")
    if [name for name, part in parts.items() if "dev-py" in part] != ["packages-dev"]:
        faults.append("packages of the dev image outside packages-dev")
    runtime = parts.get("runtime", "")
    if not re.search(r"^USER [1-9]\d*:[1-9]\d*$", runtime, re.M) or len(re.findall("^USER", text, re.M)) != 1:
        faults.append("the user is not one number that is not root's")
    if 'ENTRYPOINT ["tini", "--", "/app/mlops/docker/entrypoint.sh"]\n' not in runtime:
        faults.append("tini does not start entrypoint.sh")
    for command in re.findall(r"pip .*?install(?:.*\\\n)*.*", text):
        if "--require-hashes" not in command:
            faults.append("pip install without --require-hashes")
    sources = [word for words in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for word in words.split()]
    let_in = re.findall(r"^!(.*)$", ignore, re.M)
    for source in sources:
        if not any(source == path or source.startswith(f"{path}/") for path in let_in):
            faults.append(f"COPY {source}: .dockerignore keeps it out")
    return faults


IGNORE = (ROOT / ".dockerignore").read_text()


def test_the_dockerfile_keeps_the_projects_rules() -> None:
    assert dockerfile_faults(DOCKERFILES[0].read_text(), IGNORE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("FROM runtime AS prod", "FROM runtime AS product", "prod is not the last"),
        (
            "COPY --from=packages /opt/venv /opt/venv\nCOPY --from=code /app /app\n",
            "COPY --from=code /app /app\n",
            "prod:",
        ),
        ("FROM runtime AS prod\nARG VERSION=0", "FROM runtime AS prod\nARG VERSION=9", "VERSION is not"),
        ("FROM packages AS packages-dev\n", "", "outside packages-dev"),
        ("USER 10001:10001", "USER 0:0", "not root's"),
        ("USER 10001:10001", "USER ldm3d", "not root's"),
        ('["tini", "--", ', "[", "tini does not start"),
        ("--require-hashes -r sbom", "-r sbom", "--require-hashes"),
        ("COPY config config", "COPY tests config", "COPY tests: .dockerignore"),
    ],
)
def test_a_broken_dockerfile_is_found(old: str, new: str, fault: str) -> None:
    text = DOCKERFILES[0].read_text()
    assert old in text
    assert any(fault in found for found in dockerfile_faults(text.replace(old, new), IGNORE))


def pinned(text: str) -> dict[str, str]:
    return {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w.-]+)==([^ \n]+)", text, re.M)
    }


def lock_faults(name: str, text: str, wanted: dict[str, str]) -> list[str]:
    """A lock has every package that was asked for, in that version, and digests of its files, and no address."""
    faults, have = [], pinned(text)
    for package, version in wanted.items():
        if have.get(package, "").removesuffix("+cpu") != version:
            faults.append(f"{name}: {package} is {have.get(package)}, not {version}; run mlops/docker/lock.sh")
    for entry in re.findall(r"^[\w.-]+(?:\[.*\])?==.*(?:\n    .*)*", text, re.M):
        if "--hash=sha256:" not in entry:
            faults.append(f"{name}: {entry.split()[0]} has no digest")
    if "://" in text:
        faults.append(f"{name}: names an address")
    if name.startswith("cpu") and not have.get("torch", "").endswith("+cpu"):
        faults.append(f"{name}: torch is not the build for CPUs")
    return faults


def wanted(name: str) -> dict[str, str]:
    """What the lock's .in file, and those that it includes, ask for."""
    source = {"cpu": "image", "cuda": "image"}.get(name.split("-")[0], name.split("-")[0])
    return asked(DOCKER / f"locks/{source}.in")


def asked(file: Path) -> dict[str, str]:
    text = file.read_text()
    found = pinned(text)
    for other in re.findall(r"^-r (.*)$", text, re.M):
        found |= asked((file.parent / other).resolve())
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_is_what_the_requirements_ask_for(lock: Path) -> None:
    assert wanted(lock.name)
    assert lock_faults(lock.name, lock.read_text(), wanted(lock.name)) == []


def test_all_locks_of_the_image_agree() -> None:
    cpu, cuda, dev = (pinned((DOCKER / f"locks/{name}-py3.11.txt").read_text()) for name in ("cpu", "cuda", "dev"))
    others = {name: cpu[name] for name in cpu.keys() & (cuda.keys() | dev.keys()) - {"torch"}}
    assert {name: (cuda | dev)[name] for name in others} == others


@pytest.mark.parametrize(
    ("pattern", "new", "fault"),
    [
        (r"^monai==.*?(\s)", r"monai==1.5.0\1", "monai is 1.5.0"),
        (r"^huey==.*(\n    .*)*\n", "", "huey is None"),
        (r"(^tqdm==\S+).*(\n    .*)*\n", r"\1\n", "tqdm==4.70.1 has no digest"),
        (r"\+cpu", "", "not the build for CPUs"),
        (r"\A", "--index-url https://example.org/simple\n", "names an address"),
    ],
)
def test_a_broken_lock_is_found(pattern: str, new: str, fault: str) -> None:
    name = "cpu-py3.11.txt"
    text, count = re.subn(pattern, new, (DOCKER / "locks" / name).read_text(), count=1, flags=re.M)
    assert count and any(fault in found for found in lock_faults(name, text, wanted(name)))


def shell_says(*files: Path) -> str:
    lint = programs.run(tool("shellcheck"), *files)
    form = programs.run(tool("shfmt"), "-d", "-i", "2", "-ci", *files)
    return lint.stdout + form.stdout + form.stderr


def test_shellcheck_and_shfmt_have_nothing_to_say() -> None:
    assert len(SCRIPTS) == 4 and shell_says(*SCRIPTS) == ""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"${torchrun_args[@]}"', "$torchrun_args", "SC2128"),
        ("esac\n", "\n", "SC1"),
        ('"$(id -u)"', "$(id -u)", "SC2046"),
        ("  exit 2", "      exit 2", "+  exit 2"),
    ],
)
def test_a_broken_script_is_found(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert said in shell_says(broken(DOCKER / "entrypoint.sh", tmp_path, old, new))


def test_the_entry_lists_the_modes_that_it_has() -> None:
    text = (DOCKER / "entrypoint.sh").read_text()
    outer = text[text.index('case "${MODE') :]
    modes = re.findall(r"^  (\w+)\)", outer, re.M)
    assert f"must be {', '.join(modes[:-1])} or {modes[-1]}" in text and len(modes) == 5


@pytest.mark.parametrize(("user", "mode", "said"), [("0", "api", "as root"), ("7", "serve", "must be api, worker")])
def test_the_entry_refuses(user: str, mode: str, said: str, tmp_path: Path) -> None:
    """As far as that can be seen without the image: its programs are not here."""
    done = entry(tmp_path, user, MODE=mode)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({"MODE": "api"}, "python mlops/docker/api_server.py --x y"),
        ({"MODE": "worker"}, "python -m mlops.api.worker --x y"),
        ({"MODE": "infer"}, "python inference.py --x y"),
        ({"MODE": "train", "STAGE": "diffusion"}, "python train_diffusion.py --x y"),
        (
            {"MODE": "train", "STAGE": "autoencoder", "TORCHRUN_ARGS": "--nnodes 2 --standalone"},
            "torchrun --nnodes 2 --standalone train_autoencoder.py --x y",
        ),
        ({"MODE": "jupyter"}, "jupyter lab --ip=0.0.0.0 --no-browser --x y"),
    ],
)
def test_the_entry_becomes_the_program(environment: dict[str, str], command: str, tmp_path: Path) -> None:
    done = entry(tmp_path, "10001", **environment)
    assert done.stdout.split(maxsplit=1) == [str(done.args[-1]), f"{command}\n"], "another process, so signals get lost"


def entry(folder: Path, user: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run entrypoint.sh where every program only says its process number and how it was called."""
    says: Callable[[str], str] = lambda name: f'#!/bin/sh\necho $$ {name} "$@"\n'  # noqa: E731
    for name in ("python", "torchrun", "jupyter"):
        (folder / name).write_text(says(name))
    (folder / "id").write_text(f"#!/bin/sh\necho {user}\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    command = [DOCKER / "entrypoint.sh", "--x", "y"]
    with subprocess.Popen(
        command, env={"PATH": f"{folder}:/usr/bin:/bin", **environment}, text=True, stdout=-1, stderr=-1
    ) as started:
        out, err = started.communicate(timeout=30)
    return subprocess.CompletedProcess([started.pid], started.returncode, out, err)


def broken(file: Path, folder: Path, old: str, new: str) -> Path:
    """A copy with a fault."""
    text = file.read_text()
    assert old in text
    copy = folder / f"broken.{file.name}"
    copy.write_text(text.replace(old, new, 1))
    return copy
