"""Exported networks against the project's own, on a CPU: one evaluation of the U-Net, one decoding, one volume.

    python -m benchmarks.exported

On the demo weights. `exported` is what run_exported.py does, `exported, as torch has it` the same without oneDNN's
convolutions; torch.compile and AOTInductor are measured where there is a C++ compiler. In turn, medians.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Work, arguments, interleaved, table, write_result
from benchmarks.settings import CPU
from ldm3d.kernels import batch_invariant
from ldm3d.sampling import Sampler
from mlops.deployment.export import Decoder, Denoiser, export
from mlops.deployment.run_exported import DECODER, UNET, Exported

WEIGHTS = Path("checkpoints/demo")
STEPS = 20


def main() -> None:
    args = arguments(__doc__).parse_args()
    repeats = 1 if args.tiny else 9
    sampler = Sampler.from_folder(WEIGHTS, CPU, amp=False)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        started = time.perf_counter()
        with torch.inference_mode(False):
            difference = export(WEIGHTS, folder, steps=2 if args.tiny else STEPS)
        facts = {"export_seconds": time.perf_counter() - started, "max_difference": difference}
        latent = torch.randn(1, *sampler.card.latent_shape)
        rows = []
        networks: dict[str, tuple[nn.Module, str, tuple[Any, ...]]] = {
            "U-Net": (Denoiser(sampler.unet), UNET, (latent, torch.tensor([500.0]))),
            "decoder": (Decoder(sampler), DECODER, (latent,)),
        }
        exported = Exported(folder)
        for what, (network, file, inputs) in networks.items():
            works = works_of(network, getattr(exported, Path(file).stem), folder / file, inputs, compiled=not args.tiny)
            rows += compared(what, works, repeats)
        volume: dict[str, Work] = {
            "eager": lambda: sampler.sample(0, [0], steps=len(exported.card["steps"])),
            "exported": lambda: exported.sample(0, 0),
        }
        rows += compared(f"a volume, {len(exported.card['steps'])} steps", volume, max(1, repeats // 3))
    write_result(args.output, {**facts, "rows": rows})
    print(table(rows))


def works_of(
    network: nn.Module, exported: Callable[..., Any], file: Path, inputs: tuple[Any, ...], compiled: bool
) -> dict[str, Work]:
    program = torch.export.load(file)
    plain = program.module()
    works: dict[str, Work] = {
        "eager": lambda: eager(network, inputs),
        "exported": lambda: exported(*inputs),
        "exported, as torch has it": lambda: plain(*inputs),
    }
    if compiled and shutil.which("c++"):
        fast = torch.compile(network)
        works["torch.compile"] = lambda: fast(*inputs)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(file.with_suffix(".aoti.pt2")))
        ahead = torch._inductor.aoti_load_package(package)
        works["AOTInductor"] = lambda: ahead(*inputs)
    return works


def eager(network: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """As `Sampler` computes it."""
    with batch_invariant(CPU):
        return network(*inputs)


def compared(what: str, works: dict[str, Work], repeats: int) -> list[dict[str, Any]]:
    timings = interleaved(works, CPU, repeats)
    own = timings["eager"].median
    return [
        {
            "what": what,
            "how": how,
            "s": timing.median,
            "times as fast as eager": own / timing.median,
            "spread": f"{timing.fastest:.3g} to {timing.slowest:.3g}",
        }
        for how, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
