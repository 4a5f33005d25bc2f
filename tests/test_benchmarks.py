"""benchmarks: they run, measure what they say, and compare recipes that start alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu, plot, scaling, train_step
from benchmarks.growth import exponent
from benchmarks.measure import counted_flops, interleaved, peak_resident, table, write_result
from benchmarks.reference import NUM_TIMESTEPS, ReferenceAutoencoder, ReferenceDiffusion
from benchmarks.sampling import reference_of, sampler_of
from benchmarks.scaling import pages_of_crop
from benchmarks.scaling_plan import all_reduce_seconds, plan
from benchmarks.settings import CPU, settings
from benchmarks.steps import volumes
from ldm3d.autoencoder_stage import AutoencoderStage
from ldm3d.kernels import BatchInvariant

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call a benchmark's main with `--tiny` and more, and read its result."""

    def call(module: Any, *more: str) -> dict[str, Any]:
        name = module.__name__.rpartition(".")[2]
        output = tmp_path / f"{name}.json"
        monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", "--tiny", "--output", str(output), *more])
        module.main()
        return json.loads(output.read_text())

    return call


@pytest.mark.timeout(900)  # it compiles the U-Net in many ways, one minute alone and many beside other work
def test_all_that_is_measured_on_a_gpu_runs(run: Run) -> None:
    result = run(gpu, "--device", "cpu")
    parts = {name: rows for name, rows in result.items() if name not in ("made", "seconds")}
    assert len(parts) == 8
    for name, rows in parts.items():
        assert rows, name
        for row in rows:
            assert not {"failed", "skipped"} & row.keys(), (name, row)
    by_name = {row["what"]: row for row in result["recipes"]}
    assert by_name["diffusion step"]["limit s"] == 0.08
    assert by_name["diffusion step"]["time over limit"] == by_name["diffusion step"]["ours s"] / 0.08


def test_a_part_that_fails_says_why_and_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried\nmore")

    for name in ("recipes", "sampling", "fit", "one_by_one", "sampling_settings"):
        monkeypatch.setattr(gpu, name, broken)
    monkeypatch.setattr(gpu, "peaks", lambda bench: [])
    monkeypatch.setattr(gpu, "where_time_goes", lambda bench: [{"what": "still measured"}])
    result = run(gpu, "--device", "cpu")
    assert result["recipes"] == [{"failed": "RuntimeError: CUDA out of memory. Tried"}]
    assert result["where time goes"] == [{"what": "still measured"}]


def test_steps_and_the_plot_of_them(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(train_step)
    assert [row["what"] for row in result["rows"]] == list(train_step.WORKS)
    assert {"command", "date", "commit", "machine"} == result["made"].keys()
    assert {"cpu", "torch", "python", "threads"} <= result["made"]["machine"].keys()
    step = result["rows"][1]
    assert step["times as fast"] == pytest.approx(step["reference s"] / step["ours s"])
    assert step["reference GFLOP"] > 1.1 * step["ours GFLOP"]  # it encodes at every step
    picture = tmp_path / "speed.png"
    monkeypatch.setattr("sys.argv", ["plot.py", "--results", str(tmp_path), "--picture", str(picture)])
    plot.main()
    assert picture.stat().st_size > 10_000
    assert "| diffusion step | CPU, tiny |" in (tmp_path / "speed.md").read_text()


def test_costs_of_a_volume_and_the_plan_that_follows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(build: Callable[..., Any], *given: Any) -> float:
        build(*given)()
        return len(list(given[0].glob("case-*")))

    monkeypatch.setattr(scaling, "peak_resident", here)
    result = run(scaling)
    units, cfg = result["units"], settings("tiny")
    latent = 2 * 2 * 2 * cfg.latent_channels * 8**3  # both sides, mean and deviation, 16 bits
    assert (units["latent bytes"], units["latent bytes read a draw"]) == (latent, latent // 2)
    measured = {name: value for name, value in units.items() if name not in ("prepared shape", "start exponent of s")}
    assert all(value > 0 for value in measured.values()), measured
    assert [(start["volumes"], start["MiB"]) for start in result["starts"]] == [(10, 10240), (20, 20480)]
    assert units["start exponent of MiB"] == pytest.approx(1)
    assert [row["GPUs"] for row in result["plan"]] == [1, 8, 64, 512]


def test_the_plan_waits_for_the_slower_of_computing_and_exchanging() -> None:
    cfg = settings("tiny", "diffusion_train.batch_size=2")
    units = dict.fromkeys(
        ("prepare s", "encode FLOP", "prepared bytes", "crop bytes", "latent bytes read a draw"), 1.0
    ) | {f"step {stage} FLOP a volume": 320e12 for stage in (1, 2)}
    free, dear = (plan(units | {f"gradient {stage} bytes": n for stage in (1, 2)}, cfg) for n in (0.0, 1e12))
    assert [row["2: steps/s"] for row in free] == pytest.approx([0.5] * 4)
    assert [row["2: epoch h"] * 3600 for row in free] == pytest.approx(
        [100_000 // (2 * gpus) * 2 for gpus in (1, 8, 64, 512)]
    )
    # Of the 2 s, 4/3 hide what is exchanged: 7/4 of 5 s within a machine.
    assert 1 / dear[1]["2: steps/s"] == pytest.approx(2 + 8.75 - 4 / 3)
    assert all_reduce_seconds(40e9, 512) == pytest.approx(2 * 511 / 512)


def test_pages_of_a_crop() -> None:
    assert pages_of_crop((8, 8, 2048), (8, 8, 2048), 2) == 64
    assert pages_of_crop((8, 8, 2048), (2, 2, 2), 2) == 4
    assert pages_of_crop((2, 2, 16), (2, 2, 16), 2) == 1


def test_both_recipes_have_the_same_networks() -> None:
    cfg = settings("tiny")
    stage = AutoencoderStage(cfg, CPU, 10)
    reference = ReferenceAutoencoder(cfg, stage.autoencoder, CPU)
    image = volumes(1, (16, 16, 16))
    with torch.inference_mode():
        torch.testing.assert_close(reference.autoencoder.encode(image), stage.autoencoder.encode(image))
        sampler = sampler_of(cfg, CPU)
        nn.init.normal_(sampler.unet.out[2].conv.weight)  # fresh, it is zero and hides what comes before
        plain = reference_of(cfg, sampler, CPU).unet
        latent, timesteps = torch.randn(2, *cfg.latent_shape), torch.tensor([3.0, 700.0])
        ours = sampler.unet(latent, timesteps=timesteps)
        assert ours.std() > 0.1
        torch.testing.assert_close(plain(latent, timesteps=timesteps), ours, atol=1e-4, rtol=1e-4)
    kinds = {type(module).__name__ for module in plain.modules()}
    assert any("Attention" in kind or "SABlock" in kind for kind in kinds)
    assert not any(getattr(module, "use_flash_attention", False) for module in plain.modules())


def test_the_reference_encodes_at_every_step_and_takes_all_steps() -> None:
    cfg = settings("tiny")
    stage = AutoencoderStage(cfg, CPU, 10)
    sampler = sampler_of(cfg, CPU)
    image = volumes(3, (16, 16, 16))
    reference = ReferenceDiffusion(cfg, stage.autoencoder, sampler.unet, image, CPU)
    calls = []
    reference.autoencoder.encoder.register_forward_hook(lambda *given: calls.append("encoded"))
    reference.unet.register_forward_hook(lambda *given: calls.append("denoised"))
    before = reference.unet.out[2].conv.weight.detach().clone()
    reference.train_step(image)
    assert calls == ["encoded", "denoised"]
    assert not torch.equal(reference.unet.out[2].conv.weight, before)
    calls.clear()
    reference.denoise(3)
    assert calls == ["denoised"] * 3
    assert len(reference.scheduler.timesteps) == NUM_TIMESTEPS == 1000


def test_pieces_of_work_are_timed_in_turn() -> None:
    order: list[str] = []
    timings = interleaved({n: lambda n=n: order.append(n) for n in "ab"}, CPU, 3, 1, 2)  # type: ignore[misc]
    assert "".join(order) == "ab" + "aabb" * 3
    assert 0 < timings["a"].fastest <= timings["a"].median <= timings["a"].slowest


def allocate(mib: int) -> Callable[[], Any]:
    return lambda: torch.ones(mib, 2**18).sum()


def test_the_resident_peak_is_that_of_the_work() -> None:
    assert peak_resident(allocate, 512) == pytest.approx(0.5, abs=0.1)


def test_work_is_counted_whichever_kernel_does_it() -> None:
    convolution, x = nn.Conv3d(4, 8, 3, padding=1), torch.rand(1, 4, 5, 6, 7)
    expected = 2 * 27 * 4 * 8 * 5 * 6 * 7
    with torch.inference_mode():
        assert counted_flops(lambda: convolution(x)) == expected
        with BatchInvariant():
            assert counted_flops(lambda: convolution(x)) == expected


def test_exponents_and_tables(tmp_path: Path) -> None:
    assert exponent((1, 2, 4), (3, 24, 192)) == pytest.approx(3)
    assert table([{"a": 1234.5, "b": None}, {"c": 0.12345}]) == (
        "| a | b | c |\n| --- | --- | --- |\n| 1234 |  |  |\n|  |  | 0.123 |"
    )
    write_result(tmp_path / "new" / "result.json", {"rows": []})
    assert json.loads((tmp_path / "new" / "result.json").read_text())["rows"] == []
