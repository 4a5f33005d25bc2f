"""ldm3d.files: a file is either whole or as it was."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm3d.errors import OutputError, WeightsError
from ldm3d.files import atomic_path, require_writable, sha256, write_text


@pytest.fixture
def umask() -> Iterator[int]:
    """027: nothing for others."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file.txt"
    with atomic_path(target) as path:
        assert path.parent == target.parent
        path.write_text("half")
        assert not target.exists()
        path.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("name", ["synimg_0_1.nii.gz", "montage.png", "weights.safetensors"])
def test_the_temporary_name_keeps_the_suffix(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / name) as path:
        assert path.name.endswith(name)
        assert path.name.startswith(".")
        path.write_bytes(b"x")


@pytest.mark.parametrize("failure", [ValueError("wrong"), WeightsError("mine"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(type(failure)) as raised, atomic_path(target) as path:
        path.write_text("half")
        raise failure
    assert raised.value is failure
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_an_output_error_that_names_file_and_reason(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with pytest.raises(OutputError) as raised, atomic_path(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some other name")
    assert str(raised.value) == f"{target}: cannot be written: No space left on device"
    assert names(tmp_path) == []


def test_a_disk_that_is_full_when_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems say so only then."""

    def fsync(file: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    target = tmp_path / "file.txt"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match=r"file\.txt: cannot be written: "):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, order = tmp_path / "file.txt", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("flush"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append("rename"), replace(path, to)))
    write_text(target, "text")
    assert order == ["flush", "rename"]


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for action in (
        lambda: write_text(tmp_path / "file" / "inside.txt", ""),
        lambda: require_writable(tmp_path / "file/x"),
    ):
        with pytest.raises(OutputError, match="cannot be written"):
            action()
    assert names(tmp_path) == ["file"]


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "file.txt").mkdir()
    with pytest.raises(OutputError, match=r"file\.txt: cannot be written: "):
        write_text(tmp_path / "file.txt", "")
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.skipif(os.name != "posix", reason="needs permission bits")
def test_others_may_read_the_file_as_far_as_the_umask_allows(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "file.txt", "text")
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~umask == 0o640
    assert os.umask(umask) == umask  # asking for it has not changed it


@pytest.mark.skipif(os.name != "posix", reason="needs permission bits")
@pytest.mark.parametrize(("mode", "expected"), [(None, 0o640), (0o600, 0o600), (0o644, 0o644)])
def test_so_they_may_where_a_writer_puts_a_file_of_its_own(
    mode: int | None, expected: int, tmp_path: Path, umask: int
) -> None:
    with atomic_path(tmp_path / "file.txt", mode) as path:
        own = tmp_path / "own"
        own.touch(0o600)
        own.replace(path)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == expected


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "café")
    assert (tmp_path / "file.txt").read_bytes() == "café".encode()


def test_trying_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    require_writable(tmp_path)
    require_writable(tmp_path / "not" / "there")
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(OutputError, match="/proc/self/results: cannot be written to: "):
        require_writable("/proc/self/results")


def test_digest(tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert len(sha256(tmp_path / "file")) == 64


def test_a_mode_that_is_given_holds_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "secret.json", "{}", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret.json").stat().st_mode) == 0o600
    write_text(tmp_path / "plain.json", "{}")
    assert stat.S_IMODE((tmp_path / "plain.json").stat().st_mode) == 0o666 & ~umask


def test_threads_that_write_at_once_leave_the_umask_alone(tmp_path: Path, umask: int) -> None:
    """Asking for it by setting it, two threads would leave it at 0 for good: files for everybody to write."""
    before, asked = os.umask, []

    def counted(mask: int) -> int:
        asked.append(mask)
        return before(mask)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "umask", counted)
        write_text(tmp_path / "file.txt", "x")
    assert asked == []
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~umask
