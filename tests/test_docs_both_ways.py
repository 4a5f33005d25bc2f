"""What the programs have, the documents name: options, metrics, routes, settings; and the other way round."""

import ast
import re
from pathlib import Path
from typing import Any

from document_commands import actions, options_of_module, parser_of, programs, source_of
from document_names import problems_of_routes
from documents import DOCUMENTS, ROOT, each_document, read, words_of_code
from prometheus_client.metrics import MetricWrapperBase

from mlops.api import metrics
from mlops.api.security import ACCESS
from mlops.api.settings import PREFIX, Settings
from mlops.backup.__main__ import METRICS_JOB
from mlops.monitoring import drift_metrics, quality_metrics

# Options of what is started as `python -m`. Those of the scripts: test_docs.py.


def pages_of(module: str) -> str:
    """All that is written of a program: the documents that name it, and what its file begins with."""
    names, source = [module, f"{module.replace('.', '/')}.py"], source_of(module)
    assert source
    texts = [text for text in map(read, DOCUMENTS) if any(name in text for name in names)]
    return "\n".join([*texts, ast.get_docstring(ast.parse(source.read_text())) or ""])


def undocumented(module: str, text: str) -> set[str]:
    """Options of which a text has no spelling."""
    parser = parser_of(module)
    assert parser
    shown = [action for action in actions(parser) if set(action.option_strings) & options_of_module(module)]
    return {
        action.option_strings[-1]
        for action in shown
        if not any(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for option in action.option_strings)
    }


def test_every_option_of_a_program_is_documented() -> None:
    """In a loop, since parameters would have every process import all programs before the first test."""
    missing = {module: undocumented(module, pages_of(module)) for module in programs()}
    assert len(missing) > 35
    assert {module: options for module, options in missing.items() if options} == {}


def silent(module: str) -> list[str]:
    """Options whose `--help` says nothing."""
    parser = parser_of(module)
    assert parser
    return [action.option_strings[-1] for action in actions(parser) if action.option_strings and not action.help]


def test_every_option_says_what_it_is_for() -> None:
    assert {module: options for module in programs() if (options := silent(module))} == {}


def test_an_option_that_no_text_has_is_seen() -> None:
    assert undocumented("mlops.batch", "--no-seeds and --num-") >= {"--seed", "--num"}
    assert undocumented("benchmarks.growth", "--output --tiny") == set()  # what a program gives to itself is for nobody


# Metrics.


def families(text: str) -> set[str]:
    """Names of metrics in a text, without what Prometheus's client adds to them."""
    return {re.sub("_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\bldm3d_[a-z_]+\b", text)}


def served() -> set[str]:
    """All that any of our programs tells Prometheus."""
    comparison = {"name": "latents", "p_value": 1.0, "psi": 0.0, "statistic": 0.0}
    result: dict[str, Any] = {"drifted": [], "alpha": 0.05, "volumes": {"judged": 1, "unreadable": []}}
    drift = drift_metrics.metrics_of({**result, "comparisons": [comparison]})
    wrapped = [m for module in (metrics, quality_metrics) for m in vars(module).values()]
    described = [metric.describe()[0].name for metric in wrapped if isinstance(metric, MetricWrapperBase)]
    backup = re.findall(r'"(ldm3d_backup_\w+)":', (ROOT / "mlops/backup/__main__.py").read_text())
    return {*described, *(family.name for family in drift.collect()), *backup}


def test_every_metric_is_documented() -> None:
    assert len(served()) > 45
    assert served() - set().union(*(families(read(document)) for document in DOCUMENTS)) == set()


# The jobs of the pushgateway, and the network that compose makes.
OTHERS = {drift_metrics.JOB, METRICS_JOB, "ldm3d_tracking"}


@each_document
def test_metrics_that_are_named_exist(document: Path) -> None:
    assert families(read(document)) - served() - OTHERS == set()


def test_metrics_that_do_not_exist_are_seen() -> None:
    assert families("`ldm3d_jobs_lost_total` ldm3d_volumes") - served() == {"ldm3d_jobs_lost"}


# Routes and settings. That docs/API.md has all of them: test_api_docs.py.


def test_the_routes_of_the_service_are_known_to_the_check() -> None:
    assert problems_of_routes(" ".join(path for _, path in ACCESS)) == []


@each_document
def test_settings_that_are_named_exist(document: Path) -> None:
    text = read(document)
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", text)) - set(re.findall(r"(\w+): no such setting", text))
    # Some stand for what is *not* a setting, and are said in the files that they are about.
    assert named - {PREFIX + name.upper() for name in Settings.model_fields} - words_of_code() == set()
