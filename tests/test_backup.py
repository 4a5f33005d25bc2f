"""mlops.backup: what was saved comes back as it was, and nothing half saved or tampered with comes back at all."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import service
from fsspec.implementations.memory import MemoryFileSystem
from prometheus_client.parser import text_string_to_metric_families

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.files import atomic_path, write_text
from mlops import remote
from mlops.api.audit import AuditLog
from mlops.api.audit_chain import CURRENT, verify
from mlops.backup import __main__ as command
from mlops.backup import snapshot as snapshots
from mlops.backup.manifest import Content
from mlops.backup.vault import Vault, new_name
from mlops.commands import run_command

ROOT = Path(__file__).resolve().parents[1]
KIB = 1 / 1024


class Said(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command, in this process."""

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["backup", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(command.main)
        return Said(int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    (tmp_path / "vault").mkdir()
    return tmp_path / "vault"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder like model_dir; its content is of no interest to a backup."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, content in ((AUTOENCODER, b"a" * 300_000), (UNET, b"u" * 500_000), ("split.json", b"{}")):
        (folder / name).write_bytes(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "card.json").write_bytes(b"[]")
    (folder / ".tmp-1-autoencoder.safetensors").write_bytes(b"half")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder like the service's."""
    folder = tmp_path / "data"
    for part in ("jobs/j1", "callers", f"models/{'d' * 64}", "metrics"):
        (folder / part).mkdir(parents=True)
    (folder / "active.json").write_text("{}")
    (folder / "jobs/j1/job.json").write_text("{}")
    (folder / f"models/{'d' * 64}/{UNET}").write_bytes(b"u" * 500_000)
    write_text(folder / "keys.json", "{}", mode=0o600)
    write(folder / "audit", 5)
    return folder


def write(folder: Path, number: int, max_mib: float = 64) -> None:
    log = AuditLog(folder, max_mib)
    for i in range(number):
        log.record("POST /v1/samples", 202, job=f"{i:026d}", address="127.0.0.1")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def made(call: Call, vault: object, *sources: Path, code: int = 0, more: tuple[object, ...] = ()) -> str:
    said = call("create", "--from", *sources, "--to", vault, *more)
    assert said.code == code, said.err
    return said.out.strip()


# There and back.


def test_what_was_saved_comes_back_as_it_was(call: Call, weights: Path, vault: Path, tmp_path: Path) -> None:
    saved = {name: text for name, text in content(weights).items() if not name.startswith(".")}
    name = made(call, vault, weights)
    shutil.rmtree(weights)
    assert call("verify", "--from", vault) == Said(0, f"{name}: whole\n", "")
    back = call("restore", "--from", vault, "--to", tmp_path / "back")
    assert (back.code, back.out) == (0, "")
    assert back.err == f"{tmp_path}/back: 4 files of {name}, which were in {weights}\n"
    assert content(tmp_path / "back") == saved


def test_of_the_services_folder_comes_back_what_cannot_be_made_again(
    call: Call, data: Path, weights: Path, vault: Path, tmp_path: Path
) -> None:
    said = call("create", "--from", data, weights, "--to", vault)
    assert f"notice: {data}: left out keys.json; --with-keys would save them\n" in said.err
    assert "data, weights in" in said.err
    assert f"{call('restore', '--from', vault, '--to', tmp_path / 'back').err}" == (
        "error: the backup holds data, weights: say which with --source\n"
    )
    back = tmp_path / "back"
    assert call("restore", "--from", vault, "--source", "data", "--to", back).code == 0
    assert set(content(back)) == {"active.json", f"models/{'d' * 64}/{UNET}", "audit/audit.jsonl"}
    assert (back / "audit/audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert (back / "audit").stat().st_mode & 0o777 == 0o700
    checked = [sys.executable, "-m", "mlops.api.audit", "verify", "--folder", str(back / "audit")]
    assert (
        "5 entries in 1 files" in subprocess.run(checked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    write(back / "audit", 1)  # and it goes on from there
    assert verify(back / "audit").problems == []


def test_the_same_content_is_stored_once(call: Call, data: Path, weights: Path, vault: Path) -> None:
    name = made(call, vault, data, weights)
    assert len([path for path in (vault / name).iterdir() if path.stat().st_size == 500_000]) == 1


def test_keys_are_saved_only_if_asked_for(call: Call, data: Path, vault: Path, tmp_path: Path) -> None:
    made(call, vault, data, more=("--with-keys",))
    call("restore", "--from", vault, "--to", tmp_path / "back")
    assert (tmp_path / "back" / "keys.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "etc").mkdir()
    for name in ("models.yaml", "tls.key", "tls.pem"):
        (tmp_path / "etc" / name).write_text(name)
    made(call, vault, tmp_path / "etc")
    call("restore", "--from", vault, "--to", tmp_path / "etc2")
    assert content(tmp_path / "etc2") == {"models.yaml": b"models.yaml"}


def test_a_single_file_is_a_source(call: Call, weights: Path, vault: Path, tmp_path: Path) -> None:
    made(call, vault, weights / "split.json")
    call("restore", "--from", vault, "--source", "split.json", "--to", tmp_path / "back")
    assert content(tmp_path / "back") == {"split.json": b"{}"}


def test_metrics_tell_when_how_large_and_how_long(call: Call, data: Path, vault: Path, tmp_path: Path) -> None:
    before = datetime.now(UTC).timestamp()
    made(call, vault, data, more=("--textfile", tmp_path / "backup.prom"))
    text = (tmp_path / "backup.prom").read_text()
    values = {family.name: family.samples[0].value for family in text_string_to_metric_families(text)}
    assert before <= values["ldm3d_backup_last_success_timestamp_seconds"] <= datetime.now(UTC).timestamp()
    assert values["ldm3d_backup_size_bytes"] == 500_002 + (data / "audit/audit.jsonl").stat().st_size
    assert 0 < values["ldm3d_backup_duration_seconds"] < 60
    assert values["ldm3d_backup_audit_intact"] == 1


def test_a_backup_is_good_although_its_metrics_are_not_taken(call: Call, data: Path, vault: Path) -> None:
    said = call("create", "--from", data, "--to", vault, "--push", "http://127.0.0.1:1")
    assert said.code == 2
    assert "error: --push http://127.0.0.1:1: the metrics were not taken" in said.err
    assert call("verify", "--from", vault).code == 0


# While others write.


def test_an_audit_log_that_is_written_to_is_saved_between_two_entries(call: Call, tmp_path: Path, vault: Path) -> None:
    folder, stop = tmp_path / "audit", threading.Event()
    write(folder, 1)

    def go_on() -> None:
        log = AuditLog(folder, 16 * KIB)  # begins a new file every 60 entries
        while not stop.is_set():
            log.record("GET /v1/jobs", 200, address="127.0.0.1")
            stop.wait(0.001)

    writers = [threading.Thread(target=go_on) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for number in range(60):
            made(call, vault, folder)
            back = tmp_path / f"back{number}"
            assert call("restore", "--from", vault, "--to", back).code == 0
            found = verify(back)
            assert (found.problems, found.notices) == ([], [])
            if number >= 7 and found.entries > 100:
                break
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert found.entries > 100


def test_each_replicas_audit_log_is_one_of_its_own(call: Call, data: Path, vault: Path, tmp_path: Path) -> None:
    """On a cluster each pod writes to a folder of its own inside `audit`."""
    for pod, number in (("api-0", 3), ("api-1", 4)):
        write(data / "audit" / pod, number)
    for source, folders in ((data, ("audit", "audit/api-0", "audit/api-1")), (data / "audit", (".", "api-0", "api-1"))):
        made(call, vault, source)
        back = call("restore", "--from", vault, "--to", tmp_path / f"{source.name}2").err
        assert [line for line in back.splitlines() if line.startswith("audit log")] == [
            f"audit log {folder}: {number} entries" for folder, number in zip(folders, (5, 3, 4), strict=True)
        ]


def test_weights_that_are_replaced_meanwhile_still_belong_together(
    call: Call, weights: Path, vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training publishes a new pair between the openings of the old one's files."""
    opened: list[str] = []
    real = snapshots._open

    def opens(path: Path, *others: Any) -> Any:
        found = real(path, *others)
        opened.append(path.name)
        if opened.count(AUTOENCODER) == 1 and path.name == AUTOENCODER:
            for name in (AUTOENCODER, UNET):
                with atomic_path(weights / name) as file:
                    file.write_bytes(b"new")
        return found

    monkeypatch.setattr(snapshots, "_open", opens)
    monkeypatch.setattr(snapshots, "PAUSE_SECONDS", 0)
    made(call, vault, weights)
    call("restore", "--from", vault, "--to", tmp_path / "back")
    assert opened.count(UNET) == 2
    assert {content(tmp_path / "back")[name] for name in (AUTOENCODER, UNET)} == {b"new"}


def test_files_that_are_always_replaced_and_files_that_are_written_into(
    call: Call, weights: Path, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PAUSE_SECONDS", 0)
    with monkeypatch.context() as never_still:
        never_still.setattr(snapshots, "_same", lambda *_: False)
        said = call("create", "--from", weights, "--to", vault)
        assert (said.code, "were replaced 20 times while they were opened" in said.err) == (2, True), said.err
    real = Vault.put

    def writes_into(self: Vault, name: str, file: Any, digest: str) -> None:
        with open(file.place, "r+b") as other:
            other.write(b"x")
        real(self, name, file, digest)

    monkeypatch.setattr(Vault, "put", writes_into)
    said = call("create", "--from", weights, "--to", vault)
    assert (said.code, "was changed while it was read; try again" in said.err) == (2, True), said.err
    assert call("list", "--from", vault) == Said(0, "", "")


# An audit log that somebody has cut.


def test_an_audit_log_that_lost_its_end_is_noticed(call: Call, data: Path, vault: Path, tmp_path: Path) -> None:
    metrics = ("--textfile", tmp_path / "backup.prom", "--keep", 1)
    first = made(call, vault, data)
    log = data / "audit" / CURRENT
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    said = call("create", "--from", data, "--to", vault, *metrics)
    assert said.code == 1
    assert "warning: data: the audit log audit no longer has the entry that the newest backup ends with\n" in said.err
    assert "no backup was removed" in said.err
    assert "ldm3d_backup_audit_intact 0.0" in (tmp_path / "backup.prom").read_text()
    assert first in call("list", "--from", vault).out
    shutil.rmtree(data / "audit")
    assert "no longer has the entry" in call("create", "--from", data, "--to", vault, *metrics).err


@pytest.mark.parametrize("newest", ["of another source", "damaged"])
def test_so_it_is_where_the_newest_backup_does_not_know_the_log(
    call: Call, data: Path, weights: Path, vault: Path, newest: str
) -> None:
    made(call, vault, data)
    name = made(call, vault, weights if newest == "of another source" else data)
    if newest == "damaged":
        (vault / name / "manifest.json").write_text("{}")
    shutil.rmtree(data / "audit")
    said = call("create", "--from", data, "--to", vault, "--keep", 1)
    assert (said.code, "no longer has the entry that the newest backup ends with" in said.err) == (1, True), said.err


def test_a_damaged_audit_log_is_saved_as_it_is(call: Call, data: Path, vault: Path, tmp_path: Path) -> None:
    log = data / "audit" / CURRENT
    log.write_bytes(log.read_bytes().replace(b'"outcome":202', b'"outcome":200', 1))
    said = call("create", "--from", data, "--to", vault)
    assert (said.code, "line 1: changed or inserted" in said.err) == (1, True), said.err
    back = call("restore", "--from", vault, "--to", tmp_path / "back")
    assert "audit log audit: 4 entries, damaged in 1 places, as it was when it was saved\n" in back.err
    assert (tmp_path / "back/audit" / CURRENT).read_bytes() == log.read_bytes()


def test_oldest_files_of_an_audit_log_may_be_removed(call: Call, tmp_path: Path, vault: Path) -> None:
    folder = tmp_path / "audit"
    write(folder, 100, max_mib=8 * KIB)
    made(call, vault, folder)
    sorted(folder.glob("audit-*.jsonl"))[0].unlink()
    made(call, vault, folder)
    assert call("restore", "--from", vault, "--to", tmp_path / "back").code == 0


# Killed, and without room.


def killed_at(where: str, *words: object) -> int:
    """The command's status in a process that is killed in a function: `module function calls before`."""
    module, function, skip = where.split()
    script = f"""
import os, signal, sys
import {module} as module
from mlops.backup import __main__ as command
owner, _, name = "{function}".rpartition(".")
owner = getattr(module, owner) if owner else module
real, calls = getattr(owner, name), []
def killing(*given, **more):
    calls.append(1)
    if len(calls) > {skip}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **more)
setattr(owner, name, killing)
sys.argv = ["backup", *{[str(word) for word in words]!r}]
command.main()
"""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False).returncode


@pytest.mark.parametrize("where", ["Vault.put 0", "Vault.put 2", "Vault.finish 0", "write_text 0"])
def test_a_backup_that_was_killed_is_none(where: str, call: Call, weights: Path, vault: Path) -> None:
    good = made(call, vault, weights)
    code = killed_at(f"mlops.backup.vault {where}", "create", "--from", weights, "--to", vault)
    assert code == -signal.SIGKILL
    assert call("list", "--from", vault).out.split()[0] == good
    assert call("verify", "--from", vault).out == f"{good}: whole\n"
    begun = [path.name for path in vault.iterdir() if path.name != good]
    kept = call("prune", "--from", vault, "--keep", 1)  # may be one that runs now
    assert kept == Said(0, "", "")
    later = datetime.now(UTC) + timedelta(days=2)
    assert Vault(str(vault)).prune(1, 0, later) == begun
    assert [path.name for path in vault.iterdir()] == [good]


@pytest.mark.parametrize(("where", "empty"), [("_fetch 1", True), ("_require_inside 0", True), ("_move 1", False)])
def test_a_restore_that_was_killed_can_be_told_and_made_again(
    where: str, empty: bool, call: Call, weights: Path, vault: Path, tmp_path: Path
) -> None:
    made(call, vault, weights)
    back = ("restore", "--from", vault, "--to", tmp_path / "back")
    assert killed_at(f"mlops.backup.restore {where}", *back) == -signal.SIGKILL
    shown = [path for path in content(tmp_path / "back") if not path.startswith(".")]
    assert (shown == []) == empty
    said = call(*back)
    assert said.code == (0 if empty else 2), said.err
    assert call(*back, "--overwrite").code == 0
    assert set(content(tmp_path / "back")) == {AUTOENCODER, UNET, "split.json", "sub/card.json"}


def short_of_room(*words: object, kib: int = 400) -> subprocess.CompletedProcess[str]:
    """The command where no file can become larger; the system refuses what is beyond."""
    return subprocess.run(
        [sys.executable, "-m", "mlops.backup", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, kib * 1024)),
    )


def test_a_full_disk(call: Call, weights: Path, vault: Path, tmp_path: Path) -> None:
    said = short_of_room("create", "--from", weights, "--to", vault)
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (2, "", 1)
    assert said.stderr.startswith("error: ") and os.strerror(errno.EFBIG) in said.stderr
    assert call("list", "--from", vault).out == ""
    made(call, vault, weights)
    said = short_of_room("restore", "--from", vault, "--to", tmp_path / "back")
    assert (said.returncode, os.strerror(errno.EFBIG) in said.stderr) == (2, True), said.stderr
    assert content(tmp_path / "back") == {".restore.lock": b""}
    assert call("restore", "--from", vault, "--to", tmp_path / "back").code == 0


def test_a_disk_without_room_is_seen_before_anything_is_fetched(
    call: Call, weights: Path, vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(call, vault, weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    said = call("restore", "--from", vault, "--to", tmp_path / "back")
    assert said.err.endswith("back: 1 MiB are needed, 0 are free\n")


# Damaged, and made to harm.


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "missing", "link"])
def test_a_damaged_backup_is_noticed_and_never_restored(
    damage: str, call: Call, weights: Path, vault: Path, tmp_path: Path
) -> None:
    name = made(call, vault, weights)
    path = next(path for path in (vault / name).iterdir() if path.stat().st_size == 500_000)
    text = path.read_bytes()
    if damage == "link":
        shutil.move(path, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"flipped": text[:-1] + b"U", "cut": text[:-1], "longer": text + b"u"}[damage])
    said = call("verify", "--from", vault)
    assert (said.code, said.out.splitlines()[-1]) == (1, f"{name}: 1 files are damaged")
    said = call("restore", "--from", vault, "--to", tmp_path / "back")
    assert (said.code, str(path) in said.err) == (2, True)
    assert set(content(tmp_path / "back")) <= {".restore.lock"}


def test_what_arrives_damaged_is_no_backup(
    call: Call, weights: Path, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Vault.finish

    def finish(self: Vault, name: str, content: Content) -> None:
        path = next(path for path in (vault / name).iterdir() if path.stat().st_size == 500_000)
        path.write_bytes(b"x" * 500_000)
        real(self, name, content)

    monkeypatch.setattr(Vault, "finish", finish)
    said = call("create", "--from", weights, "--to", vault)
    assert (said.code, said.out, "is damaged; the backup was not finished" in said.err) == (2, "", True)
    assert call("list", "--from", vault).out == ""


def forged(vault: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest as its digest says, of somebody who can write to the place."""
    path = vault / name / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["content"])
    compact = json.dumps(manifest["content"], separators=(",", ":"), ensure_ascii=False)
    manifest["sha256"] = hashlib.sha256(compact.encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def set_path(path: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["sources"][0]["files"][0].update(path=path)


HOSTILE = {
    **{
        path: set_path(path)
        for path in (
            "../evil", "/etc/cron.d/evil", "sub/../../evil", "a\\..\\evil", ".hidden", "sub/.ssh/keys", "", "a//b",
            "a/", "x\n", "e" * 2000, "split.json", "split.json/below",
        )
    },
    "digest": lambda content: content["sources"][0]["files"][0].update(sha256="../../../etc/passwd"),
    "size": lambda content: content["sources"][0]["files"][0].update(size=-1),
    "source": lambda content: content["sources"][0].update(name="../evil"),
    "twice": lambda content: content["sources"].append(content["sources"][0]),
    "audit": lambda content: content["sources"][0].update(
        audit_logs=[{"folder": "..", "after": "0" * 64, "entries": 0, "last_hash": "0" * 64, "problems": 0}]
    ),
    "key": lambda content: content.update(mode=0o4777),
    "format": lambda content: content.update(format=2),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=[repr(name)[:20] for name in HOSTILE])
def test_a_hostile_manifest_is_refused(
    change: Callable[[dict[str, Any]], None], call: Call, weights: Path, vault: Path, tmp_path: Path
) -> None:
    name = made(call, vault, weights)
    forged(vault, name, lambda content: None)
    assert call("verify", "--from", vault).code == 0  # the forger's digest is right
    forged(vault, name, change)
    said = call("restore", "--from", vault, "--source", "weights", "--to", tmp_path / "deep" / "back")
    assert (said.code, "no manifest of a backup, or a damaged one" in said.err) == (2, True), said.err
    assert not (tmp_path / "deep").exists()
    listed = call("list", "--from", vault)
    assert (listed.code, f"{name}  damaged: " in listed.out) == (1, True)


def test_a_damaged_manifest_stops_no_new_backup(call: Call, weights: Path, vault: Path) -> None:
    name = made(call, vault, weights)
    path = vault / name / "manifest.json"
    path.write_text(path.read_text().replace("split.json", "split.jsom"))
    assert "is not as it was written" in call("verify", "--from", vault).err
    assert call("create", "--from", weights, "--to", vault).code == 0


def test_symbolic_links_are_not_followed(call: Call, weights: Path, data: Path, vault: Path, tmp_path: Path) -> None:
    name = made(call, vault, weights)
    (tmp_path / "elsewhere").mkdir()
    back = tmp_path / "back"
    back.mkdir()
    (back / "sub").symlink_to(tmp_path / "elsewhere")
    said = call("restore", "--from", vault, "--to", back, "--overwrite")
    assert (said.code, "what stands there is in the way" in said.err) == (2, True)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (weights / "shadow").symlink_to("/etc/shadow")
    said = call("create", "--from", weights, "--to", vault)
    assert (said.code, f"{weights / 'shadow'}: is a symbolic link" in said.err) == (2, True)
    (data / "models" / "other").symlink_to(data / "models" / ("d" * 64))
    assert "models/other: is a symbolic link" in call("create", "--from", data, "--to", vault).err
    assert call("list", "--from", vault).out.split()[0] == name


# What stays.


def test_restore_overwrites_only_if_told_to(call: Call, weights: Path, vault: Path, tmp_path: Path) -> None:
    made(call, vault, weights)
    (weights / UNET).write_bytes(b"other")
    (weights / "mine.txt").write_bytes(b"mine")
    said = call("restore", "--from", vault, "--to", weights)
    assert (said.code, "is not empty; take another folder, or --overwrite" in said.err) == (2, True)
    assert (weights / UNET).read_bytes() == b"other"
    assert call("restore", "--from", vault, "--to", weights, "--overwrite").code == 0
    assert (weights / UNET).read_bytes() == b"u" * 500_000
    assert (weights / "mine.txt").read_bytes() == b"mine"


def old(vault: Path, name: str, days: float) -> str:
    """Let a backup have been made some days ago."""
    older = new_name(datetime.now(UTC) - timedelta(days=days))
    (vault / name).rename(vault / older)
    return older


def test_retention_keeps_the_newest_and_the_young(call: Call, weights: Path, vault: Path) -> None:
    names = [old(vault, made(call, vault, weights), days) for days in (40, 30.5, 20, 10)]
    assert call("prune", "--from", vault, "--keep", 2, "--keep-days", 30).err.split() == [
        "removed", names[0], "removed", names[1],
    ]  # fmt: skip
    assert call("prune", "--from", vault, "--keep", 5).err == ""
    (vault / "notes.txt").write_text("of a person")
    newest = made(call, vault, weights, more=("--keep", 1))
    assert sorted(path.name for path in vault.iterdir()) == sorted([newest, "notes.txt"])
    assert call("prune", "--from", vault, "--keep", 1).err == ""


def test_backups_of_other_sources_and_damaged_ones_do_not_push_out_the_good_ones(
    call: Call, weights: Path, data: Path, vault: Path
) -> None:
    of_weights = [old(vault, made(call, vault, weights), days) for days in (9, 8)]
    of_audit = [old(vault, made(call, vault, data / "audit"), days) for days in (7, 6, 5)]
    damaged = [old(vault, made(call, vault, weights), days) for days in (4, 3)]
    for name in damaged:
        (vault / name / "manifest.json").write_text("{}")
    call("prune", "--from", vault, "--keep", 1)
    assert {path.name for path in vault.iterdir()} == {of_weights[-1], of_audit[-1], damaged[-1]}


# Not on this machine.


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    yield "memory://bucket/backups"
    MemoryFileSystem.store.clear()


def test_on_a_remote_file_system_that_fails_now_and_then(
    memory: str, call: Call, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = MemoryFileSystem._open, []

    def flaky(self: MemoryFileSystem, path: str, *given: Any, **more: Any) -> Any:
        calls.append(path)
        if len(calls) % 3 == 1:
            raise TimeoutError("no answer")
        return real(self, path, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "_open", flaky)
        said = call("create", "--from", weights, "--to", memory)
    assert said.code == 0 and "no answer; again in 1 s" in said.err
    assert call("list", "--from", memory + "/").out.split()[0] == said.out.strip()
    assert call("restore", "--from", memory, "--to", tmp_path / "back").code == 0
    assert content(tmp_path / "back")[UNET] == b"u" * 500_000
    assert made(call, memory, weights, more=("--keep", 1)) > ""
    assert len({path.split("/")[3] for path in MemoryFileSystem.store}) == 1


def test_an_upload_that_stays_half_is_no_backup(
    memory: str, call: Call, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vault, "_put", lambda self, path, *_: self.filesystem.pipe_file(path, b"half"))
    said = call("create", "--from", weights, "--to", memory)
    assert (said.code, "the backup was not finished" in said.err) == (2, True)
    assert call("verify", "--from", memory).err == f"error: {memory}: there is no backup\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create", "--from", "nowhere", "--to", "."), "nowhere: no such folder or file"),
        (("create", "--from", "empty", "--to", "."), "empty: holds nothing to save"),
        (("create", "--from", "a/x", "b/x", "--to", "."), "--from: two sources are called x"),
        (("create", "--from", "a", "--to", "not/mounted"), "not/mounted: no such folder; make it first"),
        (("create", "--from", "a", "--to", "bogus://x"), "bogus://x: Protocol not known: bogus"),
        (("create", "--from", "a", "--to", ".", "--keep", "0"), "--keep must be 1 or more"),
        (("create", "--from", "a", "--to", ".", "--keep-days", "3"), "--keep-days needs --keep"),
        (("create", "--to", "."), "the following arguments are required: --from"),
        (("prune", "--from", "."), "the following arguments are required: --keep"),
        (("verify", "--from", "."), "there is no backup"),
        (
            ("verify", "--from", ".", "--backup", "../x"),
            "../x: no name of a backup, such as 20260131T020000.000000Z-1a2b",
        ),
        (
            ("verify", "--from", ".", "--backup", "20260131T020000.000000Z-1a2b"),
            "has no backup 20260131T020000.000000Z-1a2b",
        ),
        (("restore", "--from", ".", "--to", "a"), "there is no backup"),
    ],
)
def test_what_cannot_be_done(
    words: tuple[str, ...], said: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "a/x", "b/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ".hidden").touch()
    refused = call(*words)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert refused.err.startswith("error: ") and said in refused.err


def test_nothing_here_loads_torch() -> None:
    code = "import sys, mlops.backup.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The whole of it.


def test_a_service_whose_folders_are_gone_makes_the_same_brains_after_a_restore(
    call: Call, tmp_path: Path, vault: Path
) -> None:
    """Saved while it works; brought back into empty folders."""
    home = tmp_path / "home"
    asked = {"num": 1, "seed": 7, "steps": 2}

    def brain(running: service.Service) -> dict[str, Any]:
        with running.client() as client:
            job = service.finished(client, client.post("/v1/samples", json=asked).json()["id"])
        assert job["state"] == "done", job
        return {file["name"]: file["sha256"] for file in job["files"] if file["name"].endswith(".gz")}

    with service.running(home) as running:
        before = brain(running)
        with running.client() as client:
            client.post("/v1/samples", json=asked | {"num": 8})
        made(call, vault, home / "data", home / "weights")
    entries = verify(home / "data" / "audit").entries
    shutil.rmtree(home)
    for name in ("data", "weights"):
        assert call("restore", "--from", vault, "--source", name, "--to", home / name).code == 0
    with service.running(home) as running:
        assert brain(running) == before
    found = verify(home / "data" / "audit")
    assert found.problems == [] and 0 < found.entries <= entries + 20
