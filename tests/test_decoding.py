"""ldm3d.decoding: pieces give what plain decoding gives, and every way needs the memory that was predicted."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from live_memory import LiveMemory
from torch import Tensor, nn

from ldm3d import allocator, decoding, slabs
from ldm3d.allocator import free_bytes
from ldm3d.config import load_config
from ldm3d.decoding import GIB, SLAB_BYTES, Plan, choose_plan, decode
from ldm3d.decoding_costs import Costs
from ldm3d.errors import ConfigError
from ldm3d.latents import LatentStatistics
from ldm3d.networks import build_autoencoder
from ldm3d.sampling import Sampler
from ldm3d.slabs import Keep, Moments
from ldm3d.weights import load_autoencoder

ROOT = Path(__file__).resolve().parents[1]

NETWORKS: dict[str, dict[str, Any]] = {
    "two levels": {},
    "three levels": {"channels": [8, 16, 32], "attention_levels": [False] * 3, "num_res_blocks": 2},
    "growing channels": {"channels": [16, 8]},
    "attention": {"attention_levels": [True, True], "with_decoder_nonlocal_attn": True},
    "flash attention": {"attention_levels": [False, True], "use_flash_attention": True, "include_fc": False},
    "one matrix": {"attention_levels": [False, True], "use_combined_linear": True},
    "patches": {"patchify": 2},
}
KEEPS = {"here": Keep(), "host": Keep(on_host=True), "16 bit": Keep(half=True), "16 bit host": Keep(True, True)}


def network(name: str) -> Any:
    cfg = tiny.config(autoencoder_def=NETWORKS[name])
    return tiny.shaken(tiny.autoencoder(cfg))


def latent(*size: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def pieces(slab_bytes: int, keep: Keep | None = None) -> Plan:
    return Plan(0, slab_bytes, keep=keep or Keep())


# The same image


@pytest.mark.parametrize("slab_bytes", [1, 30_000, 100_000, 10**9], ids=["planes", "thin", "thick", "one slab"])
@pytest.mark.parametrize("name", NETWORKS)
def test_pieces_give_the_plain_image(name: str, slab_bytes: int) -> None:
    autoencoder = network(name)
    for size in ((5, 7, 6), (1, 4, 2)):
        z = latent(*size)
        plain = autoencoder.decode(z)
        assert plain.std() > 0.1
        for keep in (Keep(), Keep(on_host=True)):
            torch.testing.assert_close(decode(autoencoder, z, pieces(slab_bytes, keep)), plain, atol=1e-5, rtol=0)


def test_each_of_a_batch_has_its_own_statistics() -> None:
    autoencoder, z = network("attention"), latent(5, 4, 3, batch=2) * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(decode(autoencoder, z, pieces(20_000)), autoencoder.decode(z), atol=1e-5, rtol=0)


def test_the_demo_weights_decode_alike() -> None:
    autoencoder, _ = load_autoencoder(ROOT / "checkpoints/demo")
    autoencoder.eval()
    z = latent(7, 9, 5, channels=autoencoder.latent_channels)
    with torch.inference_mode():
        plain = autoencoder.decode(z)
    assert plain.std() > 0.1
    for slab_bytes in (2**16, 2**18):
        torch.testing.assert_close(decode(autoencoder, z, pieces(slab_bytes)), plain, atol=1e-5, rtol=0)
        rounded = decode(autoencoder, z, pieces(slab_bytes, Keep(half=True)))
        assert 1e-5 < (rounded - plain).abs().max() < 0.02
    blended = decode(autoencoder, z, Plan(0, window=6))
    assert (blended - plain).abs().max() > 1e-3  # why windows are the last resort
    assert (blended - plain).std() < 0.2 * plain.std()


def test_one_window_around_all_is_plain_decoding() -> None:
    autoencoder, z = network("patches"), latent(5, 7, 6)
    torch.testing.assert_close(decode(autoencoder, z, Plan(0, window=7)), autoencoder.decode(z), atol=1e-5, rtol=0)


def test_the_autoencoder_is_left_as_it_is() -> None:
    autoencoder, z = network("attention"), latent(4, 4, 4)
    decoder, before = autoencoder.decoder, autoencoder.decode(z)
    decode(autoencoder, z, pieces(1))
    assert autoencoder.decoder is decoder
    assert torch.equal(autoencoder.decode(z), before)


def test_statistics_keep_their_digits_where_the_mean_is_large() -> None:
    volume = 1000 + torch.randn(2, 8, 40, 6, 5, generator=torch.Generator().manual_seed(0))
    norm = tiny.shaken(nn.GroupNorm(4, 8))
    moments = Moments()
    for slab in volume.split([1, 7, 20, 12], dim=2):
        moments.add(slab)
    scale, shift = moments.affine(norm)
    with torch.no_grad():
        expected = norm.double()(volume.double())
    torch.testing.assert_close(volume.double() * scale + shift, expected, atol=1e-3, rtol=0)


def test_numbers_too_large_for_float16_are_kept_with_fewer_digits() -> None:
    keep = Keep(half=True)
    assert keep.store(torch.full((1, 2, 3, 4, 4), 6e4)).dtype == torch.float16
    for value in (7e4, -7e4):
        stored = keep.store(torch.full((1, 2, 3, 4, 4), value))
        assert stored.dtype == torch.bfloat16
        assert stored.shape == (3, 1, 2, 4, 4)
        torch.testing.assert_close(stored.float(), torch.full(stored.shape, value), rtol=0.01, atol=0)


# As much memory as predicted


def measured(autoencoder: Any, z: Tensor, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> LiveMemory:
    """With volumes that wait on the host counted apart, as there is one memory here."""
    with torch.inference_mode(), LiveMemory() as live, monkeypatch.context() as patched:
        patched.setattr(slabs, "to_host", live.wait)
        decode(autoencoder, z, plan)
    return live


@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_of_plain_decoding_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder, z = network(name), latent(9, 8, 7)
    predicted = Costs(autoencoder, tuple(z.shape), autocast=False, scratch=False).whole()
    assert predicted == pytest.approx(measured(autoencoder, z, Plan(0), monkeypatch).peak, rel=0.15)


@pytest.mark.parametrize("slab_bytes", [2**16, 2**18])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", ["two levels", "three levels", "attention", "patches"])
def test_the_peak_of_pieces_is_predicted(
    name: str, keep: str, slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder, z = network(name), latent(12, 9, 8)
    costs = Costs(autoencoder, tuple(z.shape), autocast=False, scratch=False)
    live = measured(autoencoder, z, pieces(slab_bytes, KEEPS[keep]), monkeypatch)
    peak, waiting = costs.pieces(slab_bytes, KEEPS[keep])
    assert peak == pytest.approx(live.peak, rel=0.15)
    assert waiting == pytest.approx(live.waiting_peak, rel=0.15)
    assert peak < costs.whole()


RESIDENT = """
import json, torch
from pathlib import Path
from ldm3d.decoding import Plan, decode
from ldm3d.decoding_costs import Costs
from ldm3d.definitions import AutoencoderDef
from ldm3d.networks import build_autoencoder
from ldm3d.slabs import Keep

def resident(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

definition = AutoencoderDef(
    latent_channels=3, channels=(16, 32), attention_levels=(False, False), num_res_blocks=1, norm_num_groups=4
)
network, latent = build_autoencoder(definition).eval(), torch.randn(1, 3, 48, 48, 32)
decode(network, latent[:, :, :4], Plan(0, 2**24))  # what libraries load once
rows = []
for keep in (Keep(half=True), Keep()):
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far
    before = resident("VmRSS:")
    decode(network, latent, Plan(0, 2**24, keep=keep))
    predicted, _ = Costs(network, tuple(latent.shape), autocast=False).pieces(2**24, keep)
    rows.append([predicted, resident("VmHWM:") - before])
print(json.dumps(rows))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is counted otherwise elsewhere")
def test_resident_memory_is_predicted() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], cwd=ROOT, capture_output=True, text=True, check=True)
    (rounded, highest_rounded), (exact, highest_exact) = json.loads(done.stdout)
    assert 1.4 * rounded < exact
    assert rounded == pytest.approx(highest_rounded, rel=0.15)
    assert exact == pytest.approx(highest_exact, rel=0.15)


# The choice


@pytest.fixture(scope="module")
def large() -> Any:
    return build_autoencoder(load_config(ROOT / "config/config_train_32g.json", []).autoencoder_def).eval()


def latent_on(device: str) -> Any:
    """What the choice looks at, of the latent of 240 x 240 x 156."""
    return SimpleNamespace(shape=(1, 8, 60, 60, 39), device=torch.device(device))


@pytest.mark.parametrize(
    ("device", "gib", "expected"),
    [
        ("cpu", 17.0, "whole"),
        ("cpu", 8.5, "exact in 9 slabs, whole volumes beside it"),
        ("cpu", 4.5, "rounded to 16 bit in 9 slabs, whole volumes beside it"),
        ("cpu", 2.0, "blended windows of at most "),
        ("cuda", 17.0, "whole"),
        ("cuda", 8.5, "exact in 9 slabs, whole volumes beside it"),
        ("cuda", 3.0, "exact in 9 slabs, whole volumes on the host"),
        ("cuda", 0.5, "exact in 18 slabs, whole volumes on the host"),
    ],
)
def test_a_budget_chooses(large: Any, device: str, gib: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 16 * GIB)
    plan = choose_plan(large, latent_on(device), int(gib * GIB))
    assert str(plan).startswith(expected)
    assert plan.peak <= gib * GIB


def test_volumes_do_not_wait_on_a_host_that_is_full(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 3 * GIB)
    assert choose_plan(large, latent_on("cuda"), 2 * GIB).keep == Keep(on_host=True, half=True)
    monkeypatch.setattr(decoding, "free_bytes", lambda device: GIB)
    assert choose_plan(large, latent_on("cuda"), 2 * GIB).window


def test_without_a_budget_what_is_free_counts(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((None, "whole"), (20 * GIB, "whole"), (7 * GIB, "exact in")):
        monkeypatch.setattr(decoding, "free_bytes", lambda device, free=free: free)
        assert str(choose_plan(large, latent_on("cpu"))).startswith(expected)


def test_too_little_for_anything_is_refused(large: Any) -> None:
    with pytest.raises(ConfigError, match=r"even in windows of 8 .* 0\.01: raise sampling.decode_gib"):
        choose_plan(large, latent_on("cpu"), int(0.01 * GIB))


def test_mixed_precision_halves_what_waits_but_not_what_is_normalised(large: Any) -> None:
    full, mixed = (Costs(large, (1, 8, 60, 60, 39), autocast, scratch=False) for autocast in (False, True))
    assert full.whole() / GIB == pytest.approx(12.9, abs=0.1)  # as counted on tensors of plain decoding
    assert mixed.whole() / GIB == pytest.approx(10.8, abs=0.15)
    assert mixed.pieces(2**28, Keep(on_host=True))[1] == full.pieces(2**28, Keep(on_host=True))[1] / 2


def test_free_memory_is_the_containers_where_there_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(allocator, "MEMINFO", meminfo)
    monkeypatch.setattr(allocator, "CGROUP", tmp_path)
    assert free_bytes(tiny.CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(tiny.CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert free_bytes(tiny.CPU) == 1500000
    (tmp_path / "memory.max").write_text("30000000\n")
    assert free_bytes(tiny.CPU) == 5000 * 1024
    monkeypatch.setattr(allocator, "MEMINFO", tmp_path / "missing")
    assert free_bytes(tiny.CPU) is None


# In the sampler


def sampler(decode_gib: float | None) -> Sampler:
    cfg = tiny.config(NoiseScheduler={"type": "rflow"}, diffusion_train={"patch_size": [40, 32, 24]})
    statistics = LatentStatistics(torch.zeros(1, 1, 1, 1), 1.25)
    card = tiny.diffusion_card(cfg)
    return Sampler(network("two levels"), tiny.unet(cfg), statistics, card, tiny.CPU, decode_gib=decode_gib)


def test_the_sampler_decodes_whole_where_that_fits_and_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, within = sampler(None), sampler(0.0036)
    z = latent(20, 16, 12)
    with torch.inference_mode():
        expected = plain.autoencoder.decode(z / 1.25).clamp(0, 1)
        assert torch.equal(plain.decode(z), expected)
        assert str(plain.decoding) == "whole"
        monkeypatch.setattr(decoding, "SLAB_BYTES", (2**17,))
        for _ in range(2):
            torch.testing.assert_close(within.decode(z), expected, atol=1e-5, rtol=0)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("decoding:")]
    # What is usual is not said, nor anything twice.
    assert [line.split(",")[0] for line in said] == ["decoding: exact in 8 slabs"]
    assert expected.std() > 0.1


def test_slabs_are_thick_enough_for_fast_convolutions_on_a_cpu() -> None:
    """Torch takes its slow 3-D convolution for one sample if channels * planes * rows are at most 20480."""
    for channels, rows, columns in ((64, 240, 156), (128, 144, 112), (256, 120, 78), (8, 256, 200)):
        bytes_per_plane = 4 * channels * rows * columns
        assert channels * (min(SLAB_BYTES) // bytes_per_plane + 2) * rows > 20480
        # Before upsampling: planes of a quarter that become eight times as much, in windows of two.
        assert channels * (max(1, min(SLAB_BYTES) // (2 * bytes_per_plane)) + 1) * rows / 2 > 20480


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep", KEEPS)
def test_on_a_gpu(keep: str) -> None:
    autoencoder, z = network("three levels").cuda(), latent(24, 20, 16).cuda()
    plain = autoencoder.decode(z)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    image = decode(autoencoder, z, pieces(2**20, KEEPS[keep]))
    peak, _ = Costs(autoencoder, tuple(z.shape), autocast=False).pieces(2**20, KEEPS[keep])
    assert torch.cuda.max_memory_allocated() - before < 1.15 * peak
    tolerance = 0.02 if KEEPS[keep].half else 1e-4
    torch.testing.assert_close(image, plain, atol=tolerance, rtol=0)
