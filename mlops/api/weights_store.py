"""Copies of weights that never change: what was accepted once is served, whatever happens to its source."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard, Card, DiffusionCard, not_whole, read_card
from ldm3d.errors import OutputError, WeightsError
from ldm3d.files import sha256, write_text
from mlops.api.models_file import registry_version
from mlops.api.records import flush_folder
from mlops.api.registry import download

log = logging.getLogger("ldm3d.service")

FILES = (AUTOENCODER, UNET)
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
NUMPY_FLOATS = ("F16", "F32", "F64")
CHUNK_BYTES = 1024 * 1024
LOCK_SECONDS = 600.0
"""A process that stores weights waits so long for another one that does."""
GRACE_SECONDS = 3600.0
"""A version is kept so long after it was stored or used, although nobody names it: a request may be on its way."""


class StoredVersion(NamedTuple):
    """A copy of weights in the store."""

    digest: str
    """Of the digests of both files; the name of the folder."""
    folder: Path
    weights_sha256: dict[str, str]
    """Digest of each file by its name."""
    card: DiffusionCard
    shape: tuple[int, int, int]
    """Voxels of a volume."""


def store_dir(data_dir: Path) -> Path:
    return data_dir / "models"


def store(source: str, data_dir: Path, max_voxels: int) -> StoredVersion:
    """Copy weights into the store, or find them there.

    Of the source only `autoencoder.safetensors`, `diffusion_unet.safetensors` and, if it is there,
    `reference_profile.json` are read. Symbolic links are followed
    and `../` is allowed: where weights come from is the operator's to say. Tensors that are none of the networks' are
    found when the networks are built, by the worker's trial.

    Args:
        source: a folder, relative to the current one, or `mlflow:NAME@ALIAS`, `mlflow:NAME/VERSION`.
        data_dir: the service's data folder.
        max_voxels: largest volume that is served.

    Raises:
        WeightsError: the weights are missing, damaged, pickled, not finite, too large, or do not belong together.
        ConfigError: MLflow is not installed, or no server is named.
        OutputError: the copy cannot be written.
    """
    models = store_dir(data_dir)
    with _workspace(models) as work:
        registered = registry_version(source)
        folder = download(registered, FILES, work / "download") if registered else Path(source)
        _require_files(folder)
        digests = {name: sha256(folder / name) for name in FILES}
        target = models / _name(digests)
        known = _intact(target, digests)
        copy = target if known else _copied(folder, digests, work / "copy")
        card, shape = _checked(copy, folder, digests, max_voxels)
        if not known:
            for name in FILES:
                _require_finite(copy / name, folder / name)
            _publish(copy, target)
        _bring_profile(folder, target, card)
        os.utime(target)
    return StoredVersion(target.name, target, digests, card, shape)


def touch(data_dir: Path, digest: str) -> None:
    """A version is in use now: it is kept for a while after nobody names it any more."""
    folder = store_dir(data_dir) / digest
    if folder.is_dir():
        os.utime(folder)


def prune(data_dir: Path, keep: set[str]) -> list[str]:
    """Remove versions that nobody needs.

    Args:
        data_dir: the service's data folder.
        keep: digests of the active set's versions and of all unfinished jobs. What was stored or active within
            `GRACE_SECONDS` stays as well.

    Returns:
        Digests of what was removed.
    """
    models = store_dir(data_dir)
    removed = []
    with _workspace(models) as work:
        for folder in sorted(models.iterdir()):
            old = folder.stat().st_mtime < time.time() - GRACE_SECONDS
            if _is_version(folder) and folder.name not in keep and old:
                # Out of sight in one step: half a version is never seen.
                folder.rename(work / folder.name)
                removed.append(folder.name)
    return removed


def _is_version(folder: Path) -> bool:
    return len(folder.name) == 64 and folder.is_dir()


@contextmanager
def _workspace(models: Path) -> Iterator[Path]:
    """A folder of one's own inside the store, which is on the same disk; what a killed process left is removed."""
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / ".lock", timeout=LOCK_SECONDS):
            for leftover in models.glob(".tmp-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=models) as work:
                yield Path(work)
    except Timeout as error:
        raise OutputError(f"{models}: another process stores weights for {LOCK_SECONDS:g} s; try again") from error
    except OSError as error:
        raise OutputError(f"{error.filename or models}: weights cannot be stored: {error.strerror or error}") from error


def _name(digests: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(digests[name] for name in FILES).encode()).hexdigest()


def _intact(folder: Path, digests: dict[str, str]) -> bool:
    return all((folder / name).is_file() and sha256(folder / name) == digests[name] for name in FILES)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; it must hold {' and '.join(FILES)}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing:
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise WeightsError(
            f"{folder}: has no {missing[0]}; {pickles[0]} is pickled, could run code when loaded, and is not served: "
            "give the folder with the .safetensors that training publishes"
        )
    raise WeightsError(f"{folder}: has no {missing[0]}; it must hold {' and '.join(FILES)}")


def _copied(folder: Path, digests: dict[str, str], copy: Path) -> Path:
    """Copy both files, which must still be what their digests say.

    Raises:
        WeightsError: a file was changed meanwhile.
    """
    copy.mkdir()
    for name in FILES:
        if _copy(folder / name, copy / name) != digests[name]:
            raise WeightsError(f"{folder / name}: was changed while it was copied; reload when it is finished")
    return copy


def _copy(source: Path, target: Path) -> str:
    """Copy a file down to the disk; SHA-256 of what was written."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _checked(
    copy: Path, source: Path, digests: dict[str, str], max_voxels: int
) -> tuple[DiffusionCard, tuple[int, int, int]]:
    """Description of the weights and voxels of a volume, where the two files belong together."""
    autoencoder = _card(copy, source, AUTOENCODER, AutoencoderCard)
    card = _card(copy, source, UNET, DiffusionCard)
    if card.autoencoder_sha256 != digests[AUTOENCODER]:
        raise WeightsError(
            f"{source / UNET}: was trained on the latents of another {AUTOENCODER} than the one beside it; "
            "put the two that belong together into one folder"
        )
    channels, *latent = card.latent_shape
    if channels != autoencoder.definition.latent_channels:
        raise WeightsError(
            f"{source / UNET}: makes latents of {channels} channels, {AUTOENCODER} decodes "
            f"{autoencoder.definition.latent_channels}"
        )
    x, y, z = (n * autoencoder.definition.downsampling for n in latent)
    if not 0 < x * y * z <= max_voxels:
        raise WeightsError(
            f"{source}: makes volumes of {x} x {y} x {z} voxels; at most {max_voxels} are served, LDM3D_MAX_VOXELS"
        )
    return card, (x, y, z)


def _card(copy: Path, source: Path, name: str, card_type: type[Card]) -> Card:
    """`read_card` of the copy, whose message names the source."""
    try:
        return read_card(copy / name, card_type)
    except WeightsError as error:
        raise WeightsError(str(error).replace(str(copy / name), str(source / name))) from error


def _require_finite(copy: Path, source: Path) -> None:
    """Refuse NaN and infinity, one tensor at a time. Types that numpy lacks are looked at by the worker's trial."""
    try:
        with safe_open(copy, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if file.get_slice(name).get_dtype() in NUMPY_FLOATS and not np.isfinite(file.get_tensor(name)).all():
                    raise WeightsError(f"{source}: {name} holds NaN or infinity; take other weights, or train again")
    except (SafetensorError, ValueError) as error:
        raise not_whole(source, error) from error


def _publish(copy: Path, target: Path) -> None:
    """Give whole, checked copies their name."""
    for name in FILES:
        (copy / name).chmod(0o444)
    flush_folder(copy)
    if target.is_dir():  # damaged on the disk: mended file by file, as a worker may be reading
        for name in FILES:
            (copy / name).replace(target / name)
    else:
        copy.rename(target)
    flush_folder(target.parent)


def _bring_profile(folder: Path, target: Path, card: DiffusionCard) -> None:
    """Keep what the training data were like beside the copy, for the monitor. Nothing is served less for want of it."""
    # Here, as only a worker stores weights: scipy behind it would make the web process start a quarter more slowly.
    from ldm3d.reference_profile import FILE as PROFILE
    from ldm3d.reference_profile import read_profile

    if not (folder / PROFILE).is_file():
        return
    try:
        if read_profile(folder).trained_on != card.trained_on:
            raise WeightsError(f"{folder / PROFILE}: is of other training data than the weights beside it")
    except WeightsError as error:
        log.warning("%s; it is not used", error.one_line())
        return
    text = (folder / PROFILE).read_text(encoding="utf-8")
    if not (target / PROFILE).is_file() or (target / PROFILE).read_text(encoding="utf-8") != text:
        write_text(target / PROFILE, text)
