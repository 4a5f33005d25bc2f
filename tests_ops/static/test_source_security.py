"""bandit and detect-secrets on the code: nothing but what is known, and why that is no weakness."""

import json
from pathlib import Path

from programs import ROOT, run, tool

FOLDERS = ("ldm3d", "mlops", ".github", "config")
SKIPPED = "B104,B310"
"""Listening at all addresses is for the operator to ask for; addresses that are opened are the operator's or fixed."""
KNOWN_WEAKNESSES = {
    ("B506", "mlops/api/models_file.py"): "the loader is a SafeLoader that refuses keys that come twice",
}
KNOWN_SECRETS = {
    ("Hex High Entropy String", "ldm3d/download.py"): "the digest of the data set",
    ("Base64 High Entropy String", "mlops/api/records.py"): "the alphabet of job ids",
    ("Secret Keyword", "mlops/kubernetes/ingress.yaml"): "the name of the Secret with the certificate",
    ("Secret Keyword", "mlops/kubernetes-overlays/azure-keyvault/kustomization.yaml"): "names of Secrets",
    ("Secret Keyword", "mlops/kubernetes-overlays/azure-keyvault/secretproviderclass.yaml"): "names of Secrets",
}


def here(root: Path, *folders: str) -> list[str]:
    return [*folders, *(path.name for path in sorted(root.glob("*.py")))]


def weaknesses(root: Path) -> set[tuple[str, str]]:
    """Findings of medium severity or more: test and file."""
    done = run(
        tool("bandit"), "-q", "-r", "-ll", "-f", "json", "--skip", SKIPPED, *here(root, "ldm3d", "mlops"), cwd=root
    )
    found = json.loads(done.stdout)
    assert found["errors"] == []
    return {(result["test_id"], Path(result["filename"]).as_posix()) for result in found["results"]}


def secrets(root: Path) -> set[tuple[str, str]]:
    """What looks like a secret outside the tests, which are full of false ones."""
    done = run(tool("detect-secrets"), "scan", "--all-files", *here(root, *FOLDERS, "Makefile"), cwd=root)
    found = json.loads(done.stdout)["results"]
    return {(entry["type"], name) for name, entries in found.items() for entry in entries}


def test_weaknesses_are_the_known_ones() -> None:
    assert weaknesses(ROOT) == set(KNOWN_WEAKNESSES)


def test_secrets_are_the_known_ones() -> None:
    assert secrets(ROOT) == set(KNOWN_SECRETS)


def test_new_ones_are_seen(tmp_path: Path) -> None:
    for name in ("mlops", "ldm3d", ".github", "config"):
        (tmp_path / name).mkdir()
    (tmp_path / "mlops" / "worse.py").write_text(
        "import subprocess, pickle\nsubprocess.run('ls ' + input(), shell=True)\npickle.loads(b'')\n"
    )
    (tmp_path / "ldm3d" / "token.py").write_text('AWS = "AKIAIOSFODNN7EXAMPLQ"\n')
    assert weaknesses(tmp_path) == {("B602", "mlops/worse.py"), ("B301", "mlops/worse.py")}
    assert secrets(tmp_path) == {("AWS Access Key", "ldm3d/token.py")}
