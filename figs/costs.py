"""What sampling steps are worth, and what memory and time depend on: plots of benchmarks/results."""

from typing import Any

from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figs.page import BLUE, GREEN, GREY, ORANGE, foot, made_by, page

Result = dict[str, Any]
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"))
GIB = 2**30


def draw_steps(quality: Result, sampling: Result, demo: Result) -> Any:
    """Quality and time of a generated volume against the number of sampling steps.

    Args:
        quality: of `benchmarks.quality`.
        sampling: of `benchmarks.sampling`.
        demo: of `evaluate.py`, for what the figures are to be read against.
    """
    rows, counts = quality["rows"], [row["steps"] for row in quality["rows"]]
    figure, (distance, likeness, time) = page(3.3, 1, 3)
    references = demo["metrics"]["kid"]["references"]
    distance.plot(counts, [row["KID"] for row in rows], marker="o", color=BLUE, label="generated")
    distance.axhline(references["reconstructions"], color=ORANGE, ls="--", label="reconstructions")
    distance.axhline(references["real_halves"]["mean"], color=GREY, ls=":", label="held-out against held-out")
    distance.set(title="KID: lower is better", ylabel="KID on features of the image", ylim=(-0.15, None))
    distance.legend(loc="center", bbox_to_anchor=(0.5, 0.35))
    for (name, label), (colour, line, mark) in zip(
        (("contrast", "interior contrast"), ("sharpness", "sharpness")), LINES, strict=False
    ):
        likeness.plot(counts, [row[name] for row in rows], line, marker=mark, color=colour, label=label)
    likeness.axhline(1, color=GREY, ls=":", label="held-out phantoms")
    likeness.set(title="likeness: 1 is like real", ylabel="generated / held-out", ylim=(0.4, 1.03))
    likeness.legend(loc="lower right")
    for batch, (colour, line, mark) in zip(("alone", "batch of 4"), LINES, strict=False):
        few, many = seconds_by_steps(sampling, batch)
        time.plot(*zip(few, many, strict=True), line, marker=mark, color=colour, label=batch)
        # Each step costs the same, and decoding comes on top.
        slope = (many[1] - few[1]) / (many[0] - few[0])
        beyond = [n for n in counts if n >= many[0]]
        time.plot(beyond, [many[1] + slope * (n - many[0]) for n in beyond], line, color=colour, alpha=0.35)
    time.plot([], [], color=GREY, alpha=0.35, label="extrapolated")
    time.set(title="time, decoding included", ylabel="seconds a volume", yscale="log")
    time.yaxis.set_major_formatter(PLAIN)
    time.legend()
    for axes in (distance, likeness, time):
        axes.set(xscale="log", xlabel="sampling steps", xticks=(5, 10, 20, 50, 200, 1000))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_locator(NullLocator())
    what = f"{quality['volumes']} volumes, {quality['reference']} held-out phantoms"
    foot(figure, f"{made_by(quality['made'])}; {what}\nTime: {made_by(sampling['made'])}")
    return figure


def seconds_by_steps(sampling: Result, batch: str) -> list[tuple[int, float]]:
    """Steps and seconds a volume of the demo's networks, as measured."""
    return sorted(
        (int(row["what"].removeprefix(f"{batch}, ").split()[0]), row["ours s a volume"])
        for row in sampling["rows"]
        if row["networks"] == "demo" and row["what"].startswith(f"{batch}, ")
    )


KEPT = {"False": "false", "norms": '"norms"', "blocks": '"blocks"'}
PRECISIONS = {"fp32": ("float32", BLUE), "autocast": ("bfloat16", ORANGE)}


def draw_memory(result: Result) -> Any:
    """What a training step holds, by precision and by what is computed again: `benchmarks.memory_check` on a CPU."""
    figure, charts = page(3.2, 1, 2)
    for number, (axes, stage) in enumerate(zip(charts, ("autoencoder", "diffusion"), strict=True), 1):
        rows = {(r["precision"], str(r["checkpointing"])): r for r in result["rows"] if r["stage"] == stage}
        order = [(precision, kept) for precision in PRECISIONS for kept in KEPT]
        for place, key in enumerate(order):
            colour = PRECISIONS[key[0]][1]
            tensors, resident, predicted = (
                rows[key][f"{name}_bytes"] / GIB for name in ("tensor", "resident", "predicted")
            )
            axes.barh(-place, resident, 0.72, color="white", edgecolor=colour, hatch="////", linewidth=1)
            axes.barh(-place, tensors, 0.72, color=colour)
            axes.plot([predicted] * 2, [-place - 0.46, -place + 0.46], color="black", linewidth=2)
        axes.set_yticks([-place for place in range(len(order))], [f"{PRECISIONS[p][0]}, {KEPT[k]}" for p, k in order])
        axes.grid(axis="y", visible=False)
        axes.set(title=f"a step of stage {number}: {next(iter(rows.values()))['case']}", xlabel="GiB")
    charts[0].set_ylabel("precision, use_checkpointing")
    handles = [
        Patch(color=GREY, label="tensors, measured"),
        charts[0].plot([], [], color="black", linewidth=2, label="tensors, predicted without running")[0],
        Patch(facecolor="white", edgecolor=GREY, hatch="////", label="resident memory of the process, measured"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    foot(
        figure,
        f"{result['command']}, {result['time'][:10]}, {result['machine']}, torch {result['torch'].split('+')[0]}",
    )
    return figure


def draw_growth(result: Result) -> Any:
    """Time of steps against the volumes' side and the batch, and of a data set against its size."""
    figure, charts = page(3.3, 1, 3)
    words = {
        "side": ("a step and the volumes' side", "voxels a side, 2 volumes"),
        "batch": ("a step and the batch", "volumes in a batch"),
        "volumes": ("what a data set costs once", "volumes in the data set"),
    }
    for axes, (what, (title, unit)) in zip(charts, words.items(), strict=True):
        for row, (colour, line, mark) in zip(
            (row for row in result["rows"] if row["with"] == what), LINES, strict=False
        ):
            sizes, seconds = ([float(number) for number in row[key].split(", ")] for key in ("at", "s"))
            label = f"{row['of']} $\\sim n^{{{row['exponent of time']:.1f}}}$"
            axes.plot(sizes, seconds, line, marker=mark, color=colour, label=label)
        axes.set(title=title, xscale="log", yscale="log", xlabel=unit, xticks=sizes, ylabel="seconds")
        axes.margins(y=0.25)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PLAIN)
            axis.set_minor_locator(NullLocator())
    for axes in charts[:2]:
        axes.legend(loc="upper left")
    charts[2].legend(loc="center", bbox_to_anchor=(0.5, 0.45))
    foot(figure, f"{made_by(result['made'])}; networks of the demo")
    return figure
