"""deploy_azure.ps1, parsed by a grammar and read for its rules; and that no file holds a secret."""

import re

import azure_powershell as powershell
import pytest
from arm import read_json
from programs import ROOT

AZURE = ROOT / "mlops/azure"
ENVIRONMENTS = ["dev", "staging", "prod"]


SCRIPT = (AZURE / "deploy_azure.ps1").read_text()


def test_the_script_keeps_its_rules() -> None:
    assert powershell.faults(SCRIPT) == []


def test_the_script_has_the_three_parameters_and_names_files_that_are_there() -> None:
    assert powershell.parameters(SCRIPT) == {"Environment", "ResourceGroup", "Location"}
    allowed = re.search(r"ValidateSet\(([^)]*)\)", SCRIPT)
    assert allowed and re.findall(r"'(\w+)'", allowed[1]) == ENVIRONMENTS
    for name in re.findall(r"'([\w.]+\.json)'", SCRIPT.replace("deploy infrastructure.json", "")):
        assert (AZURE / name).is_file()
    assert set(re.findall(r"\$outputs\.(\w+)\.value", SCRIPT)) == set(
        read_json(AZURE / "infrastructure.json")["outputs"]
    )


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Set-StrictMode -Version Latest\n", "", "StrictMode"),
        ("$ErrorActionPreference = 'Stop'", "$ErrorActionPreference = 'Continue'", "ErrorActionPreference"),
        (
            "Test-Prerequisite\n\n$exists",
            "az group list\nTest-Prerequisite\n\n$exists",
            "az is called outside of Invoke-Az",
        ),
        ("    if ($LASTEXITCODE -ne 0) {\n", "    if ($false) {\n", "LASTEXITCODE"),
        ('        throw "az $(', '        Write-Host "az $(', "does not throw"),
        ("SupportsShouldProcess = $true, ConfirmImpact", "ConfirmImpact", "SupportsShouldProcess"),
        ("if ($WhatIfPreference) {\n    Write-Host (Inv", "if ($false) {\n    Write-Host (Inv", "what-if"),
        ("foreach ($file in @($Template", "foreach ($file in @($Template {", "cannot be parsed"),
        ("-ErrorAction SilentlyContinue)) {", "-ErrorAction SilentlyContinue)) {\n iex 'az x'", "evaluates text"),
    ],
)
def test_a_broken_script_is_noticed(old: str, new: str, fault: str) -> None:
    assert SCRIPT.count(old) == 1
    assert any(fault in found for found in powershell.faults(SCRIPT.replace(old, new)))


SECRETS = re.compile(
    r"AccountKey\s*=|SharedAccessSignature|[?&]sig=|InstrumentationKey\s*=|-----BEGIN|"
    r"(?i:password|secret|token|api_?key)[\"']?\s*[:=]\s*[\"'][^\"'$@{]{6,}[\"']|"
    r"\b[A-Za-z0-9+/]{60,}={1,2}|\b[A-Za-z0-9_~.-]{3}8Q~[A-Za-z0-9_~.-]{34}\b"
)
"""Keys and connection strings of Azure, literals behind telling names, keys in base64, Entra's client secrets."""


def test_no_file_holds_a_secret() -> None:
    folders = (AZURE, ROOT / "mlops/pipelines", ROOT / "mlops/deployment")
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 20
    for path in files:
        found = SECRETS.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found and found[0][:30]}"


@pytest.mark.parametrize(
    "text",
    [
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=abc==",
        "https://a.blob.core.windows.net/c?sv=2024&sig=abc",
        "InstrumentationKey=00000000-0000",
        '"adminPassword": "hunter2hunter2"',
        "-----BEGIN PRIVATE KEY-----",
        "x: " + "Ab1/" * 20 + "==",
        "client: abc8Q~" + "x" * 34,
    ],
)
def test_a_secret_would_be_noticed(text: str) -> None:
    assert SECRETS.search(text)
