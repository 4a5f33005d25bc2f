"""What makes each alert fire and what does not, told once: for promtool's unit tests, and for an exporter that a real
Prometheus scrapes.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from programs import ROOT

RULES = ROOT / "mlops/monitoring/alerting_rules.yml"
V = 'model="demo",version="1"'


class Series(NamedTuple):
    """A line: `start` plus `slope` for each minute; a time, which is `start` seconds from now, if `is_time`."""

    name: str
    start: float
    slope: float = 0
    is_time: bool = False


Lines = list[Series]


def _up(job: str, value: float) -> Lines:
    return [Series(f'up{{job="{job}"}}', value)]


def _requests(**slopes: float) -> Lines:
    labels = 'method="GET",route="/v1/jobs"'
    return [
        Series(f'ldm3d_http_requests_total{{{labels},status="{name[1:]}"}}', 0, slope) for name, slope in slopes.items()
    ]


def _buckets(name: str, labels: str, **slopes: float) -> Lines:
    return [
        Series(f'{name}_bucket{{{labels},le="{le[2:].replace("_", ".").replace("Inf", "+Inf")}"}}', 0, slope)
        for le, slope in slopes.items()
    ]


def _jobs(done: float, failed: float) -> Lines:
    labels = f'{V},shadow="no"'
    return [
        Series(f'ldm3d_jobs_ended_total{{{labels},state="{state}"}}', 0, slope)
        for state, slope in (("done", done), ("failed", failed))
    ]


def _queue(waiting: float, running: float) -> Lines:
    values = {"ldm3d_queue_jobs": waiting, "ldm3d_running_jobs": running, "ldm3d_queue_limit_jobs": 100}
    return [Series(name, value) for name, value in values.items()]


def _workers(idle: float) -> Lines:
    states = {"starting": 1, "idle": idle, "busy": 0, "asleep": 0}
    return [Series(f'ldm3d_workers{{state="{state}"}}', value) for state, value in states.items()]


def _memory(device: str, used: float) -> Lines:
    return [
        Series(f'ldm3d_device_memory_used_bytes{{device="{device}"}}', used),
        Series(f'ldm3d_device_memory_total_bytes{{device="{device}"}}', 100),
    ]


def _quality(name: str, value: float, volumes: float = 20, labels: str = V) -> Lines:
    return [
        Series(f"ldm3d_quality_{name}{{{labels}}}", value),
        Series(f"ldm3d_quality_window_volumes{{{V}}}", volumes),
    ]


def _bad(slope: float) -> Lines:
    return [Series(f'ldm3d_quality_bad_volumes_total{{{V},fault="damaged"}}', 0, slope)]


_SLOW = ("ldm3d_http_request_seconds", 'route="/v1/jobs"')
_FILES = ("ldm3d_http_request_seconds", 'route="/v1/jobs/{id}/files/{name}"')
_BRAIN = f'{V},feature="brain_volume_ml"'

CASES: dict[str, tuple[Lines, list[Lines]]] = {
    "Ldm3dServiceDown": (_up("ldm3d-api", 0), [_up("ldm3d-api", 1)]),
    "Ldm3dNotReady": ([Series("ldm3d_ready", 0)], [[Series("ldm3d_ready", 1)]]),
    "Ldm3dNoWorker": (_workers(0), [_workers(1)]),
    "Ldm3dQueueLong": (_queue(80, 1), [_queue(79, 1)]),
    "Ldm3dQueueOld": (
        [Series("ldm3d_queue_oldest_seconds", 1801)],
        [[Series("ldm3d_queue_oldest_seconds", 1799)]],
    ),
    "Ldm3dJobsFail": (_jobs(94, 6), [_jobs(96, 4), _jobs(0, 0)]),
    "Ldm3dServerErrors": (
        _requests(s200=97, s500=3),
        [
            _requests(s200=99, s500=1),
            [*_requests(s200=1), Series('ldm3d_http_requests_total{route="/ready",status="503"}', 0, 9)],
        ],
    ),
    "Ldm3dRequestsSlow": (
        _buckets(*_SLOW, le1_0=98, le2_5=100, leInf=100),
        [
            _buckets(*_SLOW, le1_0=99.5, le2_5=100, leInf=100),
            [*_buckets(*_FILES, le1_0=0, le2_5=9, leInf=9), *_buckets(*_SLOW, le1_0=9, le2_5=9, leInf=9)],
        ],
    ),
    "Ldm3dJobsSlow": (
        _buckets("ldm3d_job_seconds", V, le600_0=89, le1800_0=100, leInf=100),
        [_buckets("ldm3d_job_seconds", V, le600_0=91, le1800_0=100, leInf=100)],
    ),
    "Ldm3dRequestsRefused": (_requests(s200=89, s429=11), [_requests(s200=91, s429=9)]),
    "Ldm3dKeysRefused": (_requests(s401=40, s403=22), [_requests(s401=30, s403=28)]),
    "Ldm3dResultsFull": (
        [Series("ldm3d_results_bytes", 91), Series("ldm3d_results_limit_bytes", 100)],
        [[Series("ldm3d_results_bytes", 89), Series("ldm3d_results_limit_bytes", 100)]],
    ),
    "Ldm3dDiskFull": (
        [Series("ldm3d_data_free_bytes", 2e9)],
        [[Series("ldm3d_data_free_bytes", 2.2e9)]],
    ),
    "Ldm3dAuditFails": ([Series("ldm3d_audit_failed", 1)], [[Series("ldm3d_audit_failed", 0)]]),
    "Ldm3dReloadFailed": ([Series("ldm3d_reload_failed", 1)], [[Series("ldm3d_reload_failed", 0)]]),
    "Ldm3dWorkerDown": (_up("ldm3d-worker", 0), [_up("ldm3d-worker", 1)]),
    "Ldm3dWorkerMemory": (_memory("cpu", 93), [_memory("cpu", 91)]),
    "Ldm3dDeviceMemory": (_memory("cuda:0", 96), [_memory("cuda:0", 94)]),
    "Ldm3dMonitorDown": (_up("ldm3d-monitor", 0), [_up("ldm3d-monitor", 1)]),
    "Ldm3dMonitorStuck": (
        [Series("ldm3d_quality_last_look_timestamp_seconds", -1300, is_time=True)],
        [[Series("ldm3d_quality_last_look_timestamp_seconds", -1100, is_time=True)]],
    ),
    "Ldm3dVolumesBad": (_bad(1), [_bad(0)]),
    "Ldm3dNoReference": (_quality("reference", 0), [_quality("reference", 1)]),
    "Ldm3dQualityFar": (
        _quality("reference_distance", 1.6),
        [_quality("reference_distance", 1.4), _quality("reference_distance", 1.6, 19)],
    ),
    "Ldm3dBrainsOff": (
        _quality("deviation", -2.1, labels=_BRAIN),
        [_quality("deviation", -1.9, labels=_BRAIN), _quality("deviation", 2.1, 19, _BRAIN)],
    ),
    "Ldm3dDiversityLow": (
        _quality("diversity_ratio", 0.39),
        [_quality("diversity_ratio", 0.41), _quality("diversity_ratio", 0.39, 19)],
    ),
    "Ldm3dDataDrift": ([Series("ldm3d_drift_detected", 1)], [[Series("ldm3d_drift_detected", 0)]]),
    "Ldm3dDriftUnknown": (
        [Series("ldm3d_drift_last_run_timestamp_seconds", -8.2 * 86400, is_time=True)],
        [[Series("ldm3d_drift_last_run_timestamp_seconds", -7.8 * 86400, is_time=True)]],
    ),
    "Ldm3dBackupOld": (
        [Series("ldm3d_backup_last_success_timestamp_seconds", -2.1 * 86400, is_time=True)],
        [[Series("ldm3d_backup_last_success_timestamp_seconds", -1.9 * 86400, is_time=True)]],
    ),
    "Ldm3dAuditDamaged": (
        [Series("ldm3d_backup_audit_intact", 0)],
        [[Series("ldm3d_backup_audit_intact", 1)]],
    ),
}
"""Alert -> what fires it, and what stays just below each of its limits."""

MINUTES = 65
"""Longer than any `for`."""
_DURATION = re.compile(r"\b(\d+)([smhd])\b")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def rules() -> dict[str, dict[str, Any]]:
    """The alerts of the real file by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


class Case(NamedTuple):
    """What an alert is to do with some series."""

    alert: str
    lines: Lines
    fires: bool

    @property
    def metrics(self) -> set[str]:
        return {line.name.partition("{")[0] for line in self.lines}


def promtool_test(rules_file: Path, *only: str) -> dict[str, Any]:
    """A file for `promtool test rules`: each alert (or those named) fires where it should, and not below."""
    cases = [
        Case(alert, lines, fires)
        for alert, (firing, quiet) in CASES.items()
        if not only or alert in only
        for lines, fires in ((firing, True), *((lines, False) for lines in quiet))
    ]
    return {
        "rule_files": [str(rules_file)],
        "evaluation_interval": "1m",
        "tests": [_unit_test(group) for group in _together(cases)],
    }


def _together(cases: list[Case]) -> list[list[Case]]:
    """Cases in as few groups as share no metric: promtool evaluates all rules for each group."""
    groups: list[list[Case]] = []
    for case in cases:
        free = (g for g in groups if not any(case.metrics & other.metrics or case.alert == other.alert for other in g))
        group = next(free, None)
        if group is None:
            groups.append(group := [])
        group.append(case)
    return groups


def _unit_test(cases: list[Case]) -> dict[str, Any]:
    """That an alert fires is compared, not the words of its annotations; nothing fires at the first look."""
    series, expected = [], []
    for case in cases:
        series += [{"series": line.name, "values": _values(line)} for line in case.lines]
        count = f'count(ALERTS{{alertname="{case.alert}",alertstate="firing"}})'
        samples = [{"labels": "{}", "value": 1}] if case.fires else []
        expected.append({"expr": count, "eval_time": f"{MINUTES}m", "exp_samples": samples})
        expected.append({"expr": count, "eval_time": "0m", "exp_samples": []})
    return {"interval": "1m", "input_series": series, "promql_expr_test": expected}


def _values(line: Series) -> str:
    slope = 60 if line.is_time else line.slope
    return f"{line.start}+{slope}x{MINUTES}"


def hurried(times: float) -> dict[str, Any]:
    """The real rules with `for` and ranges shortened; nothing else is changed."""
    content: dict[str, Any] = yaml.safe_load(RULES.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            rule["for"] = _shortened(rule["for"], times)
            rule["expr"] = re.sub(r"\[[^]]+\]", lambda found: _shortened(found[0], times), rule["expr"])
    return content


def _shortened(text: str, times: float) -> str:
    return _DURATION.sub(lambda found: f"{max(1000, int(1000 * int(found[1]) * _SECONDS[found[2]] / times))}ms", text)
