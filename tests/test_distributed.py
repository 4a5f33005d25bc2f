"""ldm3d.distributed, and what the library does with it: one process and two give the same."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encoding_on_two_ranks
import library_on_two_ranks
import numpy as np
import pytest
import tiny
import torch
from torch.distributed import TCPStore

from ldm3d import distributed
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.checkpoint import Checkpoints
from ldm3d.errors import CheckpointError, ConfigError
from ldm3d.rendezvous import begun_before, note_beginning
from ldm3d.run import how_to_start

ROOT = Path(__file__).parents[1]
Seen = dict[str, Any]


# One process


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_one_process_is_the_whole_world() -> None:
    assert not distributed.launched_by_torchrun()
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.is_main()
    value = torch.tensor([1.0, 2.0])
    assert distributed.all_sum(value) is value
    assert value.tolist() == [1, 2]
    thing = object()
    assert distributed.gather_objects(thing) == [thing]
    assert distributed.broadcast_object(thing) is thing
    assert distributed.all_max([1, 0.5]) == [1, 0.5]
    distributed.barrier()


@pytest.mark.usefixtures("alone")
def test_one_process_joins_nothing() -> None:
    with distributed.process_group("gloo", 5) as device:
        assert device == distributed.choose_device()
        assert not torch.distributed.is_initialized()


def test_only_rank_0_speaks_before_the_processes_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.launched_by_torchrun()
    assert not distributed.is_main()
    assert distributed.local_rank() == 1
    monkeypatch.setenv("RANK", "0")
    assert distributed.is_main()


def test_each_process_takes_the_gpu_of_its_place_on_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 5 of 8 on two machines is the second process of the second one: GPU 1, not GPU 5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.choose_device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device() == tiny.CPU


@pytest.mark.parametrize(
    ("gpus", "available", "processes", "message"),
    [
        (-1, 0, 1, "-g -1: the number of GPUs must be 0 (CPU) or more"),
        (1, 0, 1, "-g 1: this machine has 0 GPU(s); use -g 0 or leave -g out"),
        (8, 4, 8, "-g 8: this machine has 4 GPU(s); use -g 4 or leave -g out"),
        (4, 4, 1, "-g 4: 1 process(es) were started on this machine; start one for each GPU: torchrun"),
        (2, 4, 4, "-g 2: 4 process(es) were started on this machine; start one for each GPU: torchrun"),
    ],
)
def test_gpus_that_cannot_be_had(
    gpus: int, available: int, processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError) as refused:
        distributed.check_gpus(gpus)
    assert message in str(refused.value)


@pytest.mark.parametrize(("gpus", "available", "processes"), [(None, 0, 2), (0, 0, 1), (0, 0, 2), (1, 4, 1), (4, 4, 4)])
def test_gpus_that_can_be_had(
    gpus: int | None, available: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    distributed.check_gpus(gpus)


# Two processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run library_on_two_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    assert on_two_ranks("library_on_two_ranks.py", folder) == [0, 0]
    return folder


def on_two_ranks(script: str, *arguments: object) -> list[int]:
    """Exit statuses of two processes of a script in `tests`."""
    launch = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(2):
        env = {key: str(value) for key, value in {**launch, "RANK": rank, "LOCAL_RANK": rank}.items()}
        # One thread, here and there: sums in another order are other sums.
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / "tests" / script, *map(str, arguments)]
        processes.append(subprocess.Popen(command, env={**os.environ, **env}, cwd=ROOT))
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Seen]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_helpers_of_two_processes(ranks: list[Seen]) -> None:
    for rank, seen in enumerate(ranks):
        assert seen["helpers"] == {
            "rank": rank,
            "world_size": 2,
            "is_main": rank == 0,
            "sum": [2, 10],
            "gathered": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from 0",
        }


def test_ranks_draw_different_random_numbers(ranks: list[Seen]) -> None:
    assert not torch.equal(ranks[0]["random"], ranks[1]["random"])
    assert torch.equal(ranks[0]["random"], library_on_two_ranks.random_numbers())


@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_the_latent_cache_of_one(folder: Path, ranks: list[Seen], tmp_path: Path) -> None:
    latents = library_on_two_ranks.cache(tmp_path)
    theirs, ours = ({p.name: p.read_bytes() for p in root.rglob("*.*")} for root in (folder / "latents", tmp_path))
    assert set(ours) == {"posteriors.npy", "index.json", ".lock"}
    assert set(theirs) == {*ours, "moments.npy"}  # they have asked for statistics
    assert {name: theirs[name] for name in ours} == ours
    assert next((folder / "latents").iterdir()).name == next(tmp_path.iterdir()).name
    for centre in (False, True):
        statistics = latents.statistics(centre)
        for seen in ranks:
            assert seen["statistics"][centre]["scale_factor"] == pytest.approx(statistics.scale_factor, rel=1e-12)
            torch.testing.assert_close(seen["statistics"][centre]["mean"], statistics.mean)
    assert tiny.equal_states(ranks[0]["statistics"], ranks[1]["statistics"])


@pytest.mark.usefixtures("one_thread")
def test_one_process_goes_on_with_what_two_have_encoded_until_one_was_killed(tmp_path: Path) -> None:
    assert on_two_ranks("encoding_on_two_ranks.py", tmp_path / "killed")[1] == -signal.SIGKILL
    (entry,) = (tmp_path / "killed").iterdir()
    lines = (entry / "encoded.jsonl").read_text().splitlines()
    noted = {int(i) for line in lines[1:] for i in json.loads(line)}
    assert {0, 1} <= noted <= {0, 1, 2, 3}
    encoded: list[int] = []
    cache = encoding_on_two_ranks.build(tmp_path / "killed", encoded.append)
    shapes = [0, 0]  # of the image, and of the latent
    assert encoded == [*shapes, *(i for i in range(encoding_on_two_ranks.NUM_VOLUMES) if i not in noted)]
    undisturbed = encoding_on_two_ranks.build(tmp_path / "undisturbed")
    assert np.array_equal(cache.posteriors, undisturbed.posteriors)
    assert cache.cases == undisturbed.cases


@pytest.mark.usefixtures("one_thread")
def test_two_processes_validate_as_one_does(ranks: list[Seen], tmp_path: Path) -> None:
    alone = library_on_two_ranks.diffusion_stage().validate(library_on_two_ranks.cache(tmp_path))
    volumes = [tiny.batch(1, seed=i) for i in range(3)]
    reconstructed, _ = AutoencoderStage(tiny.config(), tiny.CPU, 1).validate(volumes)
    for seen in ranks:
        assert seen["diffusion validation"] == pytest.approx(alone, rel=1e-6)
        assert seen["autoencoder validation"] == pytest.approx(reconstructed, rel=1e-6)


def test_two_processes_keep_the_same_weights(ranks: list[Seen]) -> None:
    one, other = (seen["trained"] for seen in ranks)
    assert tiny.equal_states(one, other)
    fresh = library_on_two_ranks.diffusion_stage().unet.state_dict()
    assert not tiny.equal_states(one["diffusion"]["unet"], fresh)


def test_state_is_written_by_rank_0_and_waited_for(folder: Path, ranks: list[Seen]) -> None:
    assert all(seen["state is there"] for seen in ranks)
    assert torch.load(folder / "state.pt", weights_only=True) == {"rank": 0}


@pytest.fixture
def started_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where torchrun, whose store is there, has started this process in the place of one that failed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    yield
    del store


@pytest.mark.usefixtures("started_again")
def test_what_failed_before_it_began_does_not_go_on_with_an_earlier_training(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "autoencoder_last.pt", 1, 10)
    checkpoints.save({"fingerprint": {}})
    with pytest.raises(CheckpointError, match="model_dir holds a training"):
        how_to_start(checkpoints, None, None, overwrite=False)
    assert how_to_start(checkpoints, None, None, overwrite=True) is False
    assert how_to_start(checkpoints, "always", None, overwrite=False) is True
    note_beginning()
    assert how_to_start(checkpoints, None, None, overwrite=True) is True
    checkpoints.clear()
    assert how_to_start(checkpoints, None, None, overwrite=True) is False


def test_without_a_store_of_torchruns_a_restart_counts_as_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not begun_before()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begun_before()
