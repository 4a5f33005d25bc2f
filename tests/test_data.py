"""ldm3d.data: what an epoch holds, on one process and on two; and real volumes, where they are."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from nifti_files import make_cases, write
from torch.utils.data import DataLoader

from ldm3d import data
from ldm3d.cache import VolumeCache
from ldm3d.cases import Case, find_cases
from ldm3d.data import EpochSampler, PatchDataset, WholeVolumes, prepare_data, train_loader, validation_loader
from ldm3d.errors import ConfigError, DataError
from ldm3d.schema import Config, Environment
from ldm3d.sections import DataConfig

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
ONE_MM = (1.0, 1.0, 1.0)


def config(num_workers: int = 0, **autoencoder_train: object) -> Config:
    network = {"channels": [8, 8], "attention_levels": [False, False], "norm_num_groups": 4}
    train = {"batch_size": 2, "patch_size": [8, 8, 8], "lr": 1e-3, "max_epochs": 1}
    content = {
        "spacing": [1, 1, 1],
        "latent_channels": 2,
        "autoencoder_def": {"latent_channels": 2, **network},
        "autoencoder_train": {**train, "flip": True, **autoencoder_train},
        "diffusion_def": {"in_channels": 2, "out_channels": 2, **network},
        "diffusion_train": train,
        "data": {"num_workers": num_workers, "val_fraction": 0.3},
    }
    return Config.model_validate_json(json.dumps(content))


def environment(folder: Path) -> Environment:
    names = {"model_dir": "model", "tfevent_path": "tf", "output_dir": "out", "data_base_dir": "data"}
    return Environment(**{key: folder / name for key, name in names.items()})


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return make_cases(tmp_path / "data", 7)


@pytest.fixture
def cache(tmp_path: Path, cases: list[Case]) -> VolumeCache:
    cache = VolumeCache(tmp_path / "data" / "cache", ONE_MM)
    cache.build(cases)
    return cache


def numbered(folder: Path, shape: tuple[int, int, int] = (12, 13, 14)) -> tuple[VolumeCache, Case]:
    """A volume in which each voxel has its own value."""
    values = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(np.int32)
    case = Case("numbered", write(folder / "numbered.nii.gz", values))
    return VolumeCache(folder / "cache", ONE_MM), case


def place_of(box: np.ndarray, whole: np.ndarray) -> tuple[tuple[int, ...], bool]:
    """Where a box was cut, and whether it is mirrored left and right."""
    for mirrored in (False, True):
        turned = box[::-1] if mirrored else box
        # The brightest values are clipped to 1 and no longer tell one voxel from another.
        inside = np.argwhere(turned < 1)[0]
        start = np.argwhere(whole == turned[tuple(inside)])[0] - inside
        stop = start + box.shape
        if (start >= 0).all() and np.array_equal(whole[tuple(map(slice, start, stop))], turned):
            return tuple(start.tolist()), mirrored
    raise AssertionError("the box is no part of the volume")


def test_a_crop_is_a_piece_of_the_volume_that_was_scaled_as_a_whole(tmp_path: Path) -> None:
    cache, case = numbered(tmp_path)
    whole = cache.load(case)
    dataset = PatchDataset(cache, [case], (5, 6, 7), random_crop=True, flip=True)
    places = Counter(place_of(dataset[(epoch, 0)]["image"][0].numpy(), whole) for epoch in range(200))
    starts = np.array([start for start, _ in places])
    assert starts.min(axis=0).tolist() == [0, 0, 0]
    assert starts.max(axis=0).tolist() == [7, 7, 7]
    assert 70 < sum(count for (_, mirrored), count in places.items() if mirrored) < 130


def test_items_are_functions_of_seed_epoch_and_visit(cache: VolumeCache, cases: list[Case]) -> None:
    def image(key: tuple[int, int], seed: int = 3) -> torch.Tensor:
        return PatchDataset(cache, cases, (4, 4, 4), seed, random_crop=True)[key]["image"]

    assert torch.equal(image((5, 1)), image((5, 1)))
    assert not torch.equal(image((5, 1)), image((6, 1)))
    assert not torch.equal(image((5, 1)), image((5, 1), seed=4))
    assert not torch.equal(image((5, 1)), image((5, 1 + len(cases))))  # the same volume, visited again


def test_item(cache: VolumeCache, cases: list[Case]) -> None:
    item = PatchDataset(cache, cases, (4, 6, 8))[2]
    assert item["case"] == "c02"
    assert item["image"].shape == (1, 4, 6, 8)
    assert item["image"].dtype == torch.float32
    assert torch.equal(item["image"][0], torch.from_numpy(cache.load(cases[2])[3:7, 3:9]))


def test_a_volume_smaller_than_the_patch_is_padded(cache: VolumeCache, cases: list[Case]) -> None:
    image = PatchDataset(cache, cases, (16, 12, 4), random_crop=True)[0]["image"][0]
    assert not image[:3].any()
    assert not image[13:].any()
    assert image[3:13].any()


def test_whole_volumes_are_padded_to_the_factor(cache: VolumeCache, cases: list[Case]) -> None:
    image = WholeVolumes(cache, cases, 8)[1]["image"][0]
    assert image.shape == (16, 16, 8)
    assert torch.equal(image[3:13, 2:14], torch.from_numpy(cache.load(cases[1])))
    image[3:13, 2:14] = 0
    assert not image.any()


def batches(num: int, size: int, rank: int = 0, ranks: int = 1, epoch: int = 0, start: int = 0) -> list[list]:
    sampler = EpochSampler(num, size, seed=1, rank=rank, ranks=ranks)
    sampler.set_epoch(epoch, start)
    return list(sampler)


def test_an_epoch_begun_in_the_middle_goes_on_as_it_would_have() -> None:
    whole = batches(23, 2, epoch=4)
    assert len(whole) == len(EpochSampler(23, 2, 1)) == 11
    for start in range(12):
        assert batches(23, 2, epoch=4, start=start) == whole[start:]


def test_epochs_have_different_orders() -> None:
    orders = [[visit for batch in batches(23, 2, epoch=epoch) for _, visit in batch] for epoch in (0, 1, 1)]
    assert orders[0] != orders[1] == orders[2]


@pytest.mark.parametrize(("num", "size", "ranks", "steps"), [(23, 2, 3, 3), (24, 2, 3, 4), (12, 4, 3, 1), (7, 1, 2, 3)])
def test_ranks_have_different_volumes_and_as_many_steps(num: int, size: int, ranks: int, steps: int) -> None:
    shares = [batches(num, size, rank, ranks) for rank in range(ranks)]
    assert [len(share) for share in shares] == [steps] * ranks
    volumes = [volume for share in shares for batch in share for _, volume in batch]
    assert len(set(volumes)) == len(volumes) == steps * size * ranks
    assert set(volumes) <= set(range(num))


@pytest.mark.parametrize(("num", "size", "ranks"), [(3, 4, 1), (5, 2, 3), (1, 2, 2)])
def test_too_few_volumes_are_visited_again_to_fill_one_step(num: int, size: int, ranks: int) -> None:
    shares = [batches(num, size, rank, ranks) for rank in range(ranks)]
    visits = [visit for (batch,) in shares for _, visit in batch]
    assert len(set(visits)) == size * ranks
    times = Counter(visit % num for visit in visits)
    assert len(times) == num
    assert max(times.values()) - min(times.values()) <= 1


def epoch_of(loader: DataLoader, epoch: int, start: int = 0) -> list[tuple[list[str], torch.Tensor]]:
    loader.batch_sampler.set_epoch(epoch, start)
    return [(batch["case"], batch["image"]) for batch in loader]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def test_the_number_of_workers_changes_nothing(tmp_path: Path, cases: list[Case]) -> None:
    prepared = prepare_data(config(), environment(tmp_path))
    alone = train_loader(prepared, config(0), "autoencoder")
    helped = train_loader(prepared, config(2), "autoencoder")
    first, second = epoch_of(alone, 0), epoch_of(alone, 1)
    assert not same(first, second)
    assert same(epoch_of(helped, 0), first)
    assert same(epoch_of(helped, 1, start=1), second[1:])
    assert second[0][1].shape == (2, 1, 8, 8, 8)


def test_spawned_workers_load_the_same(cache: VolumeCache, cases: list[Case]) -> None:
    dataset = PatchDataset(cache, cases, (4, 4, 4), random_crop=True, flip=True)
    sampler = EpochSampler(len(cases), 7, seed=0)
    loaders = [
        DataLoader(dataset, batch_sampler=sampler),
        DataLoader(dataset, batch_sampler=sampler, num_workers=1, multiprocessing_context="spawn"),
    ]
    assert same(*(epoch_of(loader, 3) for loader in loaders))


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path, cases: list[Case]) -> None:
    prepared = prepare_data(config(), environment(tmp_path))
    before = torch.get_rng_state()
    epoch_of(train_loader(prepared, config(), "autoencoder"), 0)
    list(validation_loader(prepared, config(), "autoencoder"))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_is_the_same_each_time(tmp_path: Path, cases: list[Case]) -> None:
    prepared = prepare_data(config(), environment(tmp_path))
    held_out = [case.name for case in prepared.split.validation]
    for stage, cfg, shape in [
        ("autoencoder", config(), (1, 1, 10, 12, 8)),
        ("autoencoder", config(val_patch_size=[4, 6, 8]), (1, 1, 4, 6, 8)),
        ("diffusion", config(), (1, 1, 8, 8, 8)),
    ]:
        loader = validation_loader(prepared, cfg, stage)
        runs = [[(batch["case"], batch["image"]) for batch in loader] for _ in range(2)]
        assert same(*runs)
        assert [name for (name,), _ in runs[0]] == held_out
        assert {tuple(image.shape) for _, image in runs[0]} == {shape}


def test_stage_2_cuts_out_of_the_middle(tmp_path: Path, cases: list[Case]) -> None:
    prepared = prepare_data(config(), environment(tmp_path))
    by_name = {case.name: case for case in prepared.split.train}
    for names, images in epoch_of(train_loader(prepared, config(), "diffusion"), 0):
        for name, image in zip(names, images, strict=True):
            assert np.array_equal(image[0], prepared.cache.load(by_name[name])[1:9, 2:10])


def test_preparing_again_gives_the_same_split_from_the_store(tmp_path: Path, cases: list[Case]) -> None:
    split = prepare_data(config(), environment(tmp_path)).split
    assert (len(split.train), len(split.validation)) == (5, 2)
    stored = json.loads((tmp_path / "model" / "split.json").read_text())
    assert stored["validation"] == [case.name for case in split.validation]
    make_cases(tmp_path / "data", 20)
    grown = prepare_data(config(), environment(tmp_path)).split
    assert set(split.train) < set(grown.train)
    assert set(split.validation) < set(grown.validation)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What each of two processes saw of four data sets: one good, three with a flaw that one of the two meets."""
    folders = [tmp_path_factory.mktemp("ranks") / name for name in ("good", "case", "disk", "folder")]
    for folder in folders:
        cases = make_cases(folder / "data_base_dir", 11)
        if folder.name == "case":
            cases[3].image.write_bytes(b"damaged")
    folders[-1].joinpath("data_base_dir").rename(folders[-1] / "elsewhere")
    launch = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(2):
        env = {key: str(value) for key, value in {**launch, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, ROOT / "tests" / "data_on_two_ranks.py", config().model_dump_json(by_alias=True)]
        processes.append(
            subprocess.Popen([*command, *folders], env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
        )
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return {
        folder.name: [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)] for folder in folders
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_ranks_share_the_work_and_see_the_same(two_ranks: dict[str, list[dict]]) -> None:
    one, other = two_ranks["good"]
    assert sorted(one["prepared"] + other["prepared"]) == [f"c{index:02d}" for index in range(11)]
    assert (len(one["prepared"]), len(other["prepared"])) == (6, 5)
    assert one["split"] == other["split"]
    assert one["volumes are right"] == other["volumes are right"] == [True] * 11
    assert one["decoded later"] == other["decoded later"] == []
    assert not set(one["train"]) & set(other["train"])
    assert len(one["train"]) == len(other["train"]) == 4
    assert sorted(one["validation"] + other["validation"]) == one["split"][1]


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("case", "DataError: 1 of 11 cases cannot be used: .*c03"),
        ("disk", "OutputError: disk full on rank 1"),
        ("folder", "DataError: .*there is no such folder"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_both(two_ranks: dict[str, list[dict]], flaw: str, message: str) -> None:
    one, other = two_ranks[flaw]
    assert one == other
    assert re.match(message, one["error"])


needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"real volumes are not there: {REAL}")


@needs_real_data
def test_real_volumes(tmp_path: Path) -> None:
    cases = find_cases(REAL, DataConfig(), 0)
    assert len(cases) == 14
    assert sum(case.label is None for case in cases) == 2
    cache = VolumeCache(tmp_path / "cache", (4, 4, 4))
    assert cache.build(cases) == cases
    shapes = Counter(cache.get(case).shape for case in cases)
    assert shapes == {(60, 60, 39): 12, (46, 54, 46): 2}
    for case in cases:
        volume = cache.load(case)
        assert (volume.min(), volume.max()) == (0, 1)
        # The brain is in the grid's middle third or so, wherever the file's axes pointed.
        assert np.abs(np.argwhere(volume > 0.5).mean(axis=0) / volume.shape - 0.5).max() < 0.15


@needs_real_data
def test_real_cases_without_the_contrast(tmp_path: Path) -> None:
    cases = find_cases(REAL, DataConfig(), 3)
    cache = VolumeCache(tmp_path / "cache", (4, 4, 4))
    with pytest.raises(DataError, match="10 of 14 cases cannot be used: Brats18_CBICA_AAB_1: has no t2: "):
        cache.build(cases)
    names = ["TCGA-DU-7294", "TCGA-FG-6692", "patient07", "patient19"]
    assert [case.name for case in cache.build(cases, "skip")] == names


def test_a_temporary_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.tempfile, "tempdir", "/tmp/" + "long" * 20)
    data._require_short_sockets(0)
    with pytest.raises(ConfigError, match=r"TMPDIR /tmp/longlong.*at most 70 characters, or data.num_workers=0"):
        data._require_short_sockets(1)
    monkeypatch.setattr(data.tempfile, "tempdir", "/tmp")
    data._require_short_sockets(1)
