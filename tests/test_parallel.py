"""More than one process, more than one machine: the scripts under torchrun, with gloo, for real."""

import functools
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import SECONDS, Desk, Result, Warm
from test_scripts import STAGE_1, STAGE_2, STATE, both_stages, give_autoencoder
from tiny import equal_states

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ON_A_RANK = Path(__file__).with_name("on_a_rank.py")
EVERY_STEP = ("--set", "checkpoint_every_minutes=0")
Launch = Callable[..., Result]
SECTION = {STAGE_1: "autoencoder_train", STAGE_2: "diffusion_train"}


def settings(script: str, **values: object) -> list[str]:
    return [f"--set={SECTION[script]}.{name}={value}" for name, value in values.items()]


@pytest.fixture
def launch(warm: Warm) -> Launch:
    return functools.partial(on_two_processes, warm)


def on_two_processes(
    warm: Warm,
    desk: Desk,
    script: str,
    *args: object,
    faults: dict[str, list[Any]] | None = None,
    options: tuple[str, ...] = (),
) -> Result:
    """torchrun with two processes of a script, with faults on some of them."""
    command = ["--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", *options, ON_A_RANK]
    return warm.run(desk, "torchrun", *command, json.dumps(faults or {}), script, *desk.files, *args)


def state(desk: Desk, script: str) -> dict[str, Any]:
    return torch.load(desk.model / STATE[script], weights_only=True)


def another(desk: Desk, name: str) -> Desk:
    return Desk(desk.folder / name, desk.data).furnish()


# ---------------------------------------------------------------- the same training, however it is divided


@both_stages
def test_two_processes_with_half_a_batch_train_as_one_with_the_whole(
    script: str, trained: Desk, desk: Desk, warm: Warm, launch: Launch
) -> None:
    """And so does one process that takes the halves one after the other, and two that do so with quarters.

    Without the adversarial term: its discriminator normalises over the batch. With recomputed activations, attention
    in the U-Net, and clipping, which must see the gradient of the whole batch.
    """
    ways: dict[str, tuple[Desk, int, dict[str, int]]] = {
        "whole": (another(desk, "whole"), 1, {"batch_size": 4}),
        "halves on two": (another(desk, "two"), 2, {"batch_size": 2}),
        "halves in turn": (another(desk, "turn"), 1, {"batch_size": 2, "accumulate_steps": 2}),
        "quarters in turn on two": (another(desk, "both"), 2, {"batch_size": 1, "accumulate_steps": 2}),
    }
    weights = {}
    for name, (place, processes, changes) in ways.items():
        give_autoencoder(place, trained, script)
        more = ["--set=use_checkpointing=norms", *settings(script, max_epochs=2, max_grad_norm=0.1, **changes)]
        if script == STAGE_1:
            more += settings(script, adv_weight=0)
        done = launch(place, script, *more) if processes == 2 else warm.run(place, script, *place.files, *more)
        assert done.code == 0, done.stderr
        reached = state(place, script)
        assert (reached["epoch"], reached["step"]) == (2, 4)
        weights[name] = reached["stage"]["autoencoder" if script == STAGE_1 else "unet"]
    for name in ("halves on two", "halves in turn", "quarters in turn on two"):
        torch.testing.assert_close(
            weights[name], weights["whole"], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---------------------------------------------------------------- what dies, and what goes on


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, trained: Desk, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Desk]:
    """Both stages trained on two processes."""
    desks = {}
    for script in SECTION:
        desks[script] = Desk(tmp_path_factory.mktemp("two") / "desk", trained.data).furnish()
        give_autoencoder(desks[script], trained, script)
        done = on_two_processes(warm, desks[script], script)
        assert done.code == 0, done.stderr
    return desks


@both_stages
def test_killed_and_restarted_by_torchrun_is_the_same_as_undisturbed(
    script: str, trained: Desk, desk: Desk, undisturbed: dict[str, Desk], launch: Launch
) -> None:
    """torchrun starts all processes again; they resume by themselves."""
    give_autoencoder(desk, trained, script)
    faults = {"1": [["die_at_step", 3]]}
    done = launch(desk, script, *EVERY_STEP, faults=faults, options=("--max-restarts=1",))
    assert done.code == 0, done.stderr
    assert f"resuming from {desk.model / STATE[script]}" in done.stderr
    assert equal_states(state(desk, script), state(undisturbed[script], script))


def test_killed_before_the_first_checkpoint_starts_anew(
    desk: Desk, undisturbed: dict[str, Desk], launch: Launch
) -> None:
    """Also where an earlier training's state lies there, which the restart must not take for its own."""
    shutil.copytree(undisturbed[STAGE_1].model, desk.model)
    done = launch(desk, STAGE_1, "--overwrite", faults={"0": [["die_at_step", 1]]}, options=("--max-restarts=1",))
    assert done.code == 0 and "resuming" not in done.stderr, done.stderr
    assert equal_states(state(desk, STAGE_1), state(undisturbed[STAGE_1], STAGE_1))


def test_a_rank_that_is_killed_ends_the_others(desk: Desk, undisturbed: dict[str, Desk], launch: Launch) -> None:
    timeout = ("--set", "ddp_timeout_seconds=200")  # is not waited for
    done = launch(desk, STAGE_1, *EVERY_STEP, *timeout, faults={"1": [["die_at_step", 5]]})
    assert done.code != 0 and done.seconds < 90
    assert "error: rank 0: another process has ended or does not answer" in done.stderr
    assert "[rank0]" not in done.stderr  # no traceback of what is not rank 0's fault
    done = launch(desk, STAGE_1, "--resume")
    assert done.code == 0, done.stderr
    assert equal_states(state(desk, STAGE_1), state(undisturbed[STAGE_1], STAGE_1))


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(desk: Desk, launch: Launch) -> None:
    done = launch(desk, STAGE_1, "--set", "ddp_timeout_seconds=8", faults={"1": [["hang_at_step", 3]]})
    assert done.code != 0 and done.seconds < 90, done.stderr
    assert "error: rank 0: another process has ended or does not answer" in done.stderr


def test_a_rank_that_meets_nan_says_so_first(desk: Desk, warm: Warm, launch: Launch) -> None:
    done = launch(desk, STAGE_1, faults={"1": [["not_finite_at_step", 3, "batch"]]})
    assert done.code != 0
    errors = re.findall("^error: (.*)$", done.stderr, re.M)
    assert errors and all(error.startswith("training stopped at step 3: not finite (") for error in errors)
    assert any("1 of 8192 not finite" in error for error in errors)
    assert done.stderr.index("error: training stopped") < done.stderr.index("ChildFailedError")
    assert (desk.model / "autoencoder_step3_rank1.replay.pt").is_file()
    again = warm.run(desk, STAGE_1, *desk.files, "--replay", desk.model / "autoencoder_step3_rank1.replay.pt")
    assert again.code == 0 and "of input that was not finite" in again.stderr, again.stderr


def test_sigterm_to_torchrun_saves(desk: Desk, launch: Launch) -> None:
    """What a cluster sends reaches torchrun, which hands it on."""
    command = [*TORCHRUN, "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", ON_A_RANK, "{}", STAGE_1]
    command += [*desk.files, "--set", "autoencoder_train.max_epochs=100000", *EVERY_STEP]
    process = subprocess.Popen(
        [*map(str, command)], cwd=desk.folder, env=desk.process_environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + SECONDS
    while not (desk.model / STATE[STAGE_1]).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=SECONDS)
    assert "interrupted; go on with --resume" in said.decode()
    done = launch(desk, STAGE_1, "--resume")
    assert done.code == 0, done.stderr
    reached = state(desk, STAGE_1)
    assert (reached["epoch"], reached["step"]) == (4, 8) or reached["step"] > 8


# ---------------------------------------------------------------- more than one machine


def test_two_nodes_train_as_two_processes_of_one(trained: Desk, desk: Desk, undisturbed: dict[str, Desk]) -> None:
    """Two torchrun agents that meet by c10d, each with an address and a home of its own; RANK is not LOCAL_RANK."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for number in (1, 2):
        command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=ldm3d"]
        command += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr=127.0.0.{number}", ON_A_RANK, "{}", STAGE_1]
        nodes.append(
            subprocess.Popen(
                [*map(str, command), *desk.files],
                cwd=desk.folder,
                env=desk.process_environment | {"GLOO_SOCKET_IFNAME": "lo"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [node.communicate(timeout=SECONDS)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum("2 process(es)" in text for text in said) == 1  # rank 0 speaks for both
    assert equal_states(state(desk, STAGE_1), state(undisturbed[STAGE_1], STAGE_1))


# ---------------------------------------------------------------- meeting again, and parting


AGAIN = """
import os, sys
sys.path.insert(0, {root!r})
from ldm3d import distributed
with distributed.process_group("gloo", 100):
    print(distributed.gather_objects(os.environ["TORCHELASTIC_RESTART_COUNT"]), flush=True)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] < "3" and distributed.rank() == 1:
        os._exit(3)
    distributed.barrier()
"""


def test_processes_that_are_started_again_do_not_wait_for_the_dead(desk: Desk, warm: Warm) -> None:
    script = desk.folder / "again.py"
    script.write_text(AGAIN.format(root=str(ON_A_RANK.parents[1])))
    options = ("--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", "--max-restarts=3")
    done = warm.run(desk, "torchrun", *options, script)
    assert done.code == 0, done.stderr
    assert done.stdout.count("['3', '3']") == 2


ENDING = """
import sys
sys.path.insert(0, {root!r})
import torch
from ldm3d import distributed

def train():
    with distributed.process_group("gloo", 100):
        network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        for _ in range(100):
            torch.distributed.all_reduce(torch.ones(1), async_op=True)

train()
"""


def test_processes_end_while_gloo_is_still_busy(desk: Desk, warm: Warm) -> None:
    script = desk.folder / "ending.py"
    script.write_text(ENDING.format(root=str(ON_A_RANK.parents[1])))
    done = warm.run(desk, "torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2", script)
    assert done.code == 0, done.stderr
