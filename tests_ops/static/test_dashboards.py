"""The dashboards: what Grafana's own models read of them is what they say, and every query asks for what is served."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import alerts
import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from programs import ROOT
from prometheus_client import REGISTRY, CollectorRegistry

from mlops.api import metrics
from mlops.monitoring import quality_metrics

FILES = sorted((ROOT / "mlops/monitoring/grafana").glob("*.json"))
VARIABLES = {"$__rate_interval": "5m", "$model": ".*"}
# What Prometheus itself adds to all that it scrapes.
SCRAPED = {"job", "instance", "le"}
UNITS = {"none", "s", "bytes", "percentunit", "reqps", "mlitre"}


def served() -> dict[str, set[str] | None]:
    """Metric -> its labels, of all that service and monitor serve; and what single runs send, without labels."""
    assert metrics and quality_metrics
    found: dict[str, set[str] | None] = {"up": set()}
    for registry in (REGISTRY, quality_metrics.REGISTRY):
        found |= _of(registry)
    for path in [*(ROOT / "mlops/monitoring").glob("*drift*.py"), *(ROOT / "mlops").glob("backup*/**/*.py")]:
        found |= dict.fromkeys(re.findall(r"\bldm3d_(?:drift|backup)_\w+", path.read_text()))
    return found


def _of(registry: CollectorRegistry) -> dict[str, set[str] | None]:
    found: dict[str, set[str] | None] = {}
    for collector, names in registry._collector_to_names.items():
        for name in names:
            if name.startswith("ldm3d_"):
                found[name] = set(getattr(collector, "_labelnames", ()))
    return found


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """Metric and labels of each selector of a query; labels of its groupings go with each metric."""
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    selectors: list[tuple[str, set[str]]] = []
    grouped: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            grouped.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    for name, labels in selectors:
        yield name, labels | grouped


def query_faults(query: str) -> list[str]:
    known = served()
    try:
        uses = list(asked(query))
    except ValueError as error:
        return [f"{query}: is no PromQL: {error}"]
    found = [f"{name}: nobody serves it" for name, _ in uses if name not in known]
    for name, labels in uses:
        has = known.get(name)
        if has is not None and (strange := labels - has - SCRAPED):
            found.append(f"{name}: has no label {', '.join(sorted(strange))}")
    return found


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def faults(board: dict[str, Any]) -> list[str]:
    """What Grafana would not show, or a reader not understand."""
    if unread := lost_in_models(board):
        return [unread]
    found = []
    for panel in panels(board):
        name = panel.get("title", "")
        if not name or not panel.get("description"):
            found.append(f"panel {panel['id']}: has no title or no description")
        defaults = panel["fieldConfig"]["defaults"]
        if defaults.get("unit") not in UNITS:
            found.append(f"{name}: unit {defaults.get('unit')} is none of {sorted(UNITS)}")
        if panel["type"] == "stat" and len(defaults["thresholds"]["steps"]) < 2:
            found.append(f"{name}: no thresholds")
        for target in panel["targets"]:
            found += [f"{name}: {fault}" for fault in query_faults(target["expr"])]
            if not target["legendFormat"] and panel["type"] != "stat":
                found.append(f"{name}: no legend")
            for label in re.findall(r"{{\s*(\w+)", target["legendFormat"]):
                if label not in SCRAPED and not any(label in labels(name) for name, _ in safe_asked(target["expr"])):
                    found.append(f"{name}: the legend names {label}, which is no label")
    places = [panel["gridPos"] for panel in board["panels"]]
    if any(_overlap(a, b) for i, a in enumerate(places) for b in places[:i]):
        found.append("panels lie over each other")
    if len({panel["id"] for panel in board["panels"]}) != len(board["panels"]):
        found.append("two panels have one id")
    return found


def labels(metric: str) -> set[str]:
    has = served().get(metric, set())
    return {"feature", "state"} if has is None else has


def safe_asked(query: str) -> list[tuple[str, set[str]]]:
    try:
        return list(asked(query))
    except ValueError:
        return []


def _overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return all(a[x] < b[x] + b[n] and b[x] < a[x] + a[n] for x, n in (("x", "w"), ("y", "h")))


def lost_in_models(board: dict[str, Any]) -> str | None:
    """What the models of Grafana 10.1 do not know or understand otherwise; None where nothing is."""
    try:
        again = json.loads(json.dumps(Dashboard.from_json(copy.deepcopy(board)), cls=JSONEncoder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"Grafana's models cannot read it: {error!r}"
    return next(lost(board, again), None)


def lost(given: Any, read: Any, place: str = "") -> Iterator[str]:
    """What was given and is not there any more, or is another value."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            if key not in read:
                if value not in (None, [], {}, ""):
                    yield f"{place}.{key}: Grafana does not know it"
            else:
                yield from lost(value, read[key], f"{place}.{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for i, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{place}[{i}]")
    elif given != read:
        yield f"{place}: {given!r} is read as {read!r}"


def test_both_dashboards_are_there() -> None:
    boards = [json.loads(path.read_text()) for path in FILES]
    assert [board["uid"] for board in boards] == ["ldm3d-operations", "ldm3d-quality"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dashboard_has_no_faults(path: Any) -> None:
    assert faults(json.loads(path.read_text())) == []


def test_rules_ask_for_what_is_served() -> None:
    assert [fault for rule in alerts.rules().values() for fault in query_faults(rule["expr"])] == []


Board = dict[str, Any]
BROKEN: dict[str, Callable[[Board], Any]] = {
    "nobody serves it": lambda b: panels(b)[0]["targets"][0].update(expr="max(ldm3d_redy)"),
    "is no PromQL": lambda b: panels(b)[0]["targets"][0].update(expr="max(ldm3d_ready"),
    "has no label": lambda b: panels(b)[0]["targets"][0].update(expr='ldm3d_ready{colour="red"}'),
    "the legend names": lambda b: panels(b)[6]["targets"][0].update(legendFormat="{{colour}}"),
    "no legend": lambda b: panels(b)[6]["targets"][0].update(legendFormat=""),
    "unit": lambda b: panels(b)[0]["fieldConfig"]["defaults"].update(unit="furlongs"),
    "no title": lambda b: panels(b)[0].update(title=""),
    "no thresholds": lambda b: panels(b)[0]["fieldConfig"]["defaults"]["thresholds"].update(steps=[]),
    "Grafana does not know it": lambda b: panels(b)[0].update(colour="red"),
    "cannot read it": lambda b: panels(b)[0].update(gridPos=7),
    "over each other": lambda b: panels(b)[0]["gridPos"].update(panels(b)[1]["gridPos"]),
    "one id": lambda b: panels(b)[0].update(id=panels(b)[1]["id"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_dashboard_is_noticed(fault: str) -> None:
    board = json.loads((ROOT / "mlops/monitoring/grafana/operations.json").read_text())
    BROKEN[fault](board)
    assert any(fault in said for said in faults(board)), faults(board)
