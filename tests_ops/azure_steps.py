"""Runs the commands of Azure ML components on this machine, as Azure ML would: a snapshot of the code, folders for
inputs and outputs, `${{...}}` replaced, what is in `$[[...]]` left out where its input is not given."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from programs import ROOT, run

PROGRAMS = ROOT / ".venv-mlflow/bin"
"""MLflow on top of the project's environment, as the training environment of Azure ML has it."""


def snapshot(folder: Path) -> Path:
    """Copy what azure-ai-ml would upload of a checkout as the code of a job: what `.amlignore` does not exclude."""
    from azure.ai.ml._utils._asset_utils import get_ignore_file

    ignored = get_ignore_file(str(ROOT))
    # Not the whole folder: azure-ai-ml walks through virtual environments too before it leaves them out.
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not ignored.is_file_excluded(str(ROOT / name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def substituted(command: str, inputs: Mapping[str, object], outputs: Mapping[str, Path]) -> str:
    """A component's command with its inputs and outputs put in; a name that is not given is a KeyError."""

    def optional(match: "re.Match[str]") -> str:
        names = re.findall(r"\$\{\{inputs\.(\w+)}}", match[1])
        return match[1] if all(name in inputs for name in names) else ""

    def value(match: "re.Match[str]") -> str:
        return str({"inputs": inputs, "outputs": outputs}[match[1]][match[2]])

    return re.sub(r"\$\{\{(inputs|outputs)\.(\w+)}}", value, re.sub(r"\$\[\[(.*?)]]", optional, command))


class LocalPipeline:
    """A pipeline job's steps, each with a folder for its outputs.

    Args:
        job: of `mlops.pipelines.training_pipeline.build`, as a dictionary.
        code: a snapshot; the steps run in it.
        folder: of all outputs.
        assets: folders of registered assets, by `azureml:name:version`.
        environment: of the steps' processes, besides what they need to start.
    """

    def __init__(self, job: Any, code: Path, folder: Path, assets: Mapping[str, Path], environment: Mapping[str, str]):
        self.jobs, self.job = job["jobs"], job
        self.code, self.folder, self.assets = code, folder, assets
        kept = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
        path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **environment}

    def output(self, step: str, name: str) -> Path:
        path = self.folder / step / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def command(self, step: str) -> str:
        node = self.jobs[step]
        inputs = {name: self._value(given) for name, given in node["inputs"].items()}
        outputs = {name: self.output(step, name) for name in node["component"]["outputs"]}
        return substituted(node["component"]["command"], inputs, outputs)

    def _value(self, given: Any) -> object:
        if not isinstance(given, dict):
            return given
        bound = re.fullmatch(r"\$\{\{parent\.(?:jobs\.(\w+)\.outputs\.(\w+)|inputs\.(\w+))}}", given["path"])
        if bound and bound[3]:
            return self._value(self.job["inputs"][bound[3]])
        return self.output(bound[1], bound[2]) if bound else self.assets[given["path"]]

    def start(self, step: str) -> "subprocess.Popen[str]":
        """Start a step in a session of its own, so that a preemption can kill all of it; its inputs are read-only."""
        folders = [
            value for given in self.jobs[step]["inputs"].values() if isinstance(value := self._value(given), Path)
        ]
        mounts = "".join(f"mount --bind {f} {f} && mount -o remount,ro,bind {f} && " for f in folders)
        # Only root may mount; for anybody else inputs are what they are.
        alone = ["unshare", "--mount"] if os.geteuid() == 0 else []
        return subprocess.Popen(
            [*alone, "bash", "-c", (mounts if alone else "") + self.command(step)],
            cwd=self.code,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, step: str) -> str:
        """What the step says. Raises `AssertionError` with it where the step fails."""
        process = self.start(step)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{step}: {said[-3000:]}"
        return said
