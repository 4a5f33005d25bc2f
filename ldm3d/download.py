"""Bring Task01_BrainTumour of the Medical Segmentation Decathlon to its place, checked."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm3d.archive import unpack
from ldm3d.console import log, progress
from ldm3d.errors import ConfigError, DataError, OutputError
from ldm3d.files import require_writable
from ldm3d.phantom import TASK
from ldm3d.transfer import CHUNK, TransferError, download, forget

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task01_BrainTumour.tar"
MD5 = "240a19d752f0d9e9101544901065d872"
ARCHIVE = f"{TASK}.tar"
ALGORITHMS = {32: "md5", 64: "sha256"}


def download_dataset(root: str | Path, url: str = URL, checksum: str = MD5) -> None:
    """Download, check and unpack the data set, unless it is there.

    An archive that lies in `root` already is used and kept; one that was downloaded is removed once it is unpacked.

    Args:
        root: the folder that gets `Task01_BrainTumour` (`data_base_dir` of the environment file).
        url: of the archive.
        checksum: MD5 or SHA-256 of the archive in hexadecimal digits.

    Raises:
        ConfigError: `url` or `checksum` is none.
        DataError: the archive cannot be fetched, is not the right one, or is not safe to unpack; or another or an
            incomplete data set is in the way.
        OutputError: `root` cannot be written to, or the disk is too small.
    """
    root = Path(root)
    algorithm = _algorithm_of(checksum)
    if _is_there(root / TASK):
        log(f"{root / TASK}: is there already")
        return
    require_writable(root)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        archive = root / ARCHIVE
        given = archive.is_file()
        if given:
            log(f"{archive}: is there already, not downloaded again")
            _require_checksum(archive, algorithm, checksum, "remove it to have it downloaded, or give its --checksum")
        else:
            _fetch(url, archive, algorithm, checksum)
        unpack(archive, root, TASK, _require_whole)
        if not given:
            archive.unlink()
    log(f"{root / TASK}: ready")


def _algorithm_of(checksum: str) -> str:
    algorithm = ALGORITHMS.get(len(checksum))
    if algorithm is None or not set(checksum.lower()) <= set("0123456789abcdef"):
        raise ConfigError(f"--checksum {checksum}: must be 32 (MD5) or 64 (SHA-256) hexadecimal digits")
    return algorithm


def _is_there(folder: Path) -> bool:
    if not folder.exists():
        return False
    _require_whole(folder)
    return True


def _require_whole(folder: Path) -> None:
    """Refuse a folder that is not the whole data set.

    Raises:
        DataError: it lacks files that its dataset.json names, has none, or holds the embedded data set.
    """
    advice = "remove the folder and run this again, or use another data_base_dir"
    try:
        described = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        names = [case[part] for case in described["training"] for part in ("image", "label")]
        names += [name for name in described.get("test", []) if isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: its dataset.json is missing or cannot be used; {advice}") from error
    if "phantom" in described:
        raise DataError(f"{folder}: holds the embedded data set, not the Decathlon's; {advice}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise DataError(
            f"{folder}: {len(missing)} of the {len(names)} files that its dataset.json names are missing"
            f"{f' (first {missing[0]})' if missing else ''}; {advice}"
        )


def _fetch(url: str, archive: Path, algorithm: str, checksum: str) -> None:
    part = archive.with_name(f"{ARCHIVE}.part")
    try:
        # What is unpacked takes as much room as the archive, which is not compressed.
        download(url, part, space_factor=1.0)
    except TransferError as error:
        raise TransferError(f"{error}. {_without_network(archive.parent)}") from error
    try:
        _require_checksum(part, algorithm, checksum, "it was removed; run this again, or give a mirror's --checksum")
    except DataError:
        forget(part)
        raise
    part.replace(archive)
    forget(part)


def _without_network(root: Path) -> str:
    return (
        f"Without a network: fetch {URL} elsewhere, put {ARCHIVE} or the unpacked folder {TASK} into {root} and run "
        "this again; or make the embedded data set: python download_brats_data.py -e ENVIRONMENT --phantom 600"
    )


def _require_checksum(path: Path, algorithm: str, checksum: str, advice: str) -> None:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    steps = -(-path.stat().st_size // CHUNK)
    with open(path, "rb") as file:
        for chunk in progress(iter(lambda: file.read(CHUNK), b""), "checking", total=steps, unit="MiB"):
            digest.update(chunk)
    if digest.hexdigest() != checksum.lower():
        raise DataError(f"{path}: {algorithm} is {digest.hexdigest()}, not {checksum.lower()}; {advice}")


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep a second process from writing the same files (where the system can lock a folder)."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{root}: another process is downloading into it") from error
        except OSError:
            log(f"{root}: cannot be locked; do not start a second download into it")
        yield
    finally:
        os.close(handle)
