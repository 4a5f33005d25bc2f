"""Training steps and validations of both stages on a CPU, ours against the reference recipe.

python -m benchmarks.train_step
"""

from typing import Any

import torch

from benchmarks.measure import (
    Timing,
    arguments,
    counted_flops,
    interleaved,
    peak_flops,
    peak_resident,
    table,
    write_result,
)
from benchmarks.settings import CPU, settings
from benchmarks.steps import NUM_VOLUMES, WORKS, named_work
from ldm3d.allocator import as_glibc_is, keep_freed_memory

RECIPES = {"ours": True, "reference": False}
REPEATS = 9


def main() -> None:
    args = arguments(__doc__).parse_args()
    keep_freed_memory()
    networks = ["tiny"] if args.tiny else ["medium", "demo"]
    # Validation costs as the forward pass does: it is measured with the small networks alone.
    names = [(name, network) for network in networks for name in WORKS if network != "medium" or name.endswith("step")]
    before = peak_flops(CPU, torch.float32)
    rows = [row(name, network, 1 if args.tiny else REPEATS) for name, network in names]
    # What the machine can do at best; another moment may have been better.
    peak = {what: max(before[what], again) for what, again in peak_flops(CPU, torch.float32).items()}
    for entry in rows:
        add_shares(entry, max(peak.values()))
    print(table(rows))
    write_result(args.output, {"peak_flops": peak, "validated_volumes": NUM_VOLUMES, "rows": rows})


def add_shares(entry: dict[str, Any], peak: float) -> None:
    """Achieved share of the machine's operations a second, by the fastest call: as the peak is the fastest, too."""
    for recipe in RECIPES:
        fastest = float(entry[f"{recipe} spread"].split()[0])
        entry[f"{recipe}, share of peak"] = entry[f"{recipe} GFLOP"] * 1e9 / fastest / peak


def row(name: str, network: str, repeats: int) -> dict[str, Any]:
    """Seconds, ratio, memory and counted work of one piece of work by both recipes."""
    cfg = settings(network)
    works = {recipe: WORKS[name](cfg, CPU, ours) for recipe, ours in RECIPES.items()}
    work = {recipe: counted_flops(works[recipe]) for recipe in RECIPES}
    # Keeping freed memory is ours: the reference is timed without it.
    timings = interleaved(works | {"reference": as_glibc_is()(works["reference"])}, CPU, repeats)
    del works
    # A process for each takes seconds to start, so memory is measured where it says most.
    measured = RECIPES.items() if network == "medium" and name.endswith("step") else ()
    memory = {recipe: peak_resident(named_work, name, network, ours) for recipe, ours in measured}
    return {
        "what": name,
        "networks": network,
        "batch": cfg.autoencoder_train.batch_size if name.startswith("auto") else cfg.diffusion_train.batch_size,
        **seconds(timings),
        "ours GiB": memory.get("ours"),
        "reference GiB": memory.get("reference"),
        "ours GFLOP": work["ours"] / 1e9,
        "reference GFLOP": work["reference"] / 1e9,
    }


def seconds(timings: dict[str, Timing]) -> dict[str, Any]:
    """Medians, their ratio, and the spread from fastest to slowest."""
    return {
        "ours s": timings["ours"].median,
        "reference s": timings["reference"].median,
        "times as fast": timings["reference"].median / timings["ours"].median,
        "ours spread": f"{timings['ours'].fastest:.3g} to {timings['ours'].slowest:.3g}",
        "reference spread": f"{timings['reference'].fastest:.3g} to {timings['reference'].slowest:.3g}",
    }


if __name__ == "__main__":
    main()
