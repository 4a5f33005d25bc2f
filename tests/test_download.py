"""The data set's way here: a server that breaks, ignores, changes and lies, and archives that reach too far."""

import hashlib
import http.server
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scripts import SECONDS

from ldm3d import archive as archive_room
from ldm3d import transfer
from ldm3d.download import download_dataset
from ldm3d.errors import ConfigError, DataError, OutputError
from ldm3d.transfer import TransferError

TASK = "Task01_BrainTumour"
ROOT = Path(__file__).parents[1]


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, io.BytesIO(content)


def make_tar(*extra: tuple, mode: str = "w") -> bytes:
    """A tiny archive of the data set's form, 2.4 MiB, with `extra` entries at its end."""
    noise = np.random.default_rng(0).bytes(1_200_000)
    described = {
        "training": [{"image": f"./imagesTr/B{i}.nii.gz", "label": f"./labelsTr/B{i}.nii.gz"} for i in (1, 2)],
        "test": ["./imagesTs/B3.nii.gz"],
    }
    entries = [
        entry(f"./{TASK}/dataset.json", json.dumps(described).encode()),
        entry(f"{TASK}/imagesTr", kind=tarfile.DIRTYPE),
        entry(f"{TASK}/imagesTr/._B1.nii.gz", b"attributes of macOS"),
        *(entry(f"{TASK}/imagesTr/B{i}.nii.gz", noise[i:]) for i in (1, 2)),
        *(entry(f"{TASK}/labelsTr/B{i}.nii.gz", b"label") for i in (1, 2)),
        entry(f"{TASK}/imagesTs/B3.nii.gz", b"test"),
        *extra,
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for info, content in entries:
            tar.addfile(info, content)
    return buffer.getvalue()


GOOD = make_tar()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` as a well-behaved server does, but for what a test sets otherwise."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = GOOD, '"one"'
        self.ranges = True  # answer Range with 206
        self.if_range = True  # heed If-Range
        self.with_length = True
        self.breaks: list[int] = []  # close the connection after so many bytes, one entry for each request
        self.statuses: list[int] = []  # answer with these first
        self.before: Callable[[int], None] = lambda number: None
        self.seen: list[str | None] = []  # the Range of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data.tar"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.before(len(server.seen))
        server.seen.append(wanted)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        total, start = len(server.content), 0
        same = not server.if_range or self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.with_length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        body = server.content[start:]
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def waited(monkeypatch) -> list[float]:
    """Nothing really waits; what would have been waited is noted."""
    seconds: list[float] = []
    monkeypatch.setattr(transfer, "_sleep", seconds.append)
    return seconds


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def is_whole(root: Path) -> bool:
    """The data set is there, with nothing beside it."""
    expected = {"dataset.json", "B1.nii.gz", "B2.nii.gz", "B3.nii.gz"}
    found = {path.name for path in root.rglob("*") if path.is_file()}
    return found == expected and (root / TASK / "imagesTr" / "B2.nii.gz").stat().st_size == 1_199_998


def part_of(root: Path) -> Path:
    return root / f"{TASK}.tar.part"


def test_download_checks_and_unpacks(tmp_path, server):
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)
    assert server.seen == [None]


def test_second_call_returns_at_once(tmp_path, server, capsys):
    download_dataset(tmp_path, server.url, md5(GOOD))
    capsys.readouterr()
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert len(server.seen) == 1
    assert "there already" in capsys.readouterr().err


def test_sha256_and_capitals(tmp_path, server):
    download_dataset(tmp_path, server.url, hashlib.sha256(GOOD).hexdigest().upper())
    assert is_whole(tmp_path)


def test_compressed_mirror(tmp_path, server):
    server.content = make_tar(mode="w:gz")
    download_dataset(tmp_path, server.url, md5(server.content))
    assert is_whole(tmp_path)


def test_file_mirror(tmp_path):
    mirror = tmp_path / "mirror.tar"
    mirror.write_bytes(GOOD)
    download_dataset(tmp_path / "data", mirror.as_uri(), md5(GOOD))
    assert is_whole(tmp_path / "data")


def test_broken_connection_is_resumed(tmp_path, server, waited):
    server.breaks = [1_500_000, 300_000]
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)
    assert server.seen == [None, "bytes=1500000-", "bytes=1800000-"]
    assert waited == [1, 1], "progress starts the count again"


def test_resume_in_a_later_run(tmp_path, server):
    server.breaks = [1_000_000] + [0] * 20
    with pytest.raises(TransferError, match="broke"):
        download_dataset(tmp_path, server.url, md5(GOOD))
    assert part_of(tmp_path).read_bytes() == GOOD[:1_000_000]
    server.breaks, server.seen = [], []
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert server.seen == ["bytes=1000000-"]
    assert is_whole(tmp_path)


def test_gives_up_with_growing_waits(tmp_path, server, waited):
    server.statuses = [503] * 100
    with pytest.raises(TransferError, match="503"):
        download_dataset(tmp_path, server.url, md5(GOOD))
    assert waited == [1, 2, 4, 8, 16]


def test_passing_trouble_is_waited_out(tmp_path, server, waited):
    server.statuses = [500, 429]
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)
    assert waited == [1, 2]


def test_not_found_is_final(tmp_path, server, waited):
    server.statuses = [404]
    with pytest.raises(TransferError, match="404"):
        download_dataset(tmp_path, server.url, md5(GOOD))
    assert not waited


def test_server_that_ignores_ranges(tmp_path, server):
    server.ranges, server.breaks = False, [2_000_000]
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)
    assert server.seen == [None, "bytes=2000000-"]


def test_server_that_always_breaks_early_is_given_up(tmp_path, server, waited):
    server.ranges, server.breaks = False, [1000] * 100
    with pytest.raises(TransferError, match="broke after 1000 of"):
        download_dataset(tmp_path, server.url, md5(GOOD))
    assert len(waited) <= 6


@pytest.mark.parametrize("if_range", [True, False])
def test_changed_file_is_not_glued(tmp_path, server, if_range):
    changed = make_tar(entry(f"{TASK}/more", b"more"))

    def change(number: int) -> None:
        if number == 1:
            server.content, server.etag = changed, '"two"'

    server.before, server.if_range, server.breaks = change, if_range, [1_500_000]
    download_dataset(tmp_path, server.url, md5(changed))
    assert (tmp_path / TASK / "more").read_bytes() == b"more"
    assert server.seen == [None, "bytes=1500000-"] + ([] if if_range else [None])


def test_changed_and_shorter_file_is_not_glued(tmp_path, server):
    server.content, server.if_range = GOOD + bytes(500_000), False
    server.breaks = [len(GOOD) + 1000]

    def change(number: int) -> None:
        if number == 1:
            server.content, server.etag = GOOD, '"two"'

    server.before = change
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)


def test_without_a_version_nothing_is_resumed(tmp_path, server):
    server.etag, server.breaks = None, [1_500_000]
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert server.seen == [None, None]
    assert is_whole(tmp_path)


def test_part_of_another_address_is_not_resumed(tmp_path, server):
    part_of(tmp_path).write_bytes(b"x" * 1000)
    Path(f"{part_of(tmp_path)}.json").write_text(json.dumps({"url": "http://other/", "validator": server.etag}))
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert server.seen == [None]
    assert is_whole(tmp_path)


def test_part_that_is_whole_already(tmp_path, server):
    part_of(tmp_path).write_bytes(GOOD)
    Path(f"{part_of(tmp_path)}.json").write_text(json.dumps({"url": server.url, "validator": server.etag}))
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert server.seen == [f"bytes={len(GOOD)}-"]
    assert is_whole(tmp_path)


def test_unknown_length(tmp_path, server):
    server.with_length = False
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)


def test_wrong_checksum_removes_the_file(tmp_path, server):
    server.content = GOOD[:-1] + b"x"
    with pytest.raises(DataError, match=f"md5 is {md5(server.content)}, not {md5(GOOD)}; it was removed"):
        download_dataset(tmp_path, server.url, md5(GOOD))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [("checksum", "123"), ("checksum", "g" * 32), ("url", "ftp://a/b"), ("url", "data.tar"), ("url", "http://[")],
)
def test_nonsense_is_refused(tmp_path, option, value):
    with pytest.raises(ConfigError, match="must be"):
        download_dataset(tmp_path, **{option: value})


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (entry("../evil", b"x"), "leads out"),
        (entry(f"{TASK}/../../evil", b"x"), "leads out"),
        (entry("/tmp/evil", b"x"), "leads out"),
        (entry("C:\\evil", b"x"), "leads out"),
        (entry("other/evil", b"x"), "is not in the folder"),
        (entry(f"{TASK}/evil", kind=tarfile.SYMTYPE, link="/etc"), "is a link or a device"),
        (entry(f"{TASK}/evil", kind=tarfile.LNKTYPE, link=f"{TASK}/dataset.json"), "is a link or a device"),
        (entry(f"{TASK}/evil", kind=tarfile.CHRTYPE), "is a link or a device"),
        (entry(f"{TASK}/evil", kind=tarfile.FIFOTYPE), "is a link or a device"),
    ],
)
def test_unsafe_archives_are_refused_whole(tmp_path, extra, problem):
    root = tmp_path / "deep" / "data"
    root.mkdir(parents=True)
    content = make_tar(extra)
    (root / f"{TASK}.tar").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        download_dataset(root, checksum=md5(content))
    assert [path.name for path in root.iterdir()] == [f"{TASK}.tar"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]


@pytest.mark.parametrize("content", [GOOD[:1_500_000], b"<html>Sign in to the hospital's network</html>", b""])
def test_damaged_archives_leave_nothing(tmp_path, content):
    (tmp_path / f"{TASK}.tar").write_bytes(content)
    with pytest.raises(DataError, match="damaged or not a tar archive"):
        download_dataset(tmp_path, checksum=md5(content))
    assert [path.name for path in tmp_path.iterdir()] == [f"{TASK}.tar"]


def test_incomplete_archive_is_refused(tmp_path):
    described = entry(f"{TASK}/dataset.json", json.dumps({"training": [{"image": "./a", "label": "./b"}]}).encode())
    content = make_tar(described)
    (tmp_path / f"{TASK}.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"2 of the 2 files .* are missing \(first ./a\)"):
        download_dataset(tmp_path, checksum=md5(content))
    assert not (tmp_path / TASK).exists()


def test_given_archive_is_used_and_kept(tmp_path):
    (tmp_path / f"{TASK}.tar").write_bytes(GOOD)
    download_dataset(tmp_path, "http://127.0.0.1:9/", md5(GOOD))
    (tmp_path / f"{TASK}.tar").unlink()
    assert is_whole(tmp_path)


def test_wrong_given_archive_is_kept(tmp_path):
    (tmp_path / f"{TASK}.tar").write_bytes(GOOD)
    with pytest.raises(DataError, match="remove it"):
        download_dataset(tmp_path, checksum="0" * 32)
    assert (tmp_path / f"{TASK}.tar").read_bytes() == GOOD


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "dataset.json is missing"),
        ("[]", "cannot be used"),
        ('{"training": []}', "0 of the 0 files"),
        ('{"training": [{"image": "a", "label": "b"}]}', "2 of the 2 files"),
        ('{"training": [], "phantom": {}}', "embedded data set"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, content, problem):
    (tmp_path / TASK).mkdir()
    if content:
        (tmp_path / TASK / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=problem):
        download_dataset(tmp_path, "http://127.0.0.1:9/")


def free(monkeypatch, size: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_full_disk_is_seen_before_the_download(tmp_path, server, monkeypatch):
    free(monkeypatch, 2 * len(GOOD) - 1)
    with pytest.raises(OutputError, match="GiB of free disk space"):
        download_dataset(tmp_path, server.url, md5(GOOD))
    assert not list(tmp_path.iterdir())
    free(monkeypatch, 2 * len(GOOD))
    download_dataset(tmp_path, server.url, md5(GOOD))


def test_resuming_needs_less_room(tmp_path, server, monkeypatch):
    part_of(tmp_path).write_bytes(GOOD[:2_000_000])
    Path(f"{part_of(tmp_path)}.json").write_text(json.dumps({"url": server.url, "validator": server.etag}))
    free(monkeypatch, 2 * len(GOOD) - 2_000_000)
    download_dataset(tmp_path, server.url, md5(GOOD))
    assert is_whole(tmp_path)


def test_full_disk_is_seen_before_unpacking(tmp_path, monkeypatch):
    (tmp_path / f"{TASK}.tar").write_bytes(GOOD)
    free(monkeypatch, 2_000_000)
    with pytest.raises(OutputError, match="GiB of free disk space"):
        download_dataset(tmp_path, checksum=md5(GOOD))
    assert [path.name for path in tmp_path.iterdir()] == [f"{TASK}.tar"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch, failure):
    def fail_at_third(tar, member, target):
        if member.name.endswith("B2.nii.gz"):
            raise failure
        extract(tar, member, target)

    extract = archive_room._extract
    (tmp_path / f"{TASK}.tar").write_bytes(GOOD)
    monkeypatch.setattr(archive_room, "_extract", fail_at_third)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        download_dataset(tmp_path, checksum=md5(GOOD))
    assert [path.name for path in tmp_path.iterdir()] == [f"{TASK}.tar"]


def test_rest_of_a_killed_run_is_cleared(tmp_path):
    (tmp_path / f".tmp-{TASK}-abc").mkdir()
    (tmp_path / f".tmp-{TASK}-abc" / "half").write_bytes(b"x")
    (tmp_path / f"{TASK}.tar").write_bytes(GOOD)
    download_dataset(tmp_path, checksum=md5(GOOD))
    (tmp_path / f"{TASK}.tar").unlink()
    assert is_whole(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_two_downloads_into_one_folder_are_refused(tmp_path, server):
    import fcntl

    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="another process"):
            download_dataset(tmp_path, server.url, md5(GOOD))
    finally:
        os.close(handle)


def script(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = folder / "environment.json"
    names = ("model_dir", "tfevent_path", "output_dir", "data_base_dir")
    environment.write_text(json.dumps({name: str(folder / name) for name in names}))
    command = [sys.executable, str(ROOT / "download_brats_data.py"), "-e", str(environment), *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> tuple[int, list[str]]:
    _, errors = process.communicate(timeout=SECONDS)
    assert "Traceback" not in errors
    return process.returncode, errors.splitlines()


def test_script_downloads_from_a_breaking_server(tmp_path, server):
    server.breaks = [1_000_000]
    status, lines = outcome(script(tmp_path, "--url", server.url, "--checksum", md5(GOOD)))
    assert status == 0, lines
    assert is_whole(tmp_path / "data_base_dir")
    assert server.seen == [None, "bytes=1000000-"]
    assert lines[-1].endswith("ready")


def test_script_without_a_network_says_what_to_do(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses connections
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/data.tar"
        status, lines = outcome(script(tmp_path, "--url", url))
    assert status == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert lines[-1:] == errors
    for advice in (url, f"{TASK}.tar", str(tmp_path / "data_base_dir"), "--phantom"):
        assert advice in errors[0]


def test_script_reports_a_wrong_checksum(tmp_path, server):
    status, lines = outcome(script(tmp_path, "--url", server.url))
    assert status == 2
    assert lines[-1].startswith("error: ")
    assert "it was removed" in lines[-1]
    assert not list((tmp_path / "data_base_dir").iterdir())


def test_script_interrupted_keeps_what_came(tmp_path, server):
    release = threading.Event()
    server.before = lambda number: release.wait(SECONDS) if number else None
    server.breaks = [1_000_000]
    process = script(tmp_path, "--url", server.url, "--checksum", md5(GOOD))
    part = part_of(tmp_path / "data_base_dir")
    for _ in range(20 * SECONDS):
        if part.is_file() and part.stat().st_size == 1_000_000 and len(server.seen) == 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    status, lines = outcome(process)
    release.set()
    assert status == 130
    assert lines[-1].startswith("interrupted")
    assert part.read_bytes() == GOOD[:1_000_000]


def test_script_makes_the_embedded_data(tmp_path):
    arguments = ("--phantom", "2", "--seed", "4", "--size", "12", "16", "12", "--spacing", "12.8", "--workers", "2")
    status, lines = outcome(script(tmp_path, *arguments))
    assert status == 0, lines
    described = json.loads((tmp_path / "data_base_dir" / TASK / "dataset.json").read_text())
    assert described["phantom"] == {"version": 1, "num": 2, "seed": 4, "shape": [12, 16, 12], "spacing": 12.8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "1"), "--seed needs --phantom"),
        (("--phantom", "2", "--url", "http://a/"), "--url has no meaning with --phantom"),
    ],
)
def test_script_refuses_options_that_would_be_ignored(monkeypatch, capsys, arguments, message):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["download_brats_data.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("download_brats_data").parse()
    assert capsys.readouterr().err.startswith(f"error: {message}")
