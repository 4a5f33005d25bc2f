"""A comparison as a page: one file without scripts, fonts or pictures from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ldm3d.reference_profile import ReferenceProfile
from mlops.monitoring.drift_folder import Folder
from mlops.monitoring.drift_statistics import LEAST_TO_CLEAR
from mlops.monitoring.drift_words import WORDS

WIDTH, HEIGHT, BINS = 280, 56, 28
VERDICTS = {
    "drift": ("bad", "Drift: the new volumes differ from those trained on"),
    "no drift": ("good", "No drift was found"),
    "too few": ("open", f"Too few volumes to judge: no drift was found, but {LEAST_TO_CLEAR} are needed to say so"),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1080px; margin: 32px auto; padding: 0 20px }
h1 { font-size: 22px; margin: 0 0 12px } h2 { font-size: 17px; margin: 32px 0 8px }
.verdict { padding: 14px 18px; border-radius: 8px; font-size: 18px; font-weight: 600 }
.bad { background: #fde8e6; color: #8c1d13 } .good { background: #e5f4ea; color: #14562b }
.open { background: #fdf3d8; color: #6b4a00 }
.small { color: #4a5866; font-size: 13px }
table { border-collapse: collapse; width: 100% } td, th { padding: 6px 10px; text-align: left; vertical-align: middle }
th { font-size: 13px; color: #4a5866; border-bottom: 1px solid #c6d0da } td { border-bottom: 1px solid #e6ebf0 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.drifted td:first-child { border-left: 4px solid #c0392b; font-weight: 600 }
tr.same td:first-child { border-left: 4px solid transparent }
code { font-size: 13px; color: #4a5866; font-weight: 400 }
.old { color: #5d6d7c } .new { color: #c2570c }
@media print { body { margin: 0 } }
"""


def report(result: dict[str, Any], profile: ReferenceProfile, folder: Folder) -> str:
    """The page of drift.json's content and of the numbers behind it."""
    kind, verdict = VERDICTS[result["status"]]
    made, volumes = result["made"], result["volumes"]
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>Data drift: {escape(result["status"])}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Data drift of {escape(made['data'])}</h1>",
        f'<p class="verdict {kind}">{escape(verdict)}</p>',
        f'<p class="small">{volumes["judged"]} of {volumes["found"]} volumes ({escape(made["contrast"])}) against '
        f"{made['reference_volumes']} training volumes of {escape(made['reference'])}; {escape(made['time'])}</p>",
        _list("What it probably is", result["probable_causes"]),
        _list(
            f"Volumes that could not be read: {len(volumes['unreadable'])}",
            [f"{name}: {reason}" for name, reason in volumes["unreadable"].items()],
        ),
        _list("What was not compared", [f"{what}: {why}" for what, why in result["not_compared"].items()]),
        "<h2>Each figure</h2>",
        '<p class="small">One count for each volume: <b class="old">grey: training</b>, '
        '<b class="new">orange: new volumes</b>.</p>',
        _table(result, profile, folder),
        _method(result),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{escape(title)}</h2><ul>{items}</ul>" if lines else ""


def _table(result: dict[str, Any], profile: ReferenceProfile, folder: Folder) -> str:
    head = (
        "<tr><th>Figure</th><th>Training and new volumes</th><th class=number>Median, training</th>"
        "<th class=number>Median, new</th><th class=number>p, corrected</th><th class=number>PSI (by chance)</th></tr>"
    )
    rows = [_row(comparison, result, profile, folder) for comparison in result["comparisons"]]
    return f"<table>{head}{''.join(rows)}</table>"


def _row(comparison: dict[str, Any], result: dict[str, Any], profile: ReferenceProfile, folder: Folder) -> str:
    name = comparison["name"]
    label, unit = WORDS[name]
    medians = [comparison.get("median_training"), comparison.get("median_new")]
    numbers = ["" if value is None else f"{value:.4g}" for value in medians]
    numbers.append(f"{comparison['p_value']:.2g}")
    index, chance = comparison["psi"], comparison["psi_by_chance"]
    numbers.append("" if index is None else f"{index:.2f} (to {chance:.2f})")
    if name in profile.features:
        picture = histogram(profile.features[name], folder.features[name])
    elif name in profile.facts:
        picture = _counts(profile.facts[name], folder.facts[name])
    else:
        picture = f"MMD<sup>2</sup> {comparison['statistic']:.3f}; 0 for equal sets, at most 2"
    cells = "".join(f"<td class=number>{number}</td>" for number in numbers)
    first = f"{escape(label)}{f', {escape(unit)}' if unit else ''}<br><code>{escape(name)}</code>"
    kind = "drifted" if name in result["drifted"] else "same"
    return f'<tr class="{kind}"><td>{first}</td><td>{picture}</td>{cells}</tr>'


def _counts(old: dict[str, int], new: dict[str, int]) -> str:
    def text(counts: dict[str, int]) -> str:
        return escape(", ".join(f"{value} ({count})" for value, count in sorted(counts.items())))

    return f'<span class="old">{text(old)}</span><br><span class="new">{text(new)}</span>'


def histogram(old: Sequence[float], new: Sequence[float]) -> str:
    """Both as shares of their own number, over the range of both, with the range written under it."""
    low, high = min(*old, *new), max(*old, *new)
    if low == high:
        return f'<span class="small">all {low:g}</span>'
    shares = [np.histogram(values, BINS, (low, high))[0] / len(values) for values in (old, new)]
    top = max(float(share.max()) for share in shares)
    step, base = WIDTH / BINS, HEIGHT - 14
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{base * (1 - share / top):.1f}" width="{step:.1f}" '
        f'height="{base * share / top:.1f}" fill="#aab6c2"/>'
        for i, share in enumerate(shares[0])
        if share
    )
    heights = [f"{base * (1 - share / top):.1f}" for share in shares[1]]
    corners = [f"{(i + side) * step:.1f},{height}" for i, height in enumerate(heights) for side in (0, 1)]
    line = f'<polyline points="0,{base} {" ".join(corners)} {WIDTH},{base}" fill="#e8771f33" stroke="#c2570c"/>'
    style = 'font-size="10" fill="#4a5866"'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="training {min(old):g} to {max(old):g}, new {min(new):g} to {max(new):g}">{bars}{line}'
        f'<text x="0" y="{HEIGHT - 2}" {style}>{low:.3g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 2}" text-anchor="end" {style}>{high:.3g}</text></svg>'
    )


def _method(result: dict[str, Any]) -> str:
    return (
        "<h2>How to read this</h2><p>Each volume counts once, with one number for each figure. A figure has drifted "
        f"where its corrected p is below {result['alpha']:g}: at most that share of folders that come from the same "
        "source raise any alarm, however many figures are compared (Holm's correction). Numbers are compared by the "
        "Kolmogorov-Smirnov test, orientation and scanner by chi-square and latents by maximum mean discrepancy, both "
        "by exchanging volumes. PSI says how large a difference is; of few volumes chance alone makes it large, up to "
        "the value in brackets in 95 of 100 folders.</p>"
    )
