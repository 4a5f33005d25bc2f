"""What the tests that run scripts share: a data set and a model, made once, by the scripts."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from scripts import NUM_CASES, Desk, Result, Warm

# Before anything imports torch. The tests run in as many processes as there are cores: with more threads than one each,
# these wait for each other, and a sample of a tiny network takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where the tests are started in the background of a shell, it has told them to ignore Ctrl-C, and what they start would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A data set, both stages trained on it, and 3 volumes of seed 5, each by the command that a user types.

    Nobody may change it. What the commands said is in `said.json`: for each script its code, stdout, stderr, seconds.
    """
    shared = tmp_path_factory.getbasetemp()
    if shared.name.startswith("popen-"):  # pytest-xdist: the processes share what the first of them makes
        shared = shared.parent
    folder = shared / "trained"
    with FileLock(shared / "trained.lock"):
        if not (folder / "said.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _train(Desk(folder).furnish())
    return Desk(folder)


def _train(desk: Desk) -> None:
    size = ("--phantom", NUM_CASES, "--size", 24, 32, 24, "--spacing", 6, "--workers", 1)
    commands = {
        "download_brats_data.py": ("-e", desk.environment, *size),
        "train_autoencoder.py": desk.files,
        "train_diffusion.py": desk.files,
        "inference.py": (*desk.files, "--num", 3, "--seed", 5),
    }
    said = {}
    for script, arguments in commands.items():
        done = desk.run_cold(script, *arguments)
        assert done.code == 0, done.stderr
        said[script] = vars(done)
    (desk.folder / "said.json").write_text(json.dumps(said))


@pytest.fixture(scope="session")
def said(trained: Desk) -> dict[str, Result]:
    """What each script said when `trained` was made."""
    content = json.loads((trained.folder / "said.json").read_text())
    return {script: Result(**result) for script, result in content.items()}


@pytest.fixture
def desk(trained: Desk, tmp_path: Path) -> Desk:
    """A desk of its own with the data of `trained`, and nothing else yet."""
    return Desk(tmp_path / "desk", trained.data).furnish()


@pytest.fixture
def run(warm: Warm, desk: Desk) -> Callable[..., Result]:
    """Run a script at `desk` with its configuration and environment: `run(script, *more, faults=())`."""
    return lambda script, *more, faults=(): warm.run(desk, script, *desk.files, *more, faults=faults)


@pytest.fixture
def model(trained: Desk, desk: Desk) -> Path:
    """A copy of the trained weights and states on `desk`."""
    return Path(shutil.copytree(trained.model, desk.model))
