"""Bring an image into a cluster, see that it works there, and go back where it does not.

    python -m mlops.deployment.roll_out remember before.json
    python -m mlops.deployment.roll_out apply --overlay gpu --image cpu=registry/ldm3d@sha256:... --image cuda=...
    python -m mlops.deployment.roll_out check --version 0.1.0 --watch 300
    python -m mlops.deployment.roll_out back before.json

In the cluster that kubectl points to. Needs nothing but Python and kubectl. `back` returns to the revisions that
`remember` saw, and to none other: where nothing was rolled out meanwhile, it changes nothing.

Exit status: 0 done, 1 it does not work, 2 a mistake in what was asked for.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm3d.errors import ConfigError
from mlops.commands import Parser, run_command
from mlops.deployment.smoke_test import Asking, Failed, smoke_test

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "mlops/kubernetes/setup_kubernetes.sh"
OVERLAYS = ROOT / "mlops/kubernetes-overlays"
NAMESPACE = "ldm3d"
DEPLOYMENTS = ("ldm3d-worker", "ldm3d-monitor", "ldm3d-api")
"""That run our images, in the order of going back: workers first, as the API answers only for what they can do."""
PORT = 8000
ROLLOUT_TIMEOUT = "15m"
WATCH_PAUSE_SECONDS = 5.0
IMAGE = re.compile(r"(cpu|cuda)=([\w./:-]+@sha256:[0-9a-f]{64})")
NAMED = r"(^\s*(?:- )?image: )\"?(?:[\w.:-]+/)*ldm3d:[\w.-]+-{variant}\"?$"
"""A line of a manifest with one of our images, in whatever registry: `ldm3d:0.1.0-cpu`."""


def kubectl(*words: str) -> str:
    """Output of kubectl. Raises `Failed`."""
    done = subprocess.run(["kubectl", "--namespace", NAMESPACE, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"kubectl {words[0]} {words[1] if len(words) > 1 else ''}: {done.stderr.strip()}")
    return done.stdout


def revisions() -> dict[str, int]:
    """Revision of each of our deployments that there is."""
    answer = json.loads(kubectl("get", "deployments", "--output", "json"))
    found = {item["metadata"]["name"]: item["metadata"].get("annotations", {}) for item in answer["items"]}
    known = {name: found[name].get("deployment.kubernetes.io/revision") for name in DEPLOYMENTS if name in found}
    return {name: int(revision) for name, revision in known.items() if revision}


def apply(overlay: str, images: list[str]) -> None:
    """Apply an overlay with these images instead of those that it names.

    Args:
        overlay: a folder of mlops/kubernetes-overlays, or another one.
        images: `cpu=registry/name@sha256:digest`, `cuda=...`: what is to run where a manifest names that variant.

    Raises:
        ConfigError: no such overlay, or an image in it that is none of these.
        Failed: it does not start.
    """
    base = OVERLAYS / overlay if (OVERLAYS / overlay).is_dir() else Path(overlay)
    if not (base / "kustomization.yaml").is_file():
        raise ConfigError(f"--overlay {overlay}: no folder with a kustomization.yaml")
    named = rendered = _rendered(base)
    for image in images:
        rendered = _replaced(rendered, image)
    if rendered == named:
        raise ConfigError(f"--overlay {overlay}: has none of our images")
    if left := re.search(NAMED.format(variant="(?:cpu|cuda)"), rendered, re.MULTILINE):
        raise ConfigError(f"--overlay {overlay}: has {left[0].strip()}, and no --image says what that is")
    with tempfile.TemporaryDirectory(prefix="roll-out-") as folder:
        (Path(folder) / "all.yaml").write_text(rendered)
        (Path(folder) / "kustomization.yaml").write_text("resources: [all.yaml]\n")
        if subprocess.run(["bash", str(SETUP), "apply", folder], check=False).returncode:
            raise Failed(f"{overlay}: not everything started")


def _rendered(base: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(base)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"kubectl kustomize: {done.stderr.strip()}")
    return done.stdout


def _replaced(rendered: str, image: str) -> str:
    """With one image in the place of another. kustomize's own `images` knows names only, and ours differ by tag."""
    parts = IMAGE.fullmatch(image)
    if not parts:
        raise ConfigError(f"--image {image}: must be cpu or cuda, and what it is: cpu=REGISTRY/NAME@sha256:DIGEST")
    return re.sub(NAMED.format(variant=parts[1]), rf"\g<1>{parts[2]}", rendered, flags=re.MULTILINE)


def check(version: str, watch: float) -> None:
    """Smoke test from inside, with a key that lives for its time only; then see whether it stays well.

    Args:
        version: which must answer.
        watch: seconds for which the service must stay ready, and no container be started again.

    Raises:
        Failed: it does not work, or did not for long.
    """
    with temporary_key() as key, forwarded("service/ldm3d-api") as url:
        smoke_test(url, key, version, seconds=900)
        before, until = restarts(), time.monotonic() + watch
        while time.monotonic() < until:
            time.sleep(min(WATCH_PAUSE_SECONDS, watch))
            Asking(url, "").get("/ready")
            if again := [pod for pod, count in restarts().items() if count > before.get(pod, 0)]:
                raise Failed(f"{', '.join(again)}: started again within {watch:g} s")
    if watch:
        print(f"ok: well for {watch:g} s")


def restarts() -> dict[str, int]:
    """How often the containers of each of our pods were started again."""
    answer = json.loads(kubectl("get", "pods", "--selector", "app.kubernetes.io/part-of=ldm3d", "--output", "json"))
    return {
        pod["metadata"]["name"]: sum(
            container["restartCount"] for container in pod["status"].get("containerStatuses", [])
        )
        for pod in answer["items"]
    }


@contextmanager
def temporary_key() -> Iterator[str]:
    """An operator's key; none is stored anywhere outside the cluster."""
    keys = ("exec", "deployment/ldm3d-worker", "--", "python", "-m", "mlops.api.keys")
    made = kubectl(*keys, "create", "--name", "smoke test", "--role", "operator", "--days", "1")
    key = next((word for word in made.split() if word.startswith("ldm3d_")), "")
    if not key:
        raise Failed("mlops.api.keys create: prints no key")
    if os.environ.get("GITHUB_ACTIONS"):
        print(f"::add-mask::{key}", flush=True)
    try:
        yield key
    finally:
        kubectl(*keys, "revoke", key.split("_")[1])


@contextmanager
def forwarded(target: str) -> Iterator[str]:
    """The address at which a port of the cluster is reached from here."""
    words = ["kubectl", "--namespace", NAMESPACE, "port-forward", "--address", "127.0.0.1", target, f":{PORT}"]
    forward = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert forward.stdout
    try:
        line = forward.stdout.readline()  # Forwarding from 127.0.0.1:PORT -> 8000
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if not found:
            raise Failed(f"kubectl port-forward {target}: {line.strip() or 'ended'}")
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        forward.terminate()
        forward.wait(10)
        forward.stdout.close()


def back(before: dict[str, int]) -> None:
    """Return to the revisions of then.

    Raises:
        Failed: they do not start, or there is nothing to go back to.
    """
    now = revisions()
    changed = [name for name in DEPLOYMENTS if now.get(name) != before.get(name)]
    if not changed:
        print("nothing was rolled out since; nothing to undo")
    if new := [name for name in changed if name not in before]:
        raise Failed(f"{', '.join(new)}: there was none before; setup_kubernetes.sh delete removes it")
    for name in changed:
        kubectl("rollout", "undo", f"deployment/{name}", f"--to-revision={before[name]}")
    for name in changed:
        kubectl("rollout", "status", f"deployment/{name}", f"--timeout={ROLLOUT_TIMEOUT}")
        print(f"back: {name} as in revision {before[name]}", flush=True)


def _read(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text())
        return {str(name): int(revision) for name, revision in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: nothing that `remember` wrote: {error}") from error


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m mlops.deployment.roll_out",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (("remember", "write down what runs now"), ("back", "return to what ran then")):
        commands.add_parser(name, help=does).add_argument("file", type=Path)
    applied = commands.add_parser("apply", help="roll out, and wait until it runs")
    applied.add_argument("--overlay", required=True, help="a folder of mlops/kubernetes-overlays, or another one")
    applied.add_argument(
        "--image", dest="images", action="append", required=True, metavar="VARIANT=IMAGE@DIGEST", help="what is to run"
    )
    checked = commands.add_parser("check", help="smoke test, and whether it stays well")
    checked.add_argument("--version", default="", help="which must answer; any by default")
    checked.add_argument("--watch", type=float, default=0, metavar="SECONDS", help="stay and look; 0 by default")
    return parser.parse_args()


def main() -> int:
    args = parse()
    try:
        if args.command == "remember":
            found = revisions()
            args.file.write_text(json.dumps(found) + "\n")
            print(", ".join(f"{name} is at revision {revision}" for name, revision in found.items()) or "nothing runs")
        elif args.command == "apply":
            apply(args.overlay, args.images)
        elif args.command == "check":
            check(args.version, args.watch)
        else:
            back(_read(args.file))
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
