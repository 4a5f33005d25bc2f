"""mlops.api.weights_store: what was accepted once stays as it was, and nothing half or foreign gets in."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import served
import tiny
import torch
from safetensors.torch import save_file

from ldm3d.cards import AUTOENCODER, UNET, DiffusionCard
from ldm3d.errors import OutputError, WeightsError
from ldm3d.files import sha256
from ldm3d.sampling import Sampler
from ldm3d.weights import read_weights, save_weights
from mlops.api import weights_store
from mlops.api.weights_store import FILES, GRACE_SECONDS, StoredVersion, prune, store, store_dir

ROOT = Path(__file__).resolve().parents[1]
MANY = 512**3


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody may change it."""
    return served.publish(tmp_path_factory.mktemp("published"))


@pytest.fixture
def weights(published: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(published, tmp_path / "weights"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def versions(data: Path) -> list[str]:
    return sorted(path.name for path in store_dir(data).iterdir() if path.name != ".lock")


def require_whole(stored: StoredVersion, source: Path) -> None:
    assert sorted(path.name for path in stored.folder.iterdir()) == sorted(FILES)
    for name in FILES:
        assert sha256(stored.folder / name) == sha256(source / name) == stored.weights_sha256[name]


# What is stored


def test_a_stored_version_is_a_folder_to_sample_from(published: Path, data: Path) -> None:
    stored = store(str(published), data, MANY)
    require_whole(stored, published)
    assert stored.folder == store_dir(data) / stored.digest and versions(data) == [stored.digest]
    sampler = Sampler.from_folder(stored.folder, tiny.CPU)
    assert sampler.digests == stored.weights_sha256 and sampler.card == stored.card
    assert tuple(sampler.sample(1, [0], steps=1).shape[2:]) == stored.shape == (16, 16, 16)


def test_the_shape_follows_from_the_autoencoder(tmp_path: Path, data: Path) -> None:
    sides = {"autoencoder_def": {"patchify": 2}, "diffusion_train": {"patch_size": [16, 24, 32]}}
    folder = served.publish(tmp_path / "folded", autoencoder_train={"patch_size": [16, 24, 32]}, **sides)
    stored = store(str(folder), data, MANY)
    assert stored.shape == (16, 24, 32)
    assert tuple(Sampler.from_folder(folder, tiny.CPU).sample(1, [0], steps=1).shape[2:]) == stored.shape


def test_storing_twice_makes_one_copy_which_is_not_written_again(published: Path, data: Path) -> None:
    first = store(str(published), data, MANY)
    inode = (first.folder / UNET).stat().st_ino
    assert store(str(published), data, MANY) == first
    assert (first.folder / UNET).stat().st_ino == inode and versions(data) == [first.digest]


def test_a_source_that_is_replaced_in_place_changes_nothing_that_was_accepted(
    weights: Path, published: Path, tmp_path: Path, data: Path
) -> None:
    first = store(str(weights), data, MANY)
    other = served.publish(tmp_path / "other", seed=1)
    for name in FILES:
        shutil.copyfile(other / name, weights / name)  # into the same file
    require_whole(first, published)
    second = store(str(weights), data, MANY)
    require_whole(second, other)
    require_whole(first, published)
    assert first.digest != second.digest and versions(data) == sorted([first.digest, second.digest])


def test_only_the_two_files_are_taken(weights: Path, data: Path) -> None:
    (weights / "evil.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (weights / "discriminator.safetensors").write_bytes(b"anything")
    require_whole(store(str(weights), data, MANY), weights)


def test_links_are_followed_and_copies_are_files(weights: Path, published: Path, tmp_path: Path, data: Path) -> None:
    (weights / UNET).unlink()
    (weights / UNET).symlink_to(published / UNET)
    (tmp_path / "link").symlink_to(weights)
    stored = store(str(tmp_path / "link" / ".." / "link"), data, MANY)
    require_whole(stored, published)
    assert not any((stored.folder / name).is_symlink() for name in FILES)


def test_a_copy_that_is_damaged_on_the_disk_is_mended(published: Path, data: Path) -> None:
    stored = store(str(published), data, MANY)
    damaged = stored.folder / UNET
    damaged.chmod(0o644)
    with open(damaged, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\1\0")
    assert sha256(damaged) != stored.weights_sha256[UNET]
    require_whole(store(str(published), data, MANY), published)


# What is refused


def damaged(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-10])


def foreign(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / UNET)


def not_safetensors(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / UNET)


def pickled(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "diffusion_unet.pt")


def missing(folder: Path) -> None:
    (folder / UNET).unlink()


def swapped(folder: Path) -> None:
    shutil.copy(folder / AUTOENCODER, folder / UNET)


def of_another_autoencoder(folder: Path) -> None:
    other = served.publish(folder / "other", seed=1)
    shutil.copy(other / AUTOENCODER, folder / AUTOENCODER)


def of_other_channels(folder: Path) -> None:
    """The U-Net's card names this autoencoder, which decodes other latents."""
    tensors, card = read_weights(folder / UNET, DiffusionCard)
    card = card.model_copy(update={"latent_shape": (4, *card.latent_shape[1:])})
    save_weights(folder / UNET, tensors, card)


def not_finite(folder: Path) -> None:
    tensors, card = read_weights(folder / UNET, DiffusionCard)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_weights(folder / UNET, tensors, card)


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damaged, "diffusion_unet.safetensors: not a whole safetensors file"),
        (foreign, "diffusion_unet.safetensors: has no description of its network"),
        (not_safetensors, "diffusion_unet.safetensors: not a whole safetensors file"),
        (pickled, r"diffusion_unet.pt is pickled, could run code when loaded, and is not served: give the folder with"),
        (missing, "has no diffusion_unet.safetensors; it must hold autoencoder.safetensors and"),
        (swapped, "diffusion_unet.safetensors: is not DiffusionCard"),
        (of_another_autoencoder, "was trained on the latents of another autoencoder.safetensors"),
        (of_other_channels, "makes latents of 4 channels, autoencoder.safetensors decodes 3"),
        (not_finite, "diffusion_unet.safetensors: .* holds NaN or infinity"),
        (gone, "no such folder; it must hold"),
    ],
)
def test_what_cannot_be_served_is_refused(spoil: Callable[[Path], None], said: str, weights: Path, data: Path) -> None:
    spoil(weights)
    with pytest.raises(WeightsError, match=said) as caught:
        store(str(weights), data, MANY)
    assert str(caught.value).startswith(str(weights)) and "\n" not in str(caught.value)
    assert versions(data) == []


def test_volumes_that_are_too_large_are_refused_also_where_they_were_accepted_before(
    published: Path, data: Path
) -> None:
    with pytest.raises(WeightsError, match="16 x 16 x 16 voxels; at most 4095 are served, LDM3D_MAX_VOXELS"):
        store(str(published), data, 4095)
    assert versions(data) == []
    assert store(str(published), data, 4096).shape == (16, 16, 16)
    with pytest.raises(WeightsError, match="at most 4095"):
        store(str(published), data, 4095)


def test_a_file_that_changes_while_it_is_copied_is_refused(
    weights: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = weights_store._copy

    def change_and_copy(source: Path, target: Path) -> str:
        if source.name == UNET:
            with open(source, "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\1\0")
        return copy(source, target)

    monkeypatch.setattr(weights_store, "_copy", change_and_copy)
    with pytest.raises(WeightsError, match="was changed while it was copied"):
        store(str(weights), data, MANY)
    assert versions(data) == []


# Killed, full, at once


STORE = """
import json, os, sys
sys.path.insert(0, "tests")
import faults
from pathlib import Path
from mlops.api import weights_store

def half_a_file():
    def copy(source, target):
        target.write_bytes(source.read_bytes()[:1000])
        os.kill(os.getpid(), 9)
    weights_store._copy = copy

source, data, (name, *arguments) = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
{**vars(faults), "half_a_file": half_a_file, "nothing": lambda: None}[name](*arguments)
try:
    print(weights_store.store(source, data, 512**3).digest)
except weights_store.OutputError as error:
    sys.exit(f"error: {error}")
"""


def storing(source: Path, data: Path, *fault: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", STORE, str(source), str(data), json.dumps(fault)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.parametrize(
    ("fault", "accepted"),
    [
        (("half_a_file",), False),
        (("signal_at_call", "SIGKILL", "mlops.api.weights_store:_copy", 2), False),
        (("signal_at_call", "SIGKILL", "mlops.api.weights_store:_publish", 1), False),
        (("signal_at_call", "SIGKILL", "pathlib:Path.rename", 1), False),
        (("signal_after_call", "SIGKILL", "pathlib:Path.rename", 1), True),
    ],
    ids=["half a file", "between the files", "before publishing", "before the name", "after the name"],
)
def test_killed_in_the_middle_nothing_half_is_seen(
    fault: tuple[object, ...], accepted: bool, published: Path, data: Path
) -> None:
    killed = storing(published, data, *fault)
    _, said = killed.communicate(timeout=240)
    assert killed.returncode == -9, said
    seen = [name for name in versions(data) if not name.startswith(".tmp-")]
    assert len(seen) == accepted and len(versions(data)) == len(seen) + 1, versions(data)
    stored = store(str(published), data, MANY)
    require_whole(stored, published)
    assert versions(data) == [stored.digest] and (not seen or seen == [stored.digest])


def test_a_full_disk_is_said_and_leaves_nothing(published: Path, data: Path) -> None:
    full = storing(published, data, "full_disk", 10_000)
    _, said = full.communicate(timeout=240)
    assert full.returncode == 1 and said.startswith("error: ") and "weights cannot be stored: File too large" in said
    assert versions(data) == []


def test_several_processes_store_at_once(published: Path, data: Path) -> None:
    others = [storing(published, data, "nothing") for _ in range(3)]
    digests = {other.communicate(timeout=240)[0].strip() for other in others}
    stored = store(str(published), data, MANY)
    assert digests == {stored.digest} and versions(data) == [stored.digest]
    require_whole(stored, published)


def test_who_waits_for_another_process_too_long_says_so(
    published: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_store, "LOCK_SECONDS", 0.1)
    with weights_store._workspace(store_dir(data)), pytest.raises(OutputError, match="another process stores weights"):
        store(str(published), data, MANY)


# What is removed


def test_what_nobody_needs_is_removed_after_a_while(published: Path, tmp_path: Path, data: Path) -> None:
    kept, unneeded, recent = (
        store(str(folder), data, MANY)
        for folder in (published, served.publish(tmp_path / "b", 1), served.publish(tmp_path / "c", 2))
    )
    long_ago = time.time() - GRACE_SECONDS - 10
    for stored in (kept, unneeded):
        os.utime(stored.folder, (long_ago, long_ago))
    (store_dir(data) / ".tmp-left").mkdir()
    assert prune(data, {kept.digest}) == [unneeded.digest]
    assert versions(data) == sorted([kept.digest, recent.digest])
    assert prune(data, {kept.digest}) == []


def test_a_version_that_is_asked_for_again_counts_as_recent(published: Path, data: Path) -> None:
    stored = store(str(published), data, MANY)
    long_ago = time.time() - GRACE_SECONDS - 10
    os.utime(stored.folder, (long_ago, long_ago))
    store(str(published), data, MANY)
    assert prune(data, set()) == []
    os.utime(stored.folder, (long_ago, long_ago))
    weights_store.touch(data, stored.digest)
    assert prune(data, set()) == []
