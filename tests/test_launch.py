"""The launchers: what train_LDM.sh starts and refuses, both stages for real; what Linux can tell of the batch file."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_batch
from nifti_files import make_cases
from scripts import SECONDS, Desk

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "train_LDM.sh"
BATCH_FILE = ROOT / "train_autoencoder_multigpu.bat"
TOOLS = Path(sys.executable).parent
posix = pytest.mark.skipif(os.name != "posix", reason="needs bash")

# Answers the launcher's look at the machine as it is told, and notes what else it is asked to run.
FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then
  echo "$GPUS"
  exit "${LOOK_CODE:-0}"
fi
{ printf '%s\\n' "$@"; echo "devices: ${CUDA_VISIBLE_DEVICES-all}"; echo; } >>"$CALLS"
sleep "${SLEEP:-0}"
exit "${CODE:-0}"
"""


@dataclass(frozen=True)
class Launched:
    code: int
    stdout: str
    stderr: str
    calls: list[list[str]]
    """What torchrun was started with, argument by argument."""

    @property
    def scripts(self) -> list[str]:
        return [Path(argument).name for call in self.calls for argument in call if argument.endswith(".py")]


class House:
    """A copy of the launcher in a folder without a virtual environment, with a fake python on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder / "the house"
        self.bin, self.calls = folder / "bin", folder / "calls.txt"
        self.folder.mkdir()
        shutil.copy(LAUNCHER, self.folder)
        self.install("python")

    def install(self, name: str, text: str = FAKE_PYTHON) -> None:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        paths = {"PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls)}
        return os.environ | paths | {"GPUS": "4"} | variables

    def launch(self, *arguments: str, folder: Path | None = None, **variables: str) -> Launched:
        done = subprocess.run(
            [self.folder / "train_LDM.sh", *arguments],
            cwd=folder or self.folder,
            env=self.environment(variables),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Launched(done.returncode, done.stdout, done.stderr, self.noted())

    def noted(self) -> list[list[str]]:
        text = self.calls.read_text() if self.calls.exists() else ""
        return [call.splitlines() for call in text.split("\n\n") if call]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def expected(house: House, script: str, gpus: int, *more: str, processes: int = 0, config: str = "") -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes or gpus}",
        str(house.folder / script),
        "-c",
        config or str(house.folder / "config" / "config_train_multigpu.json"),
        "-e",
        str(house.folder / "config" / "environment.json"),
        "-g",
        str(gpus),
        *more,
    ]


@posix
def test_both_stages_get_all_gpus_and_what_stands_behind_the_dashes(house: House) -> None:
    launched = house.launch("--", "--seed", "1", "--set", "data.datalist=a list.csv")
    assert (launched.code, launched.stdout) == (0, "")
    more = ("--seed", "1", "--set", "data.datalist=a list.csv", "devices: all")
    assert launched.calls == [
        expected(house, script, 4, *more) for script in ("train_autoencoder.py", "train_diffusion.py")
    ]
    assert launched.stderr.splitlines() == [
        "train_LDM.sh: train_autoencoder.py on 4 GPU(s)",
        "train_LDM.sh: train_diffusion.py on 4 GPU(s)",
    ]


@posix
@pytest.mark.parametrize("arguments", [("--gpus", "2"), ("--gpus=2",), ("-g", "2")])
def test_fewer_gpus(house: House, arguments: tuple[str, ...]) -> None:
    assert house.launch(*arguments).calls[1] == expected(house, "train_diffusion.py", 2, "devices: all")


@posix
@pytest.mark.parametrize(("arguments", "there_are"), [(("--gpus", "0"), "4"), ((), "0")])
def test_without_a_gpu_one_process_runs_on_the_cpu(house: House, arguments: tuple[str, ...], there_are: str) -> None:
    launched = house.launch(*arguments, "--", "--seed", "1", GPUS=there_are)
    more = ("--set", "ddp_backend=gloo", "--seed", "1", "devices: ")
    assert launched.calls == [
        expected(house, script, 0, *more, processes=1) for script in ("train_autoencoder.py", "train_diffusion.py")
    ]
    assert launched.stderr.splitlines()[0] == "train_LDM.sh: train_autoencoder.py on the CPU"


@posix
def test_files_are_those_of_the_folder_where_one_is(house: House, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    launched = house.launch("--config", "my config.json", folder=elsewhere)
    assert launched.calls[0] == expected(house, "train_autoencoder.py", 4, "devices: all", config="my config.json")
    launched = house.launch("-c", "c.json", "--env=e.json", folder=elsewhere)
    assert launched.calls[-1][6:10] == ["-c", "c.json", "-e", "e.json"]


@posix
def test_the_virtual_environment_comes_first(house: House) -> None:
    house.install("python", "#!/bin/sh\nexit 9\n")
    house.install(str(house.folder / ".venv" / "bin" / "python"))
    assert house.launch().scripts == ["train_autoencoder.py", "train_diffusion.py"]


@posix
def test_python3_where_there_is_no_python_and_an_error_where_there_is_none(house: House) -> None:
    (house.bin / "python").unlink()
    for tool in ("bash", "dirname", "sleep", "cat"):
        (house.bin / tool).symlink_to(str(shutil.which(tool)))
    launched = house.launch(PATH=str(house.bin))
    assert (launched.code, launched.stderr) == (2, "error: no python found (see train_LDM.sh --help)\n")
    house.install("python3")
    assert house.launch(PATH=str(house.bin)).scripts == ["train_autoencoder.py", "train_diffusion.py"]


@posix
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "2"), "unknown argument: --gpu"),
        (("--gpu=2",), "unknown argument: --gpu"),
        (("2",), "unknown argument: 2"),
        (("--gpus",), "--gpus needs a value"),
        (("--config",), "--config needs a value"),
        (("--gpus", "two"), "--gpus 'two': must be a number, or all"),
        (("--gpus="), "--gpus '': must be a number, or all"),
        (("--gpus", "-1"), "--gpus '-1': must be a number, or all"),
        (("--gpus", "1.5"), "--gpus '1.5': must be a number, or all"),
        (("--gpus", "08"), "--gpus '08': must be a number, or all"),
        (("--gpus", "5"), "--gpus 5: this machine has 4 GPU(s)"),
        (("--gpus", "1", "--seed", "2"), "unknown argument: --seed"),
    ],
)
def test_mistakes_are_one_line_and_nothing_starts(house: House, arguments: tuple[str, ...], message: str) -> None:
    launched = house.launch(*([arguments] if isinstance(arguments, str) else arguments))
    assert (launched.code, launched.calls) == (2, [])
    assert launched.stderr == f"error: {message} (see train_LDM.sh --help)\n"


@posix
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(house: House, flag: str) -> None:
    launched = house.launch(flag)
    assert (launched.code, launched.stderr, launched.calls) == (0, "", [])
    assert launched.stdout.startswith("usage: train_LDM.sh [--gpus N] [--config FILE] [--env FILE] [-- ARGUMENT ...]\n")


@posix
def test_what_the_look_refuses_does_not_start(house: House) -> None:
    launched = house.launch(LOOK_CODE="2")
    assert (launched.code, launched.calls, launched.stderr) == (2, [], "")


@posix
def test_a_failed_first_stage_is_the_end(house: House) -> None:
    launched = house.launch(CODE="7")
    assert (launched.code, launched.scripts) == (7, ["train_autoencoder.py"])


@posix
def test_resume_is_for_the_stages_that_have_begun(house: House) -> None:
    assert [call[12:-1] for call in house.launch("--", "--seed", "1").calls] == [["--seed", "1"]] * 2
    house.calls.unlink()
    for asked in (["--resume"], ["--resume", "auto"], ["--resume=always"]):
        given = [*asked, "--seed", "1"]
        assert [call[12:-1] for call in house.launch("--", *given).calls] == [given, [*given, "--resume", "auto"]]
        house.calls.unlink()


@posix
def test_ctrl_c_ends_the_launcher_after_the_stage(house: House) -> None:
    process = subprocess.Popen(
        [house.folder / "train_LDM.sh"],
        env=house.environment({"SLEEP": "60"}),
        start_new_session=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored and would be so here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + SECONDS
    while not house.noted() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(SECONDS) == 130
    assert len(house.noted()) == 1


@pytest.mark.parametrize("command", [["shellcheck"], ["shfmt", "-d", "-i", "2", "-ci"]], ids=lambda command: command[0])
def test_the_launcher_is_clean(command: list[str]) -> None:
    done = subprocess.run([TOOLS / command[0], *command[1:], LAUNCHER], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk with four volumes of noise, for the real launcher."""
    desk = Desk(tmp_path_factory.mktemp("launch") / "desk").furnish()
    make_cases(desk.data, 4, (16, 16, 16), (6, 6, 6))
    one_epoch = {"max_epochs": 1}
    desk.write_config(autoencoder_train=one_epoch, diffusion_train=one_epoch | {"sample_interval": 0})
    return desk


@pytest.fixture
def really(place: Desk) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Start the repository's own launcher at `place`."""

    def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = place.process_environment
        environment["PATH"] = f"{TOOLS}:{environment['PATH']}"
        return subprocess.run(
            [LAUNCHER, *arguments], cwd=place.folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )

    return start


@posix
def test_both_stages_really_run_on_the_cpu(
    place: Desk, really: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = really("--gpus", "0", "--config", "config.json", "--env=environment.json", "--", "--seed", "3")
    assert done.returncode == 0, done.stderr
    said = "\n".join(line.split(":")[0] for line in done.stderr.splitlines() if "process(es)" in line)
    assert said == "autoencoder\ndiffusion"
    assert done.stderr.count("1 process(es)") == 2
    made = {path.name for path in place.model.iterdir()}
    assert made >= {"autoencoder.safetensors", "autoencoder_last.pt", "diffusion_unet.safetensors", "diffusion_last.pt"}


@posix
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "999"), r"error: --gpus 999: this machine has \d+ GPU\(s\) \(see train_LDM\.sh --help\)\n"),
        (("--gpus", "0", "--", "--set", "sed=1"), r"error: config\.json: sed: no such key; did you mean 'seed'\?\n"),
    ],
    ids=["GPUs", "key"],
)
def test_the_real_look_refuses_in_one_line(
    really: Callable[..., "subprocess.CompletedProcess[str]"], arguments: tuple[str, ...], message: str
) -> None:
    done = really("--config", "config.json", "--env", "environment.json", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(message, done.stderr)


def batch_commands(*arguments: str) -> list[list[str]]:
    """The commands that the batch file runs, with its variables and arguments put in; slashes for backslashes."""
    values = {f"~{number}": value for number, value in enumerate(arguments, 1)}
    values |= {"~dp0": f"{ROOT}/", "AMP": arguments[2], "COMPILE": arguments[3]}

    def expand(text: str) -> str:
        return re.sub(r"%(~dp0|~\d|\w+%)", lambda match: values[match[1].rstrip("%")], text).replace("\\", "/")

    commands = []
    for line in BATCH_FILE.read_text().splitlines():
        if assignment := re.fullmatch(r'set "?(\w+)=([^"].*?)"?', line):
            values[assignment[1]] = expand(assignment[2])
        elif line.startswith("call "):
            commands.append(shlex.split(expand(line))[1:])
    return commands


def test_the_batch_file_is_one_that_windows_can_read() -> None:
    content = BATCH_FILE.read_bytes()
    assert content.isascii()
    assert content.count(b"\n") == content.count(b"\r\n") > 0
    root = tree_sitter.Parser(tree_sitter.Language(tree_sitter_batch.language())).parse(content).root_node
    assert not root.has_error
    text = content.decode()
    assert set(re.findall(r"\bgoto (\w+)", text)) == set(re.findall(r"^:(\w+)", text, re.MULTILINE))


def test_each_way_to_the_end_of_the_batch_file_has_an_exit_code() -> None:
    sections = re.split(r"^:\w+\n", BATCH_FILE.read_text(), flags=re.MULTILINE)
    ends = [section.rstrip().splitlines()[-1] for section in sections]
    assert ends == ["exit /b %ERRORLEVEL%", *["exit /b 2"] * (len(sections) - 1)]


def test_what_the_batch_file_starts() -> None:
    look, run = batch_commands("4", "my config.json", "true", "false")
    arguments = ["-c", "my config.json", "-e", f"{ROOT}/config/environment.json", "-g", "4"]
    arguments += ["--set", "amp=true", "--set", "compile=false", "--set", "ddp_backend=gloo"]
    assert look[:2] == [f"{ROOT}/.venv/Scripts/python.exe", "-c"]
    assert look[3:] == [f"{ROOT}/.", *arguments]
    assert run[1:3] == ["-m", "torch.distributed.run"]
    assert run[-len(arguments) - 2 :] == ["--nproc-per-node=4", f"{ROOT}/train_autoencoder.py", *arguments]


def test_the_look_of_the_batch_file_refuses_in_one_line(place: Desk) -> None:
    (look, _) = batch_commands("999", str(place.config), "true", "false")
    environment = os.environ | {"LOCAL_WORLD_SIZE": "999"}
    done = subprocess.run(
        [sys.executable, *look[1:]], cwd=place.folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: -g 999: this machine has \d+ GPU\(s\); use .*\n", done.stderr)


# What torch without libuv does, as on Windows.
NO_LIBUV = """
import sys
import torch.distributed as dist
import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend

RealStore = dist.TCPStore

class TCPStore(RealStore):
    def __init__(self, *args, use_libuv=True, **more):
        assert not use_libuv, "no libuv here"
        super().__init__(*args, use_libuv=use_libuv, **more)

for module in list(sys.modules.values()):
    if getattr(module, "TCPStore", None) is RealStore:
        module.TCPStore = TCPStore
"""
MEETING = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1)
dist.all_reduce(ones)
print(f"rank {dist.get_rank()} of {int(ones)}")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("as_the_batch_file", [True, False], ids=["batch file", "standalone"])
def test_the_batch_files_processes_meet_without_libuv(tmp_path: Path, as_the_batch_file: bool) -> None:
    _, run = batch_commands("2", "c.json", "true", "false")
    options = run[3:-13] if as_the_batch_file else ["--standalone", "--nproc-per-node=2"]
    settings = dict(re.findall(r'^set "(USE_LIBUV|TORCH_\w+)=(.*)"$', BATCH_FILE.read_text(), re.MULTILINE))
    (tmp_path / "sitecustomize.py").write_text(NO_LIBUV)
    (tmp_path / "meeting.py").write_text(MEETING)
    done = subprocess.run(
        [sys.executable, *run[1:3], *options, tmp_path / "meeting.py"],
        env=os.environ | settings | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode == 0) == as_the_batch_file, done.stderr
    met = sorted(re.findall(r"rank \d of \d", done.stdout))  # the two may write into one line
    assert met == (["rank 0 of 2", "rank 1 of 2"] if as_the_batch_file else [])
