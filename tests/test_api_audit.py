"""mlops.api.audit: what was written stays as it was written, or somebody sees it."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ldm3d.errors import DataError, OutputError
from mlops.api.audit import AuditLog
from mlops.api.audit_chain import CURRENT, START, make_line, verify
from mlops.api.callers import Caller, Role

ROOT = Path(__file__).resolve().parents[1]
ADA = Caller("key:abcd1234", "ada", Role.OPERATOR)
KEY = "ldm3d_abcd1234_" + "s3cretS" * 6 + "x"
KIB = 1 / 1024


def write(folder: Path, number: int, max_mib: float = 64) -> AuditLog:
    log = AuditLog(folder, max_mib)
    for i in range(number):
        log.record("POST /v1/samples", 202, ADA, job=f"{i:026d}", address="127.0.0.1", request_id=f"r{i}")
    return log


def lines(folder: Path) -> list[bytes]:
    return (folder / CURRENT).read_bytes().splitlines(keepends=True)


def entries(folder: Path) -> list[dict[str, Any]]:
    files = [*sorted(folder.glob("audit-*.jsonl")), folder / CURRENT]
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mlops.api.audit", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_entry_says_who_what_when_and_what_came_of_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", 1)
    log.record("DELETE /v1/jobs/{id}", 204, ADA, job="0" * 26, address="192.0.2.1", request_id="r1")
    log.record("GET /v1/me", 401, address="192.0.2.2")
    first, second = entries(tmp_path / "audit")
    when = datetime.fromisoformat(first.pop("time"))
    assert when.utcoffset() is not None and abs(time.time() - when.timestamp()) < 60
    assert first.pop("hash") == second["previous"]
    assert first == {
        "seq": 1,
        "caller": "key:abcd1234",
        "role": "operator",
        "what": "DELETE /v1/jobs/{id}",
        "job": "0" * 26,
        "outcome": 204,
        "address": "192.0.2.1",
        "request": "r1",
        "previous": "0" * 64,
    }
    assert (second["caller"], second["role"], second["outcome"]) == (None, None, 401)


def test_files_are_the_owners_alone_and_only_grow(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    log = write(folder, 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    before = (folder / CURRENT).read_bytes()
    log.record("x", 200)
    assert (folder / CURRENT).read_bytes().startswith(before)
    assert os.get_inheritable(log._file) is False
    flags = Path(f"/proc/self/fdinfo/{log._file}").read_text()
    assert int(re.search(r"flags:\s+(\d+)", flags)[1], 8) & os.O_APPEND


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 2)
    found = verify(tmp_path)
    assert (found.entries, found.last.seq, found.problems, found.notices) == (5, 5, [], [])


HOSTILE = [
    'x"\n{"seq":9}\n',
    "\r\n\x00\x1b[31mred\x7f\x9b2J",
    "\u2028\u2029\u202e\ud800 😀",
    "é" * 10_000,
    '\\"},"hash":"' + "0" * 64 + '"}',
    "😀" * 5000,
]


def test_hostile_text_stays_in_its_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, 1)
    for text in HOSTILE:
        log.record(text, text, Caller(f"oidc:{text}", text, Role.VIEWER), text, text, text)
    content = (tmp_path / CURRENT).read_bytes()
    assert set(content) <= {*range(0x20, 0x7F), 0x0A} and content.count(b"\n") == len(HOSTILE)
    assert max(map(len, lines(tmp_path))) < 20_000
    for entry, text in zip(entries(tmp_path), HOSTILE, strict=True):
        assert entry["caller"] == f"oidc:{text}"[:256] and entry["what"] == text[:256]
    assert verify(tmp_path).problems == []


def test_long_text_takes_no_longer(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, 1)
    started = time.process_time()
    log.record("eyJ" * 100_000, 200)
    assert time.process_time() - started < 1


def test_keys_and_tokens_are_never_written(tmp_path: Path) -> None:
    token = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ1MSJ9.c2lnbmF0dXJl"
    log = AuditLog(tmp_path, 1)
    for secret in (KEY, token, f"Bearer {KEY}", f"a{token}/b", KEY * 3, "x" * 240 + KEY):
        log.record(f"GET {secret}", secret, ADA, secret, secret, secret)
    text = (tmp_path / CURRENT).read_text()
    assert "s3cret" not in text and "eyJz" not in text and "c2ln" not in text
    assert "ldm3d_abcd1234_..." in text, "whose key it was may be said"


# ---------------------------------------------------------------- tampering


def change(folder: Path, edit: Callable[[list[bytes]], list[bytes]]) -> list[str]:
    (folder / CURRENT).write_bytes(b"".join(edit(lines(folder))))
    return verify(folder).problems


def forge(after: bytes, **content: Any) -> bytes:
    """A line with a hash of its own that fits behind another."""
    entry = json.loads(after)
    return make_line(START._replace(seq=entry["seq"], hash=entry["hash"]), content)[0]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda all: [all[0].replace(b'"outcome":202', b'"outcome":404'), *all[1:]], ["line 1: changed"]),
        (lambda all: [*all[:-1], all[-1].replace(b"202", b"204")], ["line 6: changed"]),
        (lambda all: [*all[:2], all[2].replace(b"key:", b"KEY:"), *all[3:]], ["line 3: changed"]),
        (lambda all: [*all[:2], b"\n", *all[2:]], ["line 3: changed or inserted"]),
        (lambda all: all[1:], ["line 1: entry 1 is missing before it"]),
        (lambda all: [*all[:2], *all[4:]], ["line 3: entries 3 to 4 are missing before it"]),
        (
            lambda all: [all[0], all[2], all[1], *all[3:]],
            ["line 2: entry 2 is missing before it", "line 3: entry 2 does not belong here: inserted or moved"],
        ),
        (lambda all: [*all[:3], all[1], *all[3:]], ["line 4: entry 2 does not belong here: inserted or moved"]),
        (
            lambda all: [*all[:2], forge(all[1], what="x"), *all[2:]],
            ["line 4: entry 3 does not belong here", "line 5: entry 4 does not follow from the one before"],
        ),
        (
            lambda all: [*all[:2], forge(all[1], what="x"), *all[3:]],
            ["line 4: entry 4 does not follow from the one before: one of them was replaced"],
        ),
        (lambda all: [*all[:3], all[3][:50] + b"\n", *all[4:]], ["line 4: changed"]),
        (lambda all: [*all[:3], b"[" * 9000 + b"\n", *all[4:]], ["line 4: changed"]),
    ],
    ids=[
        "first changed",
        "last changed",
        "middle changed",
        "blank line",
        "first missing",
        "two missing",
        "moved",
        "repeated",
        "forged and inserted",
        "forged in place",
        "cut short in the middle",
        "nonsense",
    ],
)
def test_tampering_is_found_where_it_is(tmp_path: Path, edit: Any, says: list[str]) -> None:
    write(tmp_path, 6)
    assert verify(tmp_path).problems == []
    problems = change(tmp_path, edit)
    assert len(problems) == len(says), problems
    for problem, expected in zip(problems, says, strict=True):
        assert problem.startswith(f"{CURRENT} {expected}")
    assert command("verify", "--folder", tmp_path).returncode == 1


def test_lines_at_the_end_are_missed_by_a_hash_that_was_kept(tmp_path: Path) -> None:
    write(tmp_path, 4)
    kept = entries(tmp_path)[2]["hash"]
    assert command("verify", "--folder", tmp_path, "--last", kept).returncode == 0, "the log may have grown since"
    assert change(tmp_path, lambda all: all[:2]) == []
    done = command("verify", "--folder", tmp_path, "--last", kept)
    assert done.returncode == 1 and f"no entry has the hash {kept}: the end was cut off" in done.stdout


def test_lines_that_vanish_while_the_service_runs_leave_a_gap(tmp_path: Path) -> None:
    log = write(tmp_path, 4)
    assert change(tmp_path, lambda all: all[:2]) == []
    log.record("x", 200)
    assert verify(tmp_path).problems == [f"{CURRENT} line 3: entries 3 to 4 are missing before it"]
    (tmp_path / CURRENT).unlink()
    log.record("x", 200)
    assert verify(tmp_path).problems == [f"{CURRENT} line 1: entries 1 to 5 are missing before it"]


def test_nothing_follows_a_changed_last_line(tmp_path: Path) -> None:
    log = write(tmp_path, 2)
    (tmp_path / CURRENT).write_bytes(b"".join(lines(tmp_path)).replace(b'"job":"' + b"0" * 25 + b"1", b'"job":"x'))
    before = (tmp_path / CURRENT).read_bytes()
    for attempt in (lambda: AuditLog(tmp_path, 1), lambda: log.record("x", 200)):
        with pytest.raises(DataError, match="last line is not as it was written"):
            attempt()
    assert (tmp_path / CURRENT).read_bytes() == before


def test_the_command_says_how_many_and_the_last_hash(tmp_path: Path) -> None:
    write(tmp_path, 3)
    done = command("verify", "--folder", tmp_path)
    last = entries(tmp_path)[-1]["hash"]
    assert done.returncode == 0 and f"3 entries in 1 files, the last is 3, its hash {last}\n" in done.stdout
    assert "only verify --last HASH" in done.stdout
    missing = command("verify", "--folder", tmp_path / "none")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1


def test_entries_are_shown_by_caller_and_time(tmp_path: Path) -> None:
    log = write(tmp_path, 2)
    log.record("GET /v1/me", 401)
    shown = command("show", "--folder", tmp_path, "--caller", ADA.id)
    assert [json.loads(line)["seq"] for line in shown.stdout.splitlines()] == [1, 2]
    assert len(command("show", "--folder", tmp_path, "--since", "2020-01-01").stdout.splitlines()) == 3
    assert command("show", "--folder", tmp_path, "--since", "2999-01-01T00:00:00+02:00").stdout == ""
    refused = command("show", "--folder", tmp_path, "--since", "yesterday")
    assert refused.returncode == 2 and "'yesterday' is no time such as 2026-01-31" in refused.stderr


# ---------------------------------------------------------------- rotation


def test_rotation_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 25, max_mib=2 * KIB)
    write(tmp_path, 25, max_mib=2 * KIB)
    files = sorted(tmp_path.glob("audit-*.jsonl"))
    assert len(files) > 5 and all(path.stat().st_size <= 2048 for path in [*files, tmp_path / CURRENT])
    assert [entry["seq"] for entry in entries(tmp_path)] == [*range(1, 51)]
    assert all(json.loads(path.open().readline())["seq"] == int(path.stem[6:]) for path in files)
    found = verify(tmp_path)
    assert (found.entries, found.files, found.problems) == (50, len(files) + 1, [])


def test_a_file_that_is_missing_or_cut_is_found(tmp_path: Path) -> None:
    write(tmp_path, 30, max_mib=2 * KIB)
    files = sorted(tmp_path.glob("audit-*.jsonl"))
    middle = files[2].read_bytes()
    files[2].unlink()
    first, after = int(files[2].stem[6:]), int(files[3].stem[6:])
    assert verify(tmp_path).problems == [
        f"{files[3].name} line 1: entries {first} to {after - 1} are missing before it"
    ]
    files[2].write_bytes(middle[:-20])
    assert verify(tmp_path).problems == [f"{files[3].name} line 1: entry {after - 1} is missing before it"]


def test_old_files_may_be_removed_on_purpose(tmp_path: Path) -> None:
    write(tmp_path, 30, max_mib=2 * KIB)
    files = sorted(tmp_path.glob("audit-*.jsonl"))
    kept = json.loads(files[1].read_text().splitlines()[-1])["hash"]
    files[0].unlink()
    files[1].unlink()
    assert command("verify", "--folder", tmp_path).returncode == 1
    assert command("verify", "--folder", tmp_path, "--after", kept).returncode == 0
    assert command("verify", "--folder", tmp_path, "--after", "f" * 64).returncode == 1


def test_killed_between_renaming_and_going_on(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / CURRENT).rename(tmp_path / "audit-000000000001.jsonl")
    write(tmp_path, 1)
    (tmp_path / CURRENT).rename(tmp_path / "audit-000000000004.jsonl")
    (tmp_path / CURRENT).touch()
    write(tmp_path, 1)
    assert (verify(tmp_path).entries, verify(tmp_path).problems) == (5, [])


# ---------------------------------------------------------------- kills and full disks


@pytest.mark.parametrize("rest", [1, 40, -70, -2])
def test_a_line_that_a_kill_cut_short_is_no_tampering(tmp_path: Path, rest: int) -> None:
    write(tmp_path, 4)
    *whole, last = lines(tmp_path)
    (tmp_path / CURRENT).write_bytes(b"".join(whole) + last[:rest])
    size = len(last[:rest])
    notice = f"{CURRENT} line 4: {size} bytes of an entry whose writing was interrupted"
    assert (verify(tmp_path).problems, verify(tmp_path).notices) == ([], [notice])
    write(tmp_path, 2)
    found = verify(tmp_path)
    assert (found.entries, found.problems, found.notices) == (6, [], [notice])
    assert entries_of(tmp_path, "interrupted entry")[0]["damaged"]["bytes"] == size
    done = command("verify", "--folder", tmp_path)
    assert done.returncode == 0 and f"notice: {notice}" in done.stdout
    changed = change(tmp_path, lambda all: [*all[:3], all[3].replace(b"{", b"["), *all[4:]])
    assert changed == [f"{CURRENT} line 4: changed or inserted"], "what the record says of the torn line counts"


def entries_of(folder: Path, what: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines(folder) if line.endswith(b'"}\n')]
    return [entry for entry in found if entry["what"] == what]


def test_a_line_that_lacks_only_its_newline_counts(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / CURRENT).write_bytes(b"".join(lines(tmp_path))[:-1])
    assert (verify(tmp_path).entries, verify(tmp_path).problems, verify(tmp_path).notices) == (3, [], [])
    write(tmp_path, 1)
    found = verify(tmp_path)
    assert (found.entries, found.problems, found.notices) == (4, [], [])


def test_a_first_line_that_was_cut_short(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / CURRENT).write_bytes(lines(tmp_path)[0][:30])
    write(tmp_path, 1)
    found = verify(tmp_path)
    assert (found.entries, found.problems, len(found.notices)) == (2, [], 1)


WRITER = """
import itertools, sys
from pathlib import Path
from mlops.api.audit import AuditLog
from mlops.api.callers import Caller, Role
folder, name, number, max_mib = sys.argv[1:]
log = AuditLog(Path(folder), float(max_mib))
print("ready", flush=True)
sys.stdin.readline()
caller = Caller(name, name, Role.VIEWER)
for i in range(int(number)) if int(number) else itertools.count():
    log.record("GET /v1/jobs", i, caller)
    if not int(number):
        print(i, flush=True)
"""


def writer(folder: Path, name: str, number: int = 0, max_mib: float = 64) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), name, str(number), str(max_mib)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdin and process.stdout.readline() == "ready\n"
    return process


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def test_a_file_that_has_just_begun_is_empty(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, 1)
    log.record("GET /v1/jobs", 200)
    (tmp_path / CURRENT).rename(tmp_path / "audit-000000000001.jsonl")
    (tmp_path / CURRENT).touch()
    found = verify(tmp_path)
    assert (found.entries, found.problems, found.notices) == (1, [], [])


def test_processes_and_threads_write_one_chain(tmp_path: Path) -> None:
    processes = [writer(tmp_path, name, 400, 16 * KIB) for name in ("a", "b")]
    for process in processes:
        start(process)
    log = AuditLog(tmp_path, 16 * KIB)
    own = [Caller(name, name, Role.VIEWER) for name in ("c", "d")]
    threads = [
        threading.Thread(target=lambda who=who: [log.record("GET /v1/jobs", i, who) for i in range(200)]) for who in own
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert verify(tmp_path).problems == verify(tmp_path).notices == [], "a look at a log that is being written"
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    found = verify(tmp_path)
    assert (found.entries, found.problems, found.notices) == (1200, [], []) and found.files > 5
    by_caller: dict[str, list[int]] = {}
    for entry in entries(tmp_path):
        by_caller.setdefault(entry["caller"], []).append(entry["outcome"])
    assert by_caller == {"a": [*range(400)], "b": [*range(400)], "c": [*range(200)], "d": [*range(200)]}
    changes = sum(
        one["caller"] != two["caller"] for one, two in zip(entries(tmp_path), entries(tmp_path)[1:], strict=False)
    )
    assert changes > 4, "they did not write at once"


def test_kill_9_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    for _ in range(3):
        process = writer(tmp_path, "a", max_mib=8 * KIB)
        start(process)
        assert process.stdout
        for line in process.stdout:
            if int(line) >= 50:
                break
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.communicate()[0].splitlines() if line.isdigit()]
        last = max([50, *said[:-1]])
        log = AuditLog(tmp_path, 8 * KIB)  # the dead process's lock is free
        log.record("restarted", 200)
        found = verify(tmp_path)
        assert found.problems == []
        own = [entry["outcome"] for entry in entries(tmp_path) if entry["what"] == "GET /v1/jobs"]
        assert max(own[-(last + 5) :]) >= last


def test_a_fork_does_not_share_its_parents_lock(tmp_path: Path) -> None:
    log = write(tmp_path, 1)
    shared = os.fstat(log._lock), log._lock
    child = os.fork()
    if not child:
        for i in range(200):
            log.record("child", i)
        same_file = os.path.samestat(os.fstat(log._lock), shared[0])
        os._exit(0 if same_file and log._lock != shared[1] else 1)  # opened anew
    for i in range(200):
        log.record("parent", i)
    assert os.waitpid(child, 0)[1] == 0
    found = verify(tmp_path)
    assert (found.entries, found.problems) == (401, [])


FULL = """
import resource, sys
from pathlib import Path
from ldm3d.errors import OutputError
from mlops.api.audit import AuditLog
log = AuditLog(Path(sys.argv[1]), 64)
log.record("first", 200)
size = (Path(sys.argv[1]) / "audit.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        log.record("second", 200)
    except OutputError as error:
        print(error)
assert (Path(sys.argv[1]) / "audit.jsonl").stat().st_size == size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.record("third", 200)
"""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written: ") == 2
    found = verify(tmp_path)
    assert (found.entries, found.problems, found.notices) == (2, [], [])


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        AuditLog(tmp_path / "file" / "audit", 1)
