"""Backups on blob storage, as Azurite serves it, with adlfs; and the weights that come back make the same brain.

Azurite is npm's (`npm install --prefix DIR azurite@3.37.0`), adlfs needs an environment of its own with the service's
requirements: name them in AZURITE and BACKUP_PYTHON.
"""

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import PYTHON, ROOT, run

AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob") or ""
BACKUP_PYTHON = os.environ.get("BACKUP_PYTHON", "")
ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"known to everybody who runs this test").decode()
MAKE_CONTAINER = """
import sys
from azure.storage.blob import BlobServiceClient
BlobServiceClient.from_connection_string(sys.argv[1]).create_container("backups")
"""
WEIGHTS = ROOT / "checkpoints" / "demo"

pytestmark = [
    pytest.mark.skipif(not AZURITE, reason="not installed: npm's azurite; name its azurite-blob in AZURITE"),
    pytest.mark.skipif(not BACKUP_PYTHON, reason="no environment with adlfs; name its python in BACKUP_PYTHON"),
]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which abfs:// is Azurite, with a container `backups`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    words = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
    server = subprocess.Popen(
        [*words, "--skipApiVersionCheck"], env=os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    )
    try:
        until = time.monotonic() + 60
        while not listens(port):
            assert server.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        endpoint = f"DefaultEndpointsProtocol=http;BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT}"
        reached = f"{endpoint};AccountName={ACCOUNT};AccountKey={KEY};"
        environment = os.environ | {"AZURE_STORAGE_CONNECTION_STRING": reached, "OMP_NUM_THREADS": "1"}
        made = run(BACKUP_PYTHON, "-c", MAKE_CONTAINER, reached)  # a container is the operator's to make
        assert made.returncode == 0, made.stderr
        yield environment
    finally:
        server.terminate()
        server.wait(20)


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def backup(blobs: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return run(BACKUP_PYTHON, "-m", "mlops.backup", *words, env=blobs, cwd=ROOT)


def brain(weights: Path, folder: Path) -> str:
    """Digest of the brain that inference.py makes."""
    folder.mkdir()
    environment = folder / "environment.json"
    places = dict.fromkeys(("tfevent_path", "output_dir", "data_base_dir"), str(folder))
    environment.write_text(json.dumps(places | {"model_dir": str(weights)}))
    words = ("inference.py", "-c", "config/config_demo.json", "-e", environment, "--num", 1, "--seed", 11, "--steps", 4)
    done = run(PYTHON, *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.nii.gz")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_come_back_from_blob_storage_and_make_the_same_brain(blobs: dict[str, str], tmp_path: Path) -> None:
    weights = Path(shutil.copytree(WEIGHTS, tmp_path / "weights"))
    before = brain(weights, tmp_path / "before")
    url = "abfs://backups/ldm3d"
    first = backup(blobs, "create", "--from", weights, "--to", url)
    assert first.returncode == 0, first.stderr
    name = first.stdout.strip()
    assert backup(blobs, "verify", "--from", url).stdout == f"{name}: whole\n"
    shutil.rmtree(weights)
    restored = backup(blobs, "restore", "--from", url, "--to", weights)
    assert restored.returncode == 0, restored.stderr
    assert brain(weights, tmp_path / "after") == before
    second = backup(blobs, "create", "--from", weights, "--to", url, "--keep", 1)
    assert f"removed {name}" in second.stderr
    assert backup(blobs, "list", "--from", url).stdout.split()[0] == second.stdout.strip()


def test_a_container_that_is_not_there(blobs: dict[str, str]) -> None:
    said = backup(blobs, "create", "--from", WEIGHTS, "--to", "abfs://nowhere/ldm3d")
    assert (said.returncode, said.stdout) == (2, ""), said.stderr
    assert said.stderr.splitlines()[-1].startswith("error: ")
