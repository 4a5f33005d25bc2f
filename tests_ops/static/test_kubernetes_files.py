"""The manifests, judged by their schemas, by checkov, and by what the schemas miss."""

import json
import shutil
from pathlib import Path

import programs
import pytest
import yaml
from kubernetes_faults import faults
from kubernetes_objects import ALL_OVERLAYS, BASE, OVERLAYS, get, of_kind, render

from mlops.api.models_file import read_models
from mlops.kubernetes.write_rules import MONITORING, RULES, with_rules

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="not installed: Debian's kubernetes-client")


@pytest.mark.parametrize("overlay", ALL_OVERLAYS)
def test_nothing_is_wrong(overlay: str) -> None:
    assert faults(render(overlay)) == []


def test_every_overlay_is_judged() -> None:
    assert {path.name for path in OVERLAYS.iterdir()} == {*ALL_OVERLAYS}


def test_only_gpu_overlays_ask_for_what_a_small_cluster_lacks() -> None:
    text = str(render("cpu"))
    assert "nvidia" not in text
    assert "monitoring.coreos.com" not in text
    assert not of_kind(render("cpu"), "HorizontalPodAutoscaler")
    assert {"ReadWriteOnce"} == {
        m for claim in of_kind(render("cpu"), "PersistentVolumeClaim") for m in claim["spec"]["accessModes"]
    }
    assert "nvidia" in str(render("gpu"))


def test_served_models_are_a_list_that_the_service_takes() -> None:
    assert read_models(BASE / "models.yaml").models


def test_alerts_are_those_of_the_monitoring() -> None:
    """To mend it: python mlops/kubernetes/write_rules.py"""
    assert MONITORING.read_text() == with_rules(MONITORING.read_text(), RULES.read_text())
    assert get(render("gpu"), "PrometheusRule", "ldm3d")["spec"] == yaml.safe_load(RULES.read_text())


def test_other_alerts_would_be_noticed() -> None:
    monitoring = with_rules("kind: ServiceMonitor\n", "groups:\n  - name: a\n")
    assert list(yaml.safe_load_all(monitoring))[1]["spec"] == {"groups": [{"name": "a"}]}
    assert with_rules(monitoring, "groups: []\n") != monitoring
    assert with_rules(monitoring, "groups:\n  - name: a\n") == monitoring


HOUR = 3600
CRONJOB = '{namespace="ldm3d",cronjob="ldm3d-backup"}'
BACKUP = {"Ldm3dBackupMissing"}


@pytest.mark.parametrize(
    ("series", "after_hours", "firing"),
    [
        ({'kube_job_failed{namespace="ldm3d",job_name="ldm3d-drift-1",condition="true"}': 1}, 1, {"Ldm3dJobFailed"}),
        ({'kube_job_failed{namespace="ldm3d",job_name="ldm3d-drift-1",condition="true"}': 0}, 1, set()),
        ({'kube_job_failed{namespace="other",job_name="a",condition="true"}': 1}, 1, set()),
        ({f"kube_cronjob_created{CRONJOB}": 0}, 47, set()),
        ({f"kube_cronjob_created{CRONJOB}": 0}, 50, BACKUP),
        (
            {f"kube_cronjob_created{CRONJOB}": 0, f"kube_cronjob_status_last_successful_time{CRONJOB}": 24 * HOUR},
            71,
            set(),
        ),
        (
            {f"kube_cronjob_created{CRONJOB}": 0, f"kube_cronjob_status_last_successful_time{CRONJOB}": 24 * HOUR},
            74,
            BACKUP,
        ),
    ],
)
def test_alerts_of_jobs_fire_when_they_must(
    tmp_path: Path, series: dict[str, int], after_hours: int, firing: set[str]
) -> None:
    """Judged by Prometheus' own tool, on figures as kube-state-metrics has them."""
    programs.need("promtool")
    spec = get(render("gpu"), "PrometheusRule", "ldm3d-jobs")["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    rules = [rule for group in spec["groups"] for rule in group["rules"]]
    checks = [
        {
            "eval_time": f"{after_hours}h",
            "expr": f'count(ALERTS{{alertname="{rule["alert"]}",alertstate="firing"}}) or vector(0)',
            "exp_samples": [{"labels": "{}", "value": int(rule["alert"] in firing)}],
        }
        for rule in rules
    ]
    test = {
        "interval": "5m",
        "input_series": [{"series": name, "values": f"{value}+0x{13 * after_hours}"} for name, value in series.items()],
        "promql_expr_test": checks,
    }
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "5m", "tests": [test]})
    )
    done = programs.run("promtool", "test", "rules", tmp_path / "tests.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_that_is_forgotten_cannot_be_built(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "kubernetes")
    shutil.copytree(OVERLAYS, tmp_path / "kubernetes-overlays")
    (tmp_path / "kubernetes/storage.yaml").unlink()
    done = programs.run("kubectl", "kustomize", tmp_path / "kubernetes-overlays/gpu")
    assert done.returncode != 0
    assert "storage.yaml" in done.stderr


def checkov(text: str, folder: Path) -> list[str]:
    """Failed checks, `CKV_K8S_40 Deployment.ldm3d.ldm3d-api`."""
    path = folder / "rendered.yaml"
    path.write_text(text)
    done = programs.run(programs.CHECKOV, "--config-file", BASE / "checkov.yaml", "--output", "json", "--file", path)
    assert done.stdout.startswith("{"), done.stderr
    failed = json.loads(done.stdout)["results"]["failed_checks"]
    return sorted(f"{check['check_id']} {check['resource']}" for check in failed)


@pytest.mark.skipif(not programs.CHECKOV.exists(), reason="no .venv-checkov: make check-ops makes it")
def test_checkov_finds_nothing_that_is_not_excepted(tmp_path: Path) -> None:
    """One run for what is right and for what is broken: it takes seconds to start."""
    objects = render("gpu")
    broken = get(render("gpu"), "Deployment", "ldm3d-api")
    broken["metadata"]["name"] = "broken"
    broken["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    found = checkov(yaml.safe_dump_all([*objects, broken]), tmp_path)
    assert "CKV_K8S_16 Deployment.ldm3d.broken" in found
    assert [fault for fault in found if not fault.endswith(".broken")] == []
