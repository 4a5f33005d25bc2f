"""Small GPUs: the U-Net waits on the host while latents are decoded, where that helps, and nothing else changes.

There need be no GPU: here one is pretended. What is sent to `cuda` is copied and booked as being there.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks import small_gpu
from ldm3d import decoding, sampling
from ldm3d.config import load_config
from ldm3d.decoding import GIB, RESERVE, Plan, choose_plan
from ldm3d.decoding_costs import Costs
from ldm3d.errors import ConfigError
from ldm3d.latents import LatentStatistics
from ldm3d.networks import build_autoencoder
from ldm3d.sampling import Sampler

CUDA = torch.device("cuda")
CONFIG_16G = Path(__file__).resolve().parents[1] / "config/config_train_16g.json"


class PretendedGpu(TorchFunctionMode):
    """Within, `cuda` is the CPU, but which parameters are there is known."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, int] = {}
        """Bytes of each parameter, by its identity, which a move does not change."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._nn._parse_to:
            return func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        devices = [value.type for value in given if isinstance(value, torch.device)]
        if func is Tensor.to and devices and isinstance(args[0], nn.Parameter):
            if devices == ["cuda"]:
                self.there[id(args[0])] = args[0].nbytes
            else:
                self.there.pop(id(args[0]), None)
            return args[0].detach().clone()
        args = [self._mine(value) for value in args]
        return func(*args, **{name: self._mine(value) for name, value in (kwargs or {}).items()})

    def _mine(self, value: Any) -> Any:
        return tiny.CPU if isinstance(value, torch.device) else value

    def bytes_of(self, network: nn.Module) -> int:
        return sum(self.there.get(id(parameter), 0) for parameter in network.parameters())


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as gpu:
        yield gpu


def weights(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def sampler_on(device: torch.device, decode_gib: float | None = None) -> Sampler:
    cfg = tiny.config(NoiseScheduler={"type": "rflow"}, diffusion_train={"patch_size": [24, 24, 24]})
    card, statistics = tiny.diffusion_card(cfg), LatentStatistics(torch.zeros(1, 1, 1, 1), 1.25)
    autoencoder = tiny.shaken(tiny.autoencoder(cfg))
    return Sampler(autoencoder, tiny.unet(cfg), statistics, card, device, amp=False, decode_gib=decode_gib)


def whole(sampler: Sampler) -> float:
    """Bytes for which decoding whole is just possible."""
    return Costs(sampler.autoencoder, (1, *sampler.card.latent_shape), False).whole() * RESERVE


def with_room_for(extra: float, gpu: PretendedGpu, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the card so much more or less than both networks and decoding whole need together."""
    size = whole(sampler) + weights(sampler.unet) + weights(sampler.autoencoder) + extra
    monkeypatch.setattr(sampling, "free_bytes", lambda device: int(size) - sum(gpu.there.values()))


def watched(sampler: Sampler, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Bytes of the U-Net on the card while each stage computes."""
    seen: dict[str, set[int]] = {"denoising": set(), "decoding": set()}

    def decode(*args: Any) -> Tensor:
        seen["decoding"].add(gpu.bytes_of(sampler.unet))
        return original(*args)

    original = sampling.decode
    monkeypatch.setattr(sampling, "decode", decode)
    sampler.unet.register_forward_pre_hook(lambda *_: seen["denoising"].add(gpu.bytes_of(sampler.unet)))
    return seen


def made(sampler: Sampler) -> Tensor:
    return sampler.sample(3, [0, 1], steps=2)


def test_with_room_enough_nothing_moves(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_on(CUDA)
    there = weights(sampler.unet)
    with_room_for(1, gpu, sampler, monkeypatch)
    seen = watched(sampler, gpu, monkeypatch)
    made(sampler)
    assert seen == {"denoising": {there}, "decoding": {there}}
    assert str(sampler.decoding) == "whole"


@pytest.mark.parametrize("budget", [False, True])
def test_where_both_do_not_fit_the_unet_waits_on_the_host(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch, budget: bool
) -> None:
    plain = sampler_on(CUDA)
    with_room_for(1, gpu, plain, monkeypatch)
    expected = made(plain)
    gpu.there.clear()

    missing = weights(plain.unet) // 2
    sampler = sampler_on(CUDA, (whole(plain) - missing) / GIB if budget else None)
    with_room_for(1e9 if budget else -missing, gpu, sampler, monkeypatch)
    seen = watched(sampler, gpu, monkeypatch)
    there = weights(sampler.unet)
    for _ in range(2):
        assert torch.equal(made(sampler), expected)
        assert gpu.bytes_of(sampler.unet) == there
    assert seen == {"denoising": {there}, "decoding": {0}}
    assert gpu.bytes_of(sampler.autoencoder) == weights(sampler.autoencoder)
    assert str(sampler.decoding) == "whole"
    assert expected.std() > 0.05


def test_training_can_go_on_with_what_was_moved(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_on(CUDA)
    parameters = list(sampler.unet.parameters())
    with_room_for(-weights(sampler.unet) // 2, gpu, sampler, monkeypatch)
    made(sampler)
    assert sampler.decoding and sampler.decoding.alone
    assert all(now is before for now, before in zip(sampler.unet.parameters(), parameters, strict=True))
    assert not any(parameter.is_inference() for parameter in parameters)
    with torch.no_grad():
        parameters[0].add_(1)


def test_after_an_error_the_next_volume_finds_the_unet(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_on(CUDA)
    with_room_for(-weights(sampler.unet) // 2, gpu, sampler, monkeypatch)
    expected = made(sampler)
    with monkeypatch.context() as broken:
        broken.setattr(sampling, "decode", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            made(sampler)
    seen = watched(sampler, gpu, monkeypatch)
    assert torch.equal(made(sampler), expected)
    assert seen["denoising"] == {weights(sampler.unet)}


def test_on_a_cpu_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []

    def choose(*given: Any) -> Plan:
        planned.append(given)
        return choose_plan(*given)

    monkeypatch.setattr(sampling, "choose_plan", choose)
    made(sampler_on(tiny.CPU))
    assert [given[-1] for given in planned] == [0]


# The plan


def plan(room_gib: float, movable_gib: float) -> Plan:
    """For the configuration for 16 GB, under autocast: decoding whole takes 4.1 GiB."""
    cfg = load_config(CONFIG_16G)
    with torch.device("meta"):
        autoencoder, latent = build_autoencoder(cfg.autoencoder_def), torch.empty(1, *cfg.latent_shape)
        return choose_plan(autoencoder, latent, int(room_gib * GIB), True, int(movable_gib * GIB))


@pytest.mark.parametrize(
    ("room", "movable", "said", "alone"),
    [
        (4.2, 0.7, "whole", False),
        (3.6, 0.7, "whole", True),
        (3.6, 0.0, "exact in 3 slabs, whole volumes beside it", False),
        # The U-Net's room would not change how it is done.
        (2.5, 0.7, "exact in 3 slabs, whole volumes beside it", False),
        (0.9, 0.7, "exact in 3 slabs, whole volumes beside it", True),
    ],
)
def test_it_is_moved_only_where_that_changes_the_plan(room: float, movable: float, said: str, alone: bool) -> None:
    found = plan(room, movable)
    assert (str(found), found.alone) == (said, alone)
    assert found.peak * RESERVE <= (room + movable * alone) * GIB


def test_what_fits_neither_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="even in windows of 8"):
        plan(0.001, 0.001)


# The benchmark, whose own figures need a GPU


def test_a_card_of_6_gb_decodes_whole_because_the_unet_leaves_it() -> None:
    row = small_gpu.predict("16g", 5.75, True)
    assert row["U-Net kept"].startswith("exact in 3 slabs")
    assert row["as it is done"] == "whole, U-Net on the host"
    assert row["done GiB"] < row["kept GiB"] + 2
    assert small_gpu.predict("16g", 8, True)["as it is done"] == "whole"


def test_what_is_measured_on_a_gpu_runs(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_on(CUDA)
    size = whole(sampler) + weights(sampler.unet) / 2 + weights(sampler.autoencoder)
    gpu.there.clear()
    for name in ("set_per_process_memory_fraction", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    for name in ("memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: sum(gpu.there.values()))
    monkeypatch.setattr(small_gpu, "config", lambda name: tiny.config(diffusion_train={"patch_size": [24, 24, 24]}))
    monkeypatch.setattr(small_gpu, "sampler_of", lambda cfg, device: sampler_on(device))
    monkeypatch.setattr(decoding, "SLAB_BYTES", (2**17,))
    for name in ("free_bytes", "choose_plan"):
        monkeypatch.setattr(sampling, name, getattr(sampling, name))
    found = small_gpu.measure("16g", (size + small_gpu.CONTEXT_BYTES) / GIB, False)
    assert found["measured decoding"] == "whole, alone"
    assert found["measured kept decoding"].startswith("exact in ")
    assert found["difference"] < 1e-4
