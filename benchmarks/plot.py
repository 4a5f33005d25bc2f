"""One table and one plot of what the benchmarks have measured.

    python -m benchmarks.plot

Reads benchmarks/results/*.json; writes benchmarks/results/speed.md and figs/speed.png. `--results` and
`--picture` name another folder and picture.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks.measure import RESULTS, arguments, table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GOALS = {"diffusion step": 3.0, "sampling": 60.0}
GPU_GOALS = {"autoencoder step": 3.0, "diffusion step": 6.0, "sampling": 60.0}


class Ratio(NamedTuple):
    """How many times as fast ours is, and on what that was measured."""

    what: str
    where: str
    ours: float
    reference: float
    goal: float | None

    @property
    def value(self) -> float:
        return self.reference / self.ours


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--picture", type=Path, default=Path("figs/speed.png"), help="the plot")
    args = parser.parse_args()
    ratios = [*of_steps(load(args.results, "train_step")), *of_sampling(load(args.results, "sampling"))]
    ratios += of_gpu(load(args.results, "gpu"))
    text = table([row_of(ratio) for ratio in ratios])
    (args.results / "speed.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(ratios, args.picture)


def load(folder: Path, name: str) -> dict[str, Any]:
    """A result; empty where that benchmark has not been run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def of_steps(result: dict[str, Any]) -> Iterator[Ratio]:
    for row in result.get("rows", []):
        yield Ratio(row["what"], f"CPU, {row['networks']}", row["ours s"], row["reference s"], GOALS.get(row["what"]))


def of_sampling(result: dict[str, Any]) -> Iterator[Ratio]:
    for row in result.get("rows", []):
        if "ours s a volume" in row:
            sampled = row["what"] != "decode"
            what = f"sampling, {row['what']}" if sampled else "decoding"
            goal = GOALS["sampling"] if sampled else None
            yield Ratio(what, f"CPU, {row['networks']}", row["ours s a volume"], row["reference s a volume"], goal)


def of_gpu(result: dict[str, Any]) -> Iterator[Ratio]:
    for row in [*result.get("recipes", []), *result.get("sampling", [])]:
        if "reference s" in row:
            kind = "sampling" if row["what"].startswith("sample") else row["what"]
            yield Ratio(row["what"], "GPU, 32g", row["ours s"], row["reference s"], GPU_GOALS.get(kind))


def row_of(ratio: Ratio) -> dict[str, Any]:
    return {
        "what": ratio.what,
        "on": ratio.where,
        "ours, s": ratio.ours,
        "reference, s": ratio.reference,
        "times as fast": ratio.value,
        "goal": ratio.goal,
    }


def draw(ratios: list[Ratio], path: Path) -> None:
    """One bar for each ratio, on a logarithmic axis, with its goal as a mark."""
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.34 * len(ratios)), layout="constrained")
    places = range(len(ratios) - 1, -1, -1)
    axes.barh(places, [ratio.value for ratio in ratios], height=0.62, color="#3b6ea5")
    for place, ratio in zip(places, ratios, strict=True):
        # In front of the goals' marks, one of which may be where the number is.
        label = axes.text(ratio.value * 1.06, place, f"{ratio.value:.3g}", va="center", fontsize=9, zorder=5)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
        if ratio.goal:
            axes.plot([ratio.goal] * 2, [place - 0.4, place + 0.4], color="#c0392b", linewidth=2)
    if any(ratio.goal for ratio in ratios):
        axes.plot([], [], color="#c0392b", linewidth=2, label="goal")
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(list(places), [f"{ratio.what} ({ratio.where})" for ratio in ratios], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.5, *(ratio.value for ratio in ratios)), right=3 * max(ratio.value for ratio in ratios))
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_xlabel("times as fast as the reference recipe (MONAI tutorial 3d_ldm), same networks and data")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
