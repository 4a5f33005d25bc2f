"""setup_kubernetes.sh against a kubectl that writes down its calls: what it does, in which order, where it stops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from kubernetes_objects import ALL_OVERLAYS, BASE, get, render

SCRIPT = BASE / "setup_kubernetes.sh"
FAKE = programs.ROOT / "tests_ops/fake_kubectl.py"
KEY = '{"id": "q3k9x0ab"}\n'
KEPT = {"Namespace", "PersistentVolumeClaim"}
STARTED_BY_PEOPLE = {"PyTorchJob", "TrainJob", "TrainingRuntime"}

Answers = list[tuple[str, int, str]]


class Cluster:
    """What the script sees of a cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        kubectl = folder / "bin/kubectl"
        kubectl.parent.mkdir()
        kubectl.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {FAKE} "$@"\n')
        kubectl.chmod(0o755)

    def run(self, *words: object, answers: Answers = [], stdin: str = "") -> "subprocess.CompletedProcess[str]":  # noqa: B006
        (self.folder / "answers.json").write_text(json.dumps(answers))
        (self.folder / "calls.jsonl").write_text("")
        environment = os.environ | {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "FAKE_KUBECTL": str(self.folder),
            "REAL_KUBECTL": shutil.which("kubectl") or "",
        }
        return programs.run("bash", SCRIPT, *words, env=environment, input=stdin, timeout=60)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def calls(self) -> list[str]:
        return [record["call"].removeprefix("--namespace ldm3d ") for record in self.records]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    programs.need("kubectl")
    return Cluster(tmp_path)


def test_linters_find_nothing() -> None:
    for linter in (["shellcheck"], ["shfmt", "-d", "-i", "2", "-ci"]):
        done = programs.run(programs.tool(linter[0]), *linter[1:], SCRIPT)
        assert done.returncode == 0, done.stdout


def test_apply_makes_everything_in_order_and_waits(cluster: Cluster) -> None:
    done = cluster.run("apply", "cpu", answers=[("keys list", 0, KEY)])
    assert done.returncode == 0, done.stderr
    assert cluster.calls == [
        "version",
        "get namespace ldm3d --ignore-not-found --output name",
        f"apply --filename {BASE}/namespace.yaml",
        "get secret ldm3d-redis --ignore-not-found --output name",
        "create secret generic ldm3d-redis --from-file=password=/dev/stdin",
        "label --overwrite secret ldm3d-redis app.kubernetes.io/part-of=ldm3d",
        "apply --filename -",
        "rollout status deployment/ldm3d-redis --timeout=15m",
        "rollout status deployment/ldm3d-worker --timeout=15m",
        "rollout status deployment/ldm3d-monitor --timeout=15m",
        "exec deployment/ldm3d-worker -- python -m mlops.api.keys list",
        "rollout status deployment/ldm3d-api --timeout=15m",
    ]
    rendered = programs.run("kubectl", "kustomize", BASE.parent / "kubernetes-overlays/cpu").stdout
    applied = next(record["stdin"] for record in cluster.records if record["call"] == "apply --filename -")
    assert applied.strip() == rendered.strip()


def test_apply_makes_a_password_that_fits_into_an_address_and_another_each_time(cluster: Cluster) -> None:
    passwords = set()
    for _ in range(2):
        cluster.run("apply")
        [password] = [record["stdin"] for record in cluster.records if "create secret" in record["call"]]
        assert len(password) == 64
        assert set(password) <= set("0123456789abcdef")
        passwords.add(password)
    assert len(passwords) == 2


def test_apply_keeps_a_password_that_is_there(cluster: Cluster) -> None:
    assert cluster.run("apply", answers=[("get secret", 0, "secret/ldm3d-redis\n")]).returncode == 0
    assert not [call for call in cluster.calls if call.startswith(("create", "delete"))]


def test_apply_does_not_touch_a_namespace_that_is_there(cluster: Cluster) -> None:
    """Rights in a namespace, as Azure's RBAC Admin has them, end there; the overlay's own is the same as before."""
    assert cluster.run("apply", answers=[("get namespace", 0, "namespace/ldm3d\n")]).returncode == 0
    assert not [call for call in cluster.calls if "namespace.yaml" in call]


def test_apply_leaves_secrets_to_the_vault(cluster: Cluster) -> None:
    assert cluster.run("apply", "azure-keyvault").returncode == 0
    assert not [call for call in cluster.calls if "secret" in call]


def test_without_a_key_apply_says_how_to_make_one(cluster: Cluster) -> None:
    done = cluster.run("apply")
    assert done.returncode == 0
    assert "exec deployment/ldm3d-worker" in done.stderr
    assert "keys create --name admin --role admin" in done.stderr
    assert "rollout status deployment/ldm3d-api --timeout=15m" not in cluster.calls


def test_with_a_provider_apply_needs_no_key(cluster: Cluster) -> None:
    provider = ("set env", 0, "MODE=api\nLDM3D_OIDC_ISSUER=https://login.example.org\n")
    done = cluster.run("apply", answers=[provider])
    assert (done.returncode, cluster.calls[-1]) == (0, "rollout status deployment/ldm3d-api --timeout=15m")
    assert "no key" not in done.stderr


@pytest.mark.parametrize(
    ("failing", "step"),
    [
        ("^version", "the cluster answers"),
        ("get namespace", "namespace ldm3d"),
        ("namespace.yaml", "namespace ldm3d"),
        ("get secret", "a password for Redis"),
        ("create secret", "a password for Redis"),
        ("label --overwrite", "a password for Redis"),
        ("apply --filename -", "everything of"),
        ("rollout status deployment/ldm3d-redis", "ldm3d-redis runs"),
        ("rollout status deployment/ldm3d-worker", "ldm3d-worker runs"),
        ("keys list", "keys"),
        ("set env", "keys"),
        ("rollout status deployment/ldm3d-api", "ldm3d-api runs"),
    ],
)
def test_apply_stops_at_the_first_failure_and_names_it(cluster: Cluster, failing: str, step: str) -> None:
    keys = [] if failing == "set env" else [("keys list", 0, KEY)]
    done = cluster.run("apply", answers=[(failing, 1, "the server says no\n"), *keys])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {step}")
    assert last.endswith("nothing after it was done")
    assert "the server says no" in done.stderr
    assert failing.lstrip("^") in cluster.calls[-1]


def test_an_overlay_that_cannot_be_built_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    done = cluster.run("apply", tmp_path / "mine")
    assert done.returncode == 1
    assert "kustomize cannot build it; nothing was done" in done.stderr
    assert cluster.calls == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "say what to do"),
        (["install"], "unknown command: install"),
        (["apply", "tpu"], "tpu: no overlay"),
        (["apply", "cpu", "gpu"], "unknown argument: gpu"),
        (["status", "api"], "unknown argument: api"),
        (["logs", "--tail"], "unknown option: --tail"),
        (["delete", "--all"], "unknown argument: --all"),
    ],
)
def test_a_mistake_is_one_line(cluster: Cluster, words: list[str], text: str) -> None:
    done = cluster.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {text}")
    assert done.stderr.count("\n") == 1
    assert cluster.calls == []


def test_help_names_every_overlay_and_component(cluster: Cluster) -> None:
    shown = cluster.run("--help").stdout
    components = {found["metadata"]["labels"].get("app.kubernetes.io/component") for found in render("gpu")}
    for word in ("cpu", "gpu", "azure-keyvault", *(components - {None, "storage"})):
        assert word in shown


def test_status_shows_what_is_there_and_fails_where_nothing_is(cluster: Cluster) -> None:
    there = [("get deployments --sel", 0, "deployment.apps/ldm3d-api\n"), ("get deployments,pods", 0, "NAME READY\n")]
    done = cluster.run("status", answers=there)
    assert (done.returncode, done.stdout) == (0, "NAME READY\n")
    done = cluster.run("status")
    assert done.returncode == 1
    assert "nothing of the service is in namespace ldm3d" in done.stderr
    assert cluster.run("status", answers=[("get deployments", 1, "no route\n")]).returncode == 1
    assert cluster.run("status", answers=[*there[:1], ("get deployments,pods", 1, "gone\n")]).returncode == 1


def test_viewers_may_ask_what_status_and_logs_ask(cluster: Cluster) -> None:
    cluster.run("status", answers=[("get deployments --sel", 0, "one\n")])
    asked = set(cluster.calls[-1].split()[1].split(","))
    rules = get(render("gpu"), "Role", "ldm3d-viewer")["rules"]
    assert asked | {"pods/log"} <= {resource for rule in rules for resource in rule["resources"]}


def test_health_is_that_all_run_and_the_service_can_work(cluster: Cluster) -> None:
    done = cluster.run("health")
    assert (done.returncode, done.stdout) == (0, "the service can work\n")
    assert cluster.calls == [
        *(f"rollout status deployment/ldm3d-{name} --timeout=5s" for name in ("redis", "worker", "monitor", "api")),
        "exec deployment/ldm3d-api -- python mlops/docker/health_check.py --ready",
    ]


@pytest.mark.parametrize("failing", ["deployment/ldm3d-redis", "deployment/ldm3d-api --timeout", "health_check.py"])
def test_health_fails_where_one_thing_does_and_still_asks_for_the_others(cluster: Cluster, failing: str) -> None:
    done = cluster.run("health", answers=[(failing, 1, "no\n")])
    assert done.returncode == 1
    assert done.stderr.endswith("error: the service is not healthy\n")
    assert len(cluster.calls) == 5


def test_logs_of_all_or_of_one_component(cluster: Cluster) -> None:
    pods = [("get pods", 0, "pod/a\n"), ("logs", 0, "[pod/a] listening\n")]
    done = cluster.run("logs", answers=pods)
    assert (done.returncode, done.stdout) == (0, "[pod/a] listening\n")
    assert cluster.calls[-1] == "logs --selector app.kubernetes.io/part-of=ldm3d --all-containers --prefix --tail=100"
    cluster.run("logs", "worker", "--follow", answers=pods)
    assert "app.kubernetes.io/component=worker" in cluster.calls[-1]
    assert "--follow" in cluster.calls[-1]
    done = cluster.run("logs", "wroker")
    assert done.returncode == 1
    assert "there is no pod with app.kubernetes.io/part-of=ldm3d,app.kubernetes.io/component=wroker" in done.stderr
    assert cluster.run("logs", answers=[*pods[:1], ("logs", 1, "gone\n")]).returncode == 1


def deleted(calls: list[str]) -> set[str]:
    return {kind for call in calls if call.startswith("delete ") for kind in call.split()[1].split(",")}


def test_delete_keeps_the_data(cluster: Cluster) -> None:
    done = cluster.run("delete", stdin="ldm3d\n")
    assert done.returncode == 0, done.stderr
    assert cluster.calls[-1].endswith("--selector app.kubernetes.io/part-of=ldm3d")
    assert not {"persistentvolumeclaims", "namespace", "namespaces", "all"} & deleted(cluster.calls)
    assert "kept: the namespace and its PersistentVolumeClaims" in done.stderr


def test_delete_removes_every_kind_that_an_overlay_makes(cluster: Cluster) -> None:
    custom = "".join(
        f"{kind}\n"
        for kind in (
            *(
                f"{kind}.monitoring.coreos.com"
                for kind in ("servicemonitors", "podmonitors", "prometheusrules", "probes")
            ),
            "secretproviderclasses.secrets-store.csi.x-k8s.io",
        )
    )
    cluster.run("delete", "--yes", answers=[("api-resources", 0, custom)])
    plural = {kind.split(".")[0] for kind in deleted(cluster.calls)}
    made = {found["kind"] for overlay in ALL_OVERLAYS for found in render(overlay)} - KEPT - STARTED_BY_PEOPLE
    for kind in made:
        assert {f"{kind.lower()}s", f"{kind.lower()}es", f"{kind.lower()[:-1]}ies"} & plural, kind
    assert "probes" not in plural


def test_delete_asks_for_no_kind_that_the_cluster_does_not_know(cluster: Cluster) -> None:
    cluster.run("delete", "--yes", answers=[("api-resources", 0, "pods\nservices\n")])
    assert "monitoring.coreos.com" not in " ".join(cluster.calls[1:])
    down = [("api-resources", 1, "")]
    done = cluster.run("delete", "--yes", answers=down)
    assert done.returncode == 1
    assert not deleted(cluster.calls)


@pytest.mark.parametrize("answer", ["", "no\n", "y\n", "default\n"])
@pytest.mark.parametrize("words", [["delete"], ["delete", "--data"]])
def test_delete_asks_first(cluster: Cluster, words: list[str], answer: str) -> None:
    done = cluster.run(*words, stdin=answer, answers=[("current-context", 0, "kind-lab\n")])
    assert done.returncode == 1
    assert "kind-lab" in done.stderr
    assert "not confirmed; nothing was deleted" in done.stderr
    assert cluster.calls == ["config current-context"]


def test_delete_with_data_removes_the_namespace(cluster: Cluster) -> None:
    assert cluster.run("delete", "--data", stdin="ldm3d\n").returncode == 0
    assert cluster.calls == ["config current-context", "delete namespace ldm3d --ignore-not-found"]
    done = cluster.run("delete", "--data", "--yes", answers=[("delete", 1, "forbidden\n")])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: namespace ldm3d with everything in it: failed")


def test_the_real_kubectl_understands_every_call(cluster: Cluster) -> None:
    """It gets as far as asking a server, which is not there."""
    calls = set()
    for words in (
        ["apply"],
        ["status"],
        ["health"],
        ["logs", "api", "-f"],
        ["delete", "--yes"],
        ["delete", "--data", "--yes"],
    ):
        there = [("get (deployments --sel|pods --sel)", 0, "one\n"), ("keys list", 0, KEY)]
        cluster.run(*words, answers=there)
        calls |= {record["call"] for record in cluster.records}
    assert len(calls) > 15
    nowhere = ["--server=http://127.0.0.1:9", "--request-timeout=2s"]
    processes = {
        call: subprocess.Popen(
            ["kubectl", *nowhere, *call.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for call in calls
    }
    manifest = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\n"
    for call, process in processes.items():
        said = process.communicate(manifest, timeout=60)[0]
        assert "refused" in said, f"{call}: {said}"


def test_a_call_that_kubectl_does_not_understand_would_be_seen() -> None:
    programs.need("kubectl")
    done = programs.run("kubectl", "--server=http://127.0.0.1:9", "get", "pods", "--selecter", "a=b")
    assert "refused" not in done.stdout + done.stderr
