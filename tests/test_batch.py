"""mlops.batch: shards make the volumes of inference.py, can be killed at any moment, and agree on one manifest."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tiny
import torch
from fsspec.implementations.memory import MemoryFileSystem
from scripts import ROOT, SECONDS, Desk, Result, Warm

from ldm3d import __version__
from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.config import load_config
from ldm3d.files import sha256
from ldm3d.sampling import Sampler
from ldm3d.weights import LATENT_MEAN, save_weights
from mlops.batch import __main__ as command
from mlops.batch import store as stores

BATCH = "mlops/batch/__main__.py"
NUM, SEED, STEPS = 5, 3, 2
VOLUMES = [f"synimg_{SEED}_{number}.nii.gz" for number in range(NUM)]
SIDECARS = [name.replace(".nii.gz", ".json") for name in VOLUMES]
EACH_BATCH: tuple[Any, ...] = ("note_each_batch",)

Shard = Callable[..., Result]


def publish(folder: Path, desk: Desk, seed: int = 0) -> Path:
    """Weights of the networks that the desk's configuration describes, with random numbers in them."""
    cfg = load_config(desk.config, [])
    folder.mkdir()
    save_weights(folder / AUTOENCODER, tiny.autoencoder(cfg).state_dict(), tiny.autoencoder_card(cfg))
    card = tiny.diffusion_card(cfg, sha256(folder / AUTOENCODER))
    state = tiny.unet(cfg, seed).state_dict() | {LATENT_MEAN: torch.zeros(cfg.latent_shape)}
    save_weights(folder / UNET, state, card)
    return folder


@pytest.fixture(scope="module")
def office(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Weights, and what inference.py makes of them."""
    desk = Desk(tmp_path_factory.mktemp("batch") / "desk").furnish()
    publish(desk.model, desk)
    done = warm.run(desk, "inference.py", *desk.files, "--num", NUM, "--seed", SEED, "--steps", STEPS)
    assert done.code == 0, done.stderr
    return desk


@pytest.fixture(scope="module")
def expected(office: Desk) -> dict[str, bytes]:
    return {name: (office.results / name).read_bytes() for name in VOLUMES}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def arguments(office: Desk, output: object, *more: object) -> list[str]:
    what = ("--weights", office.model, "--num", NUM, "--seed", SEED, "--steps", STEPS, "--output", output)
    return list(map(str, (*what, *more)))


@pytest.fixture
def shard(warm: Warm, office: Desk, output: Path) -> Shard:
    """Run a shard in a process of its own: `shard(*more, faults=())`."""
    return lambda *more, faults=(): warm.run(office, BATCH, *arguments(office, output, *more), faults=faults)


@pytest.fixture
def call(office: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shard]:
    """Run a shard in this process, which sees `memory://`: `call(output, *more)`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the scripts do
    monkeypatch.delenv(command.INDEX_VARIABLE, raising=False)
    monkeypatch.setattr(stores, "RETRY_SECONDS", (0.0, 0.0, 0.0))

    def run(output: object, *more: object) -> Result:
        monkeypatch.setattr(sys, "argv", [BATCH, *arguments(office, output, *more)])
        code = 0
        try:
            command.run(command.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Result(code, said.out, said.err, 0)

    yield run
    torch.set_num_threads(threads)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def require_batch(output: Path, expected: dict[str, bytes], shards: int = 1) -> dict[str, Any]:
    """The volumes of inference.py, their sidecars, a manifest that is true, and nothing else."""
    assert {name: (output / name).read_bytes() for name in VOLUMES} == expected
    records = {f"shard-{shard}-of-{shards}.jsonl" for shard in range(shards)}
    assert {path.name for path in output.glob("manifest/[!.]*")} == records | {"begun.json"}
    assert {path.name for path in output.glob("[!.]*")} == {*VOLUMES, *SIDECARS, "manifest", "manifest.json"}
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    assert [file["name"] for file in manifest["files"]] == [
        name for pair in zip(VOLUMES, SIDECARS, strict=True) for name in pair
    ]
    for file in manifest["files"]:
        path = output / file["name"]
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256(path))
        sidecar = json.loads((output / file["name"].replace(".nii.gz", ".json")).read_text())
        assert (file["seed"], file["number"]) == (sidecar["seed"], sidecar["index"])
        assert sidecar["weights_sha256"] == manifest["settings"]["weights_sha256"]
    return manifest


# The same volumes, however they are shared out


def test_one_shard_makes_the_files_of_inference(
    shard: Shard, office: Desk, output: Path, expected: dict[str, bytes]
) -> None:
    done = shard("--batch-size", 2)
    assert (done.code, done.stdout) == (0, ""), done.stderr
    assert done.last_line == f"{output}/manifest.json: 5 volumes, all shards have ended"
    manifest = require_batch(output, expected)
    assert manifest["settings"]["steps"] == STEPS
    assert manifest["settings"]["weights_sha256"] == {n: sha256(office.model / n) for n in (AUTOENCODER, UNET)}
    assert manifest["settings"]["code_version"] == __version__
    for name in SIDECARS:
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (output, office.results))
        assert mine | {"time": None} == theirs | {"time": None}


def test_of_two_shards_the_last_writes_the_manifest(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    first = shard("--shards", 2, "--shard", 1)
    assert (first.code, first.last_line) == (0, "manifest.json follows: shard 0 of 2 has not ended")
    assert {path.name for path in output.glob("*.gz")} == {VOLUMES[1], VOLUMES[3]}
    assert not (output / "manifest.json").exists()
    assert shard("--shards", 2, "--shard", 0).code == 0
    require_batch(output, expected, shards=2)


def test_a_pod_that_runs_twice_at_the_same_time(
    shard: Shard, office: Desk, output: Path, expected: dict[str, bytes]
) -> None:
    """As an Indexed Job starts it, by the command of the README."""
    assert shard("--shards", 2, "--shard", 0).code == 0
    line = [sys.executable, "-m", "mlops.batch", *arguments(office, output, "--shards", 2)]
    environment = office.process_environment | {command.INDEX_VARIABLE: "1"}
    pods = [subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    said = [pod.communicate(timeout=SECONDS)[1].decode() for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert "all shards have ended" in said[0]
    require_batch(output, expected, shards=2)


# Killed, stopped, out of disk: the same command goes on

KILLS: dict[str, tuple[tuple[Any, ...], int]] = {
    # Moment: the fault, and how many volumes of those made before are taken over by the next start.
    "about to be begun": (("signal_at_call", "SIGKILL", "os:link", 1), 0),
    "begun": (("signal_at_call", "SIGKILL", "mlops.batch.records:Record.save", 1), 0),
    "the first sidecar written, its volume not yet": (("signal_at_call", "SIGKILL", "ldm3d.files:_flush", 4), 0),
    "a volume made, not noted": (("signal_after_call", "SIGKILL", "mlops.batch.shard:_write", 1), 0),
    "two noted, the third being sampled": (("signal_at_call", "SIGKILL", "ldm3d.sampling:Sampler.sample", 3), 2),
    "a third noted": (("signal_after_call", "SIGKILL", "mlops.batch.records:Record.save", 2), 3),
    "all made, the last not noted": (("signal_after_call", "SIGKILL", "mlops.batch.shard:_write", 2), 4),
    "all noted, no manifest": (("signal_at_call", "SIGKILL", "mlops.batch.records:_manifest", 1), 5),
}


def test_killed_at_any_moment_and_started_again(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    there = 0
    for moment, (fault, noted) in KILLS.items():
        killed = shard(faults=[EACH_BATCH, fault])
        assert killed.code == -9, (moment, killed.stderr)
        if moment != "about to be begun" and moment != "begun":
            assert f"shard 0 of 1: {there} of 5 volumes are there" in killed.stderr, moment
        there = noted
    done = shard()
    assert done.code == 0, done.stderr
    assert "5 of 5 volumes are there" in done.stderr
    require_batch(output, expected)


def test_sigterm_ends_after_the_batch(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    stopped = shard("--batch-size", 2, faults=[("signal_at_call", "SIGTERM", "ldm3d.sampling:Sampler.sample", 1)])
    assert stopped.code == 143
    assert stopped.stderr.splitlines()[-2:] == [
        "shard 0 of 1: 2 of 5 volumes are made",
        "terminated: the same command goes on with what is missing",
    ]
    again = shard()
    assert again.code == 0
    assert "2 of 5 volumes are there" in again.stderr
    require_batch(output, expected)


def test_a_stop_while_files_are_checked_changes_nothing(shard: Shard, output: Path) -> None:
    assert shard().code == 0
    before = (output / "manifest" / "shard-0-of-1.jsonl").read_bytes()
    assert shard(faults=[("signal_at_call", "SIGINT", "mlops.batch.store:LocalStore.sha256", 1)]).code == 130
    assert (output / "manifest" / "shard-0-of-1.jsonl").read_bytes() == before


def test_a_full_disk(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    full = shard(faults=[("full_disk", 20_000)])
    assert full.code == 2
    assert full.last_line == f"error: {output / VOLUMES[0]}: cannot be written: File too large"
    assert not list(output.glob("*.gz"))
    assert shard().code == 0
    require_batch(output, expected)


def test_files_that_are_not_what_was_written(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    assert shard().code == 0
    os.truncate(output / VOLUMES[1], 1000)
    flipped = bytearray(expected[VOLUMES[2]])
    flipped[-20] ^= 1
    (output / VOLUMES[2]).write_bytes(flipped)
    (output / SIDECARS[3]).unlink()
    refused = shard("--finish")
    assert refused.code == 2
    wrong = f"has 1000 bytes, not {len(expected[VOLUMES[1]])}; start shard 0 again"
    assert refused.last_line == f"error: {output}/{VOLUMES[1]}: {wrong}"
    again = shard()
    for name in (VOLUMES[1], VOLUMES[2], SIDECARS[3]):
        assert f"warning: {name}: not what this shard has written; made again" in again.stderr
    assert "2 of 5 volumes are there" in again.stderr
    require_batch(output, expected)


def test_a_damaged_record_is_not_trusted(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    assert shard().code == 0
    os.truncate(output / "manifest" / "shard-0-of-1.jsonl", 1000)
    assert "no manifest yet: shard 0 of 1 has not ended" in shard("--finish").last_line
    begun = output / "manifest" / "begun.json"
    begun.write_text(re.sub('"time": "[^"]*"', '"time": "2020-02-03T04:05:06Z"', begun.read_text()))
    again = shard()
    assert "0 of 5 volumes are there" in again.stderr
    require_batch(output, expected)
    # The time is the batch's: else a volume that two processes make would have two sidecars.
    assert {json.loads((output / name).read_text())["time"] for name in SIDECARS} == {"2020-02-03T04:05:06+00:00"}


def test_a_record_of_other_settings_is_not_trusted(shard: Shard, output: Path, expected: dict[str, bytes]) -> None:
    """As of two shards with different settings that are started at the same moment."""
    assert shard().code == 0
    record = output / "manifest" / "shard-0-of-1.jsonl"
    record.write_text(record.read_text().replace('"steps":2', '"steps":3'))
    assert "no manifest yet: shard 0 of 1 has not ended" in shard("--finish").last_line
    assert "0 of 5 volumes are there" in shard().stderr
    require_batch(output, expected)


def test_no_manifest_while_another_shard_is_under_way(shard: Shard, output: Path) -> None:
    killed = shard("--shards", 2, "--shard", 1, faults=[("signal_at_call", "SIGKILL", "mlops.batch.shard:_write", 1)])
    assert killed.code == -9
    done = shard("--shards", 2, "--shard", 0)
    assert (done.code, done.last_line) == (0, "manifest.json follows: shard 1 of 2 has not ended")
    assert not (output / "manifest.json").exists()


def test_old_leftovers_are_removed_and_others_kept(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (output / "manifest").mkdir(parents=True)
    old, new = [output / ".tmp-a-x.nii.gz", output / "manifest" / ".tmp-b-begun.json"], output / ".tmp-c-y.nii.gz"
    for path in (*old, new):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    stores.LocalStore(output)
    assert [path.exists() for path in (*old, new)] == [False, False, True]


# Refused


@pytest.mark.parametrize(
    ("change", "had", "has"),
    [
        (("--num", 6), "num 5", "num 6"),
        (("--seed", 4), "seed 3", "seed 4"),
        (("--steps", 3), "steps 2", "steps 3"),
        (("--dtype", "int16"), "dtype float32", "dtype int16"),
        (("--shards", 2, "--shard", 0), "shards 1", "shards 2"),
        (("--seed", 4, "--steps", 3), "seed 3, steps 2", "seed 4, steps 3"),
    ],
)
def test_other_settings_than_those_of_the_batch(
    change: tuple[object, ...], had: str, has: str, call: Shard, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "sample", _end)
    with pytest.raises(EndOfTest):
        call(output)  # begun, no more
    refused = call(output, *change)
    assert (refused.code, refused.last_line) == (
        2,
        f"error: {output}: holds a batch with {had}; this command has {has}: give the same settings, or another "
        "--output",
    )


class EndOfTest(Exception):
    pass


def _end(*args: object, **kwargs: object) -> None:
    raise EndOfTest


def test_other_weights(call: Shard, office: Desk, output: Path, tmp_path: Path) -> None:
    assert call(output).code == 0
    other = publish(tmp_path / "other", office, seed=1)
    refused = call(output, "--weights", other)
    assert refused.code == 2
    had, has = (sha256(folder / UNET)[:12] for folder in (office.model, other))
    assert f"holds a batch with {UNET} {had}; this command has {UNET} {has}: give the same" in refused.last_line


def test_another_machine_is_said_and_goes_on(call: Shard, output: Path, expected: dict[str, bytes]) -> None:
    assert call(output, "--shards", 2, "--shard", 0).code == 0
    torch.set_num_threads(2)
    done = call(output, "--shards", 2, "--shard", 1)
    assert done.code == 0
    notice = "notice: the batch was begun with threads 1, this shard has threads 2: volumes can differ"
    assert notice in done.stderr
    manifest = json.loads((output / "manifest.json").read_text())
    assert [machine["threads"] for machine in manifest["machines"]] == [1, 2]


@pytest.mark.parametrize(
    ("options", "index", "said"),
    [
        (("--shards", 3, "--shard", 3), "", "--shard 3: must be between 0 and 2, as --shards is 3"),
        (("--shards", 3, "--shard", -1), "", "--shard -1: must be between 0 and 2, as --shards is 3"),
        (("--shards", 3), "3", "JOB_COMPLETION_INDEX 3: must be between 0 and 2, as --shards is 3"),
        (("--shards", 3), "one", "JOB_COMPLETION_INDEX one: must be between 0 and 2, as --shards is 3"),
        (("--shards", 3), "", "--shard: say which of the 3 shards, 0 to 2"),
        (("--shards", 6, "--shard", 0), "", "--shards 6: more than the 5 volumes; take --shards 5 or fewer"),
        (("--shards", 0), "", "argument --shards: '0' is not a whole number between 1 and a billion"),
        (("--shard", "x"), "", "argument --shard: invalid int value: 'x'"),
        (("--steps", 10_000), "", "steps 10000: must be between 1 and 1000"),
        (("--scheduler", "ddim"), "", "scheduler 'ddim': weights trained with rflow are sampled with rflow"),
        (("--weights", "nowhere"), "", "nowhere/autoencoder.safetensors: no such weights"),
        (("--finish",), "", "there is no batch; begin one with --weights and --num"),
        (("--output", "bogus://x"), "", "bogus://x: Protocol not known: bogus; take a folder, s3://, gs:// or abfs://"),
    ],
)
def test_what_cannot_be_done(
    options: tuple[object, ...], index: str, said: str, call: Shard, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(command.INDEX_VARIABLE, index)
    refused = call(output, *options)
    assert refused.code == 2
    assert refused.stderr.startswith("error: ")
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not output.exists()


def test_an_option_comes_before_the_index_of_the_pod(
    call: Shard, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(command.INDEX_VARIABLE, "1")
    assert "shard 2 of 3: 0 of 1" in call(output, "--shards", 3, "--shard", 2).stderr
    assert "shard 1 of 3: 0 of 2" in call(output, "--shards", 3).stderr


def test_what_is_needed_and_torchrun(call: Shard, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [BATCH, "--output", str(output)])
    with pytest.raises(SystemExit) as refused:
        command.run(command.main)
    assert refused.value.code == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start one process for each shard instead" in call(output).stderr


def test_an_output_that_cannot_be_written_to(call: Shard, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = call(tmp_path / "file" / "output")
    assert (refused.code, "cannot be written to: Not a directory" in refused.stderr) == (2, True), refused.stderr


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_package_that_is_not_installed(
    protocol: str, package: str, call: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused = call(f"{protocol}://bucket/brains")
    needs = f"{protocol}:// needs the package {package}, which is not installed: pip install {package}"
    assert (refused.code, refused.stderr) == (2, f"error: {protocol}://bucket/brains: {needs}\n")


# Not on this machine


def stored(name: str) -> bytes:
    return bytes(fsspec.filesystem("memory").cat_file(f"/brains/{name}"))


def require_stored(expected: dict[str, bytes], shards: int = 1) -> None:
    memory = fsspec.filesystem("memory")
    assert {name: stored(name) for name in VOLUMES} == expected
    top = {*VOLUMES, *SIDECARS, "manifest.json"}
    beside = {"manifest/begun.json", *(f"manifest/shard-{shard}-of-{shards}.jsonl" for shard in range(shards))}
    assert {name.removeprefix("/brains/") for name in memory.find("/brains")} == top | beside
    assert json.loads(stored("manifest.json"))["num_files"] == 2 * NUM


def test_shards_on_a_remote_file_system(call: Shard, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert "shards 0, 2 of 3 have not ended" in call("memory://brains", "--shards", 3, "--shard", 1).last_line
    assert "shard 0 of 3 has not ended" in call("memory://brains", "--shards", 3, "--shard", 2).last_line
    done = call("memory://brains/", "--shards", 3, "--shard", 0)
    assert (done.code, done.last_line) == (0, "memory://brains/manifest.json: 5 volumes, all shards have ended")
    require_stored(expected, shards=3)


def test_an_upload_that_stayed_half_is_made_again(call: Shard, expected: dict[str, bytes]) -> None:
    assert call("memory://brains").code == 0
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/brains/{VOLUMES[4]}", expected[VOLUMES[4]][:-100])
    memory.pipe_file(f"/brains/{VOLUMES[0]}", expected[VOLUMES[1]][: len(expected[VOLUMES[0]])])
    again = call("memory://brains")
    assert "3 of 5 volumes are there" in again.stderr
    require_stored(expected)


def test_sidecars_go_first_and_what_fails_is_tried_again(
    call: Shard, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    put_file = MemoryFileSystem.put_file

    def fails_at_first(self: Any, local: str, remote: str, **kwargs: Any) -> Any:
        tried.append(remote.rsplit("/", 1)[-1])
        if len(tried) in (1, 4, 5):
            raise ConnectionResetError("connection reset by peer")
        return put_file(self, local, remote, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fails_at_first)
    done = call("memory://brains")
    assert done.code == 0
    trouble = f"warning: memory://brains: {SIDECARS[0]}: connection reset by peer; again in 0 s"
    assert trouble in done.stderr.splitlines()
    assert tried[:6] == [SIDECARS[0], SIDECARS[0], VOLUMES[0], SIDECARS[1], SIDECARS[1], SIDECARS[1]]
    require_stored(expected)


@pytest.mark.parametrize(("error", "tries"), [(TimeoutError("timed out"), 4), (PermissionError("Access Denied"), 1)])
def test_what_keeps_failing_is_an_error_before_any_sampling(
    error: Exception, tries: int, call: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(*args: object, **kwargs: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fails)
    monkeypatch.setattr(Sampler, "sample", _end)
    refused = call("memory://brains")
    assert (refused.code, len(calls)) == (2, tries)
    assert refused.last_line == f"error: memory://brains: manifest/begun.json: {error}"


def test_the_manifest_can_be_made_by_itself(call: Shard, expected: dict[str, bytes]) -> None:
    assert call("memory://brains", "--shards", 2, "--shard", 0).code == 0
    refused = call("memory://brains", "--finish")
    assert (refused.code, refused.last_line) == (
        2,
        "error: memory://brains: no manifest yet: shard 1 of 2 has not ended",
    )
    assert call("memory://brains", "--shards", 2, "--shard", 1).code == 0
    before = stored("manifest.json")
    fsspec.filesystem("memory").rm_file("/brains/manifest.json")
    for _ in range(2):
        done = call("memory://brains", "--finish")
        assert (done.code, done.last_line) == (0, "memory://brains/manifest.json: 5 volumes")
        assert stored("manifest.json") == before


def test_nothing_stays_in_the_temporary_folder(call: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert call("memory://brains").code == 0
    assert list(tmp_path.iterdir()) == []


def test_whoever_comes_first_begins(tmp_path: Path) -> None:
    for store in (stores.LocalStore(tmp_path / "out"), stores.open_store("memory://first")):
        store.create("manifest/begun.json", b"one")
        store.create("manifest/begun.json", b"two")
        assert store.read("manifest/begun.json") == b"one"
    assert [path.name for path in (tmp_path / "out" / "manifest").iterdir()] == ["begun.json"]
    MemoryFileSystem.store.clear()
    shutil.rmtree(tmp_path / "out")


def test_help(call: Shard, output: Path) -> None:
    done = call(output, "--help")
    assert (done.code, done.stderr) == (0, "")
    assert "python -m mlops.batch --weights checkpoints/demo --num 8 --output results/batch" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
