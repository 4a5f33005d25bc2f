"""Run the scripts as users do, in processes of their own, and look at what they leave."""

import atexit
import getpass
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM = Path(__file__).with_name("warm.py")
SECONDS = 240
"""After which a script counts as hanging; a busy machine is slow."""

CONFIG: dict[str, Any] = {
    "spacing": [6, 6, 6],
    "latent_channels": 4,
    "autoencoder_def": {
        "latent_channels": "@latent_channels",
        "channels": [8, 8],
        "attention_levels": [False, False],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "patchify": 2,
    },
    "discriminator_def": {"channels": 4, "num_layers_d": 1},
    "autoencoder_train": {
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "lr": 1e-3,
        "max_epochs": 4,
        "adv_warm_up_epochs": 1,
        "warm_up_steps": 2,
    },
    "diffusion_def": {
        "in_channels": "@latent_channels",
        "out_channels": "@latent_channels",
        "channels": [8, 8],
        "attention_levels": [False, True],
        "num_head_channels": 8,
        "num_res_blocks": 1,
        "norm_num_groups": 4,
    },
    "diffusion_train": {
        "batch_size": 2,
        "patch_size": [24, 32, 24],
        "lr": 1e-3,
        "max_epochs": 4,
        "warm_up_steps": 2,
        "sample_interval": 2,
        "flip": True,
    },
    "NoiseScheduler": {"type": "rflow"},
    "sampling": {"steps": 4},
    "data": {"num_workers": 0},
}
"""Both stages in seconds: networks of 8 channels, volumes of 24 x 32 x 24 voxels of 6 mm."""
LIBRARIES = {"matplotlib", f"torchinductor_{getpass.getuser()}"}
"""Folders that matplotlib and torch make when they are imported."""
NUM_CASES, NUM_TRAIN, STEPS_PER_EPOCH = 10, 9, 4


@dataclass(frozen=True)
class Result:
    """What a script did."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def last_line(self) -> str:
        return (self.stderr.splitlines() or [""])[-1]


class Desk:
    """A folder with a configuration and an environment, where a user sits and starts scripts.

    Args:
        folder: everything but the data is in it; also the current folder of the scripts.
        data: the data set; `data` in the folder by default.
    """

    def __init__(self, folder: Path, data: Path | None = None):
        self.folder, self.home = folder, folder / "home"
        self.config, self.environment = folder / "config.json", folder / "environment.json"
        self.model, self.runs, self.results = folder / "model", folder / "runs", folder / "results"
        self.data = data or folder / "data"
        # Not in the folder: the sockets of the processes that load data lie here, whose paths must be short.
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        self.temporary = Path(tempfile.gettempdir()) / f"desk-{name}"

    def furnish(self) -> "Desk":
        """Make the folder with the two files."""
        self.home.mkdir(parents=True)
        self.temporary.mkdir(exist_ok=True)
        atexit.register(shutil.rmtree, self.temporary, ignore_errors=True)
        self.write_config()
        self.write_environment()
        return self

    def write_config(self, **changes: Any) -> None:
        """Write `CONFIG` with other keys; a section's dictionary replaces single keys of that section."""
        content = CONFIG.copy()
        for key, value in changes.items():
            content[key] = CONFIG.get(key, {}) | value if isinstance(value, dict) else value
        self.config.write_text(json.dumps(content))

    def write_environment(self, **changes: Any) -> None:
        content = {
            "model_dir": str(self.model),
            "tfevent_path": str(self.runs),
            "output_dir": str(self.results),
            "data_base_dir": str(self.data),
        }
        self.environment.write_text(json.dumps(content | changes))

    @property
    def files(self) -> list[str]:
        """The arguments that name configuration and environment."""
        return ["-c", str(self.config), "-e", str(self.environment)]

    @property
    def process_environment(self) -> dict[str, str]:
        """One thread for each process; a home and a temporary folder in which nobody should write."""
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        return kept | {
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            # monai imports matplotlib, which notes the machine's fonts where it has not done so yet.
            "MPLCONFIGDIR": str(self.home / "matplotlib"),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run_cold(self, script: str, *args: object, launcher: Sequence[str] = ()) -> Result:
        """Start a script by its command line, as it stands in the README."""
        command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=self.folder, env=self.process_environment, capture_output=True, text=True, timeout=SECONDS
        )
        return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - start)

    def run_parallel(self, script: str, *args: object) -> Result:
        """Start two processes of a script with torchrun."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
        return self.run_cold(script, *args, launcher=torchrun)


class Warm:
    """Runs scripts without waiting for their imports, where processes can fork; as `Desk.run_cold` otherwise."""

    def __init__(self) -> None:
        self.server = None
        if sys.platform == "linux":
            self.server = subprocess.Popen(
                [sys.executable, WARM, "serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def run(self, desk: Desk, script: str, *args: object, faults: Sequence[tuple[Any, ...]] = ()) -> Result:
        """Run a script.

        Args:
            desk: where.
            script: its file name.
            args: its arguments.
            faults: what happens to it: names of functions in `faults.py` with their arguments.
        """
        outputs = [desk.home / "stdout", desk.home / "stderr"]
        request = {
            "script": script,
            "args": list(map(str, args)),
            "cwd": str(desk.folder),
            "env": desk.process_environment,
            "stdout": str(outputs[0]),
            "stderr": str(outputs[1]),
            "timeout": SECONDS,
            "faults": faults,
        }
        answer = self._ask(json.dumps(request))
        result = Result(answer["code"], outputs[0].read_text(), outputs[1].read_text(), answer["seconds"])
        for output in outputs:
            output.unlink()
        return result

    def _ask(self, request: str) -> dict[str, Any]:
        start = time.monotonic()
        if self.server is None:
            done = subprocess.run([sys.executable, WARM, request], timeout=2 * SECONDS, check=False)
            return {"code": done.returncode, "seconds": time.monotonic() - start}
        assert self.server.stdin and self.server.stdout
        print(request, file=self.server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer

    def close(self) -> None:
        if self.server:
            self.server.communicate()


def tree(*folders: Path) -> dict[str, str]:
    """Every file and folder below, with a digest of each file's content; but not what libraries keep for themselves."""
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if not LIBRARIES & {*path.parts}]
    return {str(path): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
