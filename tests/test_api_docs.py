"""docs/API.md: its commands and its client are run as they stand, its tables are those of the code."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import nibabel as nib
import pytest
from documents import FENCE, blocks, section
from prometheus_client.metrics import MetricWrapperBase
from service import ROOT, Service, models_yaml, publish, running

from mlops.api import metrics, tracing
from mlops.api import settings as settings_module
from mlops.api.problems import TITLES, WHY
from mlops.api.security import ACCESS
from mlops.api.settings import PREFIX, Settings

DOCUMENT = ROOT / "docs" / "API.md"
TEXT = DOCUMENT.read_text()
ADDRESS = "http://127.0.0.1:8000"
MARK = "==== end of example"


class Example(NamedTuple):
    """Commands, and what the document says that they answer."""

    commands: str
    answer: str


def examples() -> list[Example]:
    """Blocks with curl, each with the text block right below it."""
    found = []
    for fence in FENCE.finditer(TEXT):
        if fence[2] == "bash" and "curl" in fence[3]:
            after = re.match(r"\n+```text\n(.*?)^```$", TEXT[fence.end() :], re.DOTALL | re.MULTILINE)
            found.append(Example(fence[3], after[1] if after else ""))
    return found


def rows(heading: str) -> list[list[str]]:
    """The first table below a heading, without its own heading."""
    table = re.search(r"(?:^\|.*\n)+", section(TEXT, heading), re.MULTILINE)
    assert table
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table[0].splitlines()[2:]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """As the document's reader has it: a model called demo, and a key."""
    folder = tmp_path_factory.mktemp("service")
    versions = {"1": {"weights": str(publish(folder / "weights"))}}
    content = models_yaml(folder / "models.yaml", versions).read_text()
    (folder / "models.yaml").write_text(content.replace('"tiny"', '"demo"'))
    service = Service(folder)
    service.key = service.make_key("admin")
    try:
        yield service.start()
    finally:
        service.stop()


@pytest.fixture(scope="module")
def openapi(service: Service) -> dict[str, Any]:
    return dict(httpx.get(f"{service.url}/openapi.json").json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is."""
    return tmp_path_factory.mktemp("shell")


@pytest.fixture(scope="module")
def answers(service: Service, folder: Path) -> list[str]:
    """What all commands answer, run in one shell in the document's order."""
    for program in ("bash", "curl", "jq"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian's package {program})")
    script = f"\necho; echo '{MARK}'\n".join(example.commands for example in examples())
    # Nothing is changed but the address, and that an error is one: the shell stops there.
    script = script.replace(ADDRESS, service.url).replace("curl ", "curl --fail-with-body -sS ")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={**os.environ, "KEY": service.key},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return result.stdout.split(MARK)


def names(text: str) -> set[str]:
    """Names of JSON members, of events, and of metrics."""
    return set(re.findall(r'"(\w+)":|^event: (\w+)|^(\w+)\{', text, re.MULTILINE))


@pytest.mark.parametrize("number", range(len(examples())), ids=lambda n: examples()[n].commands.split("\n")[0][:50])
def test_commands_answer_what_is_shown(answers: list[str], number: int) -> None:
    shown = examples()[number].answer
    assert names(shown) <= names(answers[number]), answers[number]
    words = [word for word in re.findall(r'"\w+": ("[a-z]+"|\d\d?\b|true|null|\[\])', shown) if word != '"queued"']
    assert [word for word in words if not re.search(rf":\s*{re.escape(word)}", answers[number])] == []


def test_a_download_goes_on(answers: list[str], folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["again.nii.gz", "brain.nii.gz", "brain.png"]
    assert len((folder / "brain.nii.gz").read_bytes()) > 1000
    assert (folder / "again.nii.gz").read_bytes() == (folder / "brain.nii.gz").read_bytes()


def test_the_commands_of_the_readme_give_a_brain(tmp_path: Path) -> None:
    """Without a key, as `make serve` starts it."""
    (commands,) = (b.text for b in blocks((ROOT / "README.md").read_text()) if f"{ADDRESS}/v1/samples" in b.text)
    with running(tmp_path) as service:
        command = ["bash", "-euo", "pipefail", "-c", commands.replace(ADDRESS, service.url)]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert nib.load(tmp_path / "brain.nii.gz").shape == (16, 16, 16)


def test_the_client_is_run_as_shown(service: Service, tmp_path: Path) -> None:
    (program,) = (block.text for block in blocks(TEXT) if block.language == "python")
    result = subprocess.run(
        [sys.executable, "-c", program.replace(ADDRESS, service.url)],
        env={**os.environ, "KEY": service.key, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (said,) = re.findall(r"print\(error\)  # (.*)", program)
    *paths, error = result.stdout.splitlines()
    assert error == said
    assert len(paths) == 6
    assert all((tmp_path / path).stat().st_size for path in paths)


def test_the_shown_problem_is_what_is_said(service: Service) -> None:
    (shown,) = (block.text for block in blocks(section(TEXT, "Errors")) if block.language == "text")
    with service.client() as client:
        assert client.post("/v1/samples", json={"steps": 5000}).json() == json.loads(shown)


def test_all_routes_are_shown_with_their_roles_and_an_example() -> None:
    shown = {(method, path.strip("`")): role for method, path, role, _ in rows("Routes")}
    assert shown == {route: str(role) if role else "open" for route, role in ACCESS.items()}
    commands = "".join(example.commands for example in examples())
    for method, path in ACCESS:
        called = re.escape(ADDRESS + path).replace(r"\{id\}", r"\$JOB").replace(r"\{name\}", r"\S+")
        option = "" if method == "GET" else f"-X {method} "
        assert re.search(rf'curl (-N |-o \S+ )?{option}"?{called}["?/\s]', commands), (method, path)


def test_fields_of_a_request_are_those_of_the_schema(openapi: dict[str, Any]) -> None:
    asked = openapi["components"]["schemas"]["SampleRequest"]["properties"]
    shown = {name.strip("`"): default.strip("`") for name, default, _ in rows("`POST /v1/samples`")}
    assert set(shown) == set(asked)
    for name, schema in asked.items():
        if schema.get("default"):
            assert shown[name] == str(schema["default"])


def test_statuses_are_those_that_are_declared(openapi: dict[str, Any]) -> None:
    operations = [operation for path in openapi["paths"].values() for operation in path.values()]
    declared = {int(status) for operation in operations for status in operation["responses"]}
    assert rows("Errors") == [[str(s), TITLES[s], why.removesuffix(".")] for s, why in WHY.items()]
    assert {int(row[0]) for row in rows("Errors")} == {status for status in declared if status >= 400}
    other_numbers = (section(TEXT, "Settings"), section(TEXT, "What it costs"))
    text = FENCE.sub("", TEXT.replace(other_numbers[0], "").replace(other_numbers[1], ""))
    named = {int(number) for number in re.findall(r"(?<![\w.,-])[2-5]\d\d(?!\w|[.,]\d)", text)}
    # 405 is said of every path, where OpenAPI says what each takes.
    assert named - declared - {405} == set()
    assert {200, 202, 204, 206, 404, 422, 429} <= named


def documented_settings() -> dict[str, str]:
    """What mlops/api/settings.py says of each setting."""
    (node,) = (n for n in ast.walk(ast.parse(inspect.getsource(settings_module))) if isinstance(n, ast.ClassDef))
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split()).removesuffix(".")
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def test_the_table_of_settings_is_that_of_the_code() -> None:
    said = documented_settings()
    assert set(said) == set(Settings.model_fields)
    expected = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", None, []) else f"`{field.default}`"
        expected.append([f"`{PREFIX}{name.upper()}`", default, said[name]])
    assert rows("Settings") == expected


def test_settings_that_are_named_exist() -> None:
    named = set(re.findall(rf"\b{PREFIX}\w+", TEXT))
    assert named == {PREFIX + name.upper() for name in Settings.model_fields}


def test_the_tables_of_costs_are_what_was_measured() -> None:
    shown = TEXT.split("<!-- service table -->\n")[1].split("\n<!-- /service table -->")[0]
    assert shown == (ROOT / "benchmarks" / "results" / "api.md").read_text().rstrip()


def test_the_metrics_are_those_that_are_served() -> None:
    served = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            served[metric.describe()[0].name] = set(metric._labelnames)
    described = {}
    for names, labels, _ in rows("Figures"):
        described |= {name: set(re.findall(r"`(.+?)`", labels)) for name in re.findall(r"`(.+?)`", names)}
    assert described == served


def test_the_variables_of_traces_are_those_that_are_read() -> None:
    named = {name for names, _ in rows("Traces") for name in re.findall(r"`(.+?)`", names)}
    assert {*tracing.ENDPOINTS, tracing.EXPORTER, "OTEL_SERVICE_NAME"} < named
    assert all(name.startswith("OTEL_") for name in named)
