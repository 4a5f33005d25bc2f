"""The alerting rules, by promtool: each alert fires where it should and not below its limit."""

import re
import subprocess
from pathlib import Path
from typing import Any

import alerts
import pytest
import yaml
from programs import ROOT, need, run

ONE = {"labels": "{}", "value": 1}
MONITORING = ROOT / "mlops/monitoring"


def judged(folder: Path, rules: str, *only: str) -> "subprocess.CompletedProcess[str]":
    (folder / "rules.yml").write_text(rules)
    (folder / "test.yml").write_text(yaml.safe_dump(alerts.promtool_test(folder / "rules.yml", *only)))
    return run("promtool", "test", "rules", folder / "test.yml")


def test_each_alert_fires_and_does_not_fire_below_its_limit(tmp_path: Path) -> None:
    need("promtool")
    assert alerts.CASES.keys() == alerts.rules().keys()
    done = judged(tmp_path, alerts.RULES.read_text())
    assert done.returncode == 0, done.stderr


THRESHOLDS = [  # what to change in the file, and the alert that must be missed or cry wolf then
    ("== 0 or absent", "== 2 or absent", "Ldm3dServiceDown"),
    ("> 0.8\n", "> 0.85\n", "Ldm3dQueueLong"),
    ("> 0.8\n", "> 0.75\n", "Ldm3dQueueLong"),
    ("> 1800", "> 1000", "Ldm3dQueueOld"),
    ('state="failed"', 'state="broken"', "Ldm3dJobsFail"),
    ("> 0.05", "> 0.01", "Ldm3dJobsFail"),
    (', route!="/ready"', "", "Ldm3dServerErrors"),
    ('{route!="/v1/jobs/{id}/files/{name}"}', "", "Ldm3dRequestsSlow"),
    ("> 600", "> 6000", "Ldm3dJobsSlow"),
    ('status=~"401|403"', 'status="401"', "Ldm3dKeysRefused"),
    ('device!="cpu"', 'device="gpu"', "Ldm3dDeviceMemory"),
    (" and ldm3d_quality_window_volumes >= 20", "", "Ldm3dQualityFar"),
    ("    and on (model, version) ldm3d_quality_window_volumes >= 20\n", "", "Ldm3dBrainsOff"),
    ("abs(ldm3d_quality_deviation", "(ldm3d_quality_deviation", "Ldm3dBrainsOff"),
    ("> 8 * 86400", "> 80 * 86400", "Ldm3dDriftUnknown"),
    ("ldm3d_audit_failed) == 1", "ldm3d_audit_fails) == 1", "Ldm3dAuditFails"),
    ("for: 2m", "for: 3h", "Ldm3dServiceDown"),
]


@pytest.mark.parametrize(("old", "new", "alert"), THRESHOLDS)
def test_a_wrong_rule_is_noticed(tmp_path: Path, old: str, new: str, alert: str) -> None:
    need("promtool")
    text = alerts.RULES.read_text()
    assert old in text
    done = judged(tmp_path, text.replace(old, new), alert)
    assert done.returncode != 0 and alert in done.stdout + done.stderr


@pytest.mark.parametrize("alert", ["Ldm3dServiceDown", "Ldm3dMonitorDown"])
def test_what_prometheus_does_not_even_know_of_is_missed(tmp_path: Path, alert: str) -> None:
    """On Kubernetes a pod that never was has no `up`, not even 0."""
    need("promtool")
    count = {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": "30m"}
    unit = {"interval": "1m", "input_series": [], "promql_expr_test": [count | {"exp_samples": [ONE]}]}
    test = {"rule_files": [str(tmp_path / "rules.yml")], "evaluation_interval": "1m", "tests": [unit]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    text = alerts.RULES.read_text()
    for rules, found in ((text, True), (text.replace("or absent(", "or vector(0) > absent("), False)):
        (tmp_path / "rules.yml").write_text(rules)
        assert (run("promtool", "test", "rules", tmp_path / "test.yml").returncode == 0) is found


def faults(rules: dict[str, dict[str, Any]], readme: str) -> list[str]:
    """What a person who is woken by an alert would miss."""
    anchors = {heading.lower() for heading in re.findall(r"^#+ (.+)$", readme, re.MULTILINE)}
    found = []
    for name, rule in rules.items():
        said = rule.get("annotations", {})
        found += [f"{name}: no {part}" for part in ("summary", "description", "runbook_url") if not said.get(part)]
        page, _, anchor = said.get("runbook_url", "").partition("#")
        if page != "mlops/monitoring/README.md" or anchor not in anchors:
            found.append(f"{name}: its runbook is not there")
        if rule.get("labels", {}).get("severity") not in ("critical", "warning", "info"):
            found.append(f"{name}: no severity")
    return found


def test_each_alert_says_what_to_do() -> None:
    assert faults(alerts.rules(), (MONITORING / "README.md").read_text()) == []


@pytest.mark.parametrize("part", ["summary", "description", "runbook_url", "severity", "section"])
def test_an_alert_that_says_too_little_is_noticed(part: str) -> None:
    broken, readme = alerts.rules(), (MONITORING / "README.md").read_text()
    broken["Ldm3dNoWorker"]["annotations"].pop(part, None)
    broken["Ldm3dNoWorker"]["labels"].pop(part, None)
    if part == "section":
        readme = readme.replace("# Ldm3dNoWorker", "# Nothing")
    assert any("Ldm3dNoWorker" in fault for fault in faults(broken, readme))


def test_configurations_are_valid(tmp_path: Path) -> None:
    need("promtool", "amtool")
    assert (done := run("promtool", "check", "config", MONITORING / "prometheus.yml")).returncode == 0, done.stderr
    assert (done := run("amtool", "check-config", MONITORING / "alertmanager.yml")).returncode == 0, done.stderr
    for name, old, new, judge in (
        ("prometheus.yml", "scrape_interval: 15s", "scrape_interval: soon", ("promtool", "check", "config")),
        ("alertmanager.yml", "receiver: on-call", "receiver: nobody", ("amtool", "check-config")),
    ):
        text = (MONITORING / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
        (tmp_path / "alerting_rules.yml").write_text(alerts.RULES.read_text())
        assert run(*judge, tmp_path / name).returncode != 0


def test_alertmanager_names_alerts_that_exist() -> None:
    named = re.findall(r"Ldm3d\w+", (MONITORING / "alertmanager.yml").read_text())
    assert named and all(any(alert.startswith(name) for alert in alerts.rules()) for name in named)
