"""mlops.api.keys: keys are made and revoked by a command, hashed at rest; nothing that fails opens the door."""

import json
import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ldm3d.errors import ConfigError
from mlops.api import keys as module
from mlops.api.keys import PATTERN, KeyStore

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "data" / "keys.json")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LDM3D_DATA_DIR": str(folder)}
    line = [sys.executable, "-m", "mlops.api.keys", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_key_is_found_and_no_other(keys: KeyStore) -> None:
    assert not keys.exists() and keys.find("ldm3d_aaaaaaaa_" + "a" * 43) is None
    entry, plaintext = keys.create("clinic", "operator")
    other, _ = keys.create("lab", "viewer")
    assert PATTERN.fullmatch(plaintext) and keys.find(plaintext) == entry
    last = "a" if plaintext[-1] != "a" else "b"
    for wrong in (
        plaintext[:-1] + last,
        plaintext[:-1],
        plaintext + "a",
        plaintext.replace(entry.id, other.id),
        f"{plaintext}\n",
        "",
        "ldm3d",
        "é" * 60,
    ):
        assert keys.find(wrong) is None, wrong


def test_secrets_have_256_bits_and_no_two_are_the_same(keys: KeyStore) -> None:
    assert len(set(module.SECRET_CHARACTERS)) ** module.SECRET_LENGTH >= 2**256
    made = [keys.create(f"n{number}", "viewer")[1] for number in range(5)]
    assert len({plaintext[-43:] for plaintext in made}) == 5


def test_the_file_holds_no_secret_and_is_the_owners_alone(keys: KeyStore) -> None:
    _, plaintext = keys.create("clinic", "admin")
    text = keys.path.read_text()
    assert plaintext[-43:] not in text and len(re.findall(r"[0-9a-f]{64}", text)) == 1
    keys.create("another", "viewer")
    for path in keys.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_revoked_key_is_refused_by_a_store_that_had_accepted_it(keys: KeyStore) -> None:
    entry, plaintext = keys.create("clinic", "viewer")
    served = KeyStore(keys.path)
    assert served.find(plaintext)
    revoked = keys.revoke(entry.id)
    assert served.find(plaintext) is None and not served.any_active()
    assert keys.revoke(entry.id).revoked == revoked.revoked
    assert served.exists()
    with pytest.raises(ConfigError, match=r"no key has the id 'x'.*keys list"):
        keys.revoke("x")


def test_the_file_is_read_again_only_when_it_changed(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plaintext = keys.create("clinic", "viewer")
    reads = []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda path: reads.append(path) or load(path))
    served = KeyStore(keys.path)
    assert all(served.find(plaintext) for _ in range(10)) and len(reads) == 1
    KeyStore(keys.path).create("another", "viewer")
    before = len(reads)
    assert all(served.find(plaintext) for _ in range(10)) and len(reads) == before + 1


def test_a_key_expires(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, plaintext = keys.create("guest", "viewer", days=2)
    assert entry.expires == entry.created + timedelta(days=2) and keys.find(plaintext)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.now(UTC) + timedelta(days=2, seconds=1)

    monkeypatch.setattr(module, "datetime", Later)
    assert keys.find(plaintext) is None and not keys.any_active()


@pytest.mark.parametrize(
    ("name", "role", "days", "says"),
    [
        ("", "viewer", None, "1 to 64 printable"),
        ("x" * 65, "viewer", None, "1 to 64 printable"),
        ("a\nb", "viewer", None, "1 to 64 printable"),
        ("\x1b[31m", "viewer", None, "1 to 64 printable"),
        ("a", "root", None, "viewer, operator, admin"),
        ("a", "viewer", 0, "1 to 36500"),
        ("a", "viewer", 10**9, "1 to 36500"),
    ],
)
def test_what_cannot_be_a_key_is_refused(keys: KeyStore, name: str, role: str, days: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        keys.create(name, role, days)
    assert not keys.exists()


GOOD = {
    "id": "aaaaaaaa",
    "name": "n",
    "role": "admin",
    "created": "2026-01-01T00:00:00Z",
    "secret_sha256": "0" * 64,
}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\0" * 50,
        "{}",
        json.dumps({"version": 2, "keys": []}),
        json.dumps({"keys": [{**GOOD, "role": "root"}]}),
        json.dumps({"keys": [{**GOOD, "more": 1}]}),
        json.dumps({"keys": [{**GOOD, "created": "2026-01-01T00:00:00"}]}),
        json.dumps({"keys": [GOOD, GOOD]}),
        json.dumps({"keys": [{**GOOD, "secret_sha256": "abc"}]}),
    ],
)
def test_a_damaged_file_refuses_all(keys: KeyStore, content: str) -> None:
    _, plaintext = keys.create("clinic", "admin")
    good = keys.path.read_text()
    served = KeyStore(keys.path)
    assert served.find(plaintext)
    keys.path.write_text(content)
    for store in (served, KeyStore(keys.path)):
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"keys\.json: damaged: .*every key is refused"):
                store.find(plaintext)
        with pytest.raises(ConfigError):
            store.any_active()
        with pytest.raises(ConfigError):
            store.create("more", "admin")
        assert store.exists()
    assert keys.path.read_text() == content, "a damaged file must not be overwritten"
    keys.path.write_text(good)
    assert served.find(plaintext), "mended, it serves again"


def test_a_file_that_vanishes_opens_nothing(keys: KeyStore) -> None:
    _, plaintext = keys.create("clinic", "admin")
    keys.path.unlink()
    assert keys.exists()
    with pytest.raises(ConfigError, match="was here and is gone"):
        keys.find(plaintext)


def test_something_else_in_the_files_place_refuses_all(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyStore(tmp_path / "folder.json").find("x")
    assert KeyStore(tmp_path / "folder.json").exists() and KeyStore(tmp_path / "link.json").exists()


# ---------------------------------------------------------------- command


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    made = command(tmp_path, "create", "--name", "clinic", "--role", "operator", "--days", "30")
    plaintext = made.stdout.strip()
    assert made.returncode == 0 and PATTERN.fullmatch(plaintext) and plaintext not in made.stderr
    found = KeyStore(tmp_path / "keys.json").find(plaintext)
    assert found and (found.name, found.role) == ("clinic", "operator")
    listed = command(tmp_path, "list")
    (shown,) = [json.loads(line) for line in listed.stdout.splitlines()]
    assert (shown["id"], shown["active"]) == (found.id, True) and "secret_sha256" not in shown
    assert command(tmp_path, "revoke", found.id).returncode == 0
    assert KeyStore(tmp_path / "keys.json").find(plaintext) is None
    assert json.loads(command(tmp_path, "list").stdout)["active"] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("revoke", "nokey"), "no key has the id 'nokey'"),
        (("create", "--name", "x", "--role", "root"), "invalid choice: 'root'"),
        (("create", "--name", "x", "--role", "admin", "--days", "-1"), "1 to 36500"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = command(tmp_path, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr


def test_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    environment = {**os.environ, "LDM3D_DATA_DIR": str(tmp_path)}
    line = [sys.executable, "-m", "mlops.api.keys", "create", "--role", "viewer", "--name"]
    running = [subprocess.Popen([*line, f"n{i}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE) for i in range(4)]
    made = [process.communicate()[0].decode().strip() for process in running]
    store = KeyStore(tmp_path / "keys.json")
    assert len(made) == 4 and all(store.find(plaintext) for plaintext in made) and len(store.list()) == 4


def test_the_store_needs_no_torch() -> None:
    code = "import mlops.api.security, mlops.api.audit, sys; assert not {'torch', 'monai'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
