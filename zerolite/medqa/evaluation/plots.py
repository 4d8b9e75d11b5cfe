"""Plots of an evaluation, as SVG to stand in a page: accuracies with their intervals, differences with theirs."""

import io
import re
from collections.abc import Sequence

from zerolite.medqa.evaluation.record import BASE, MODEL, Evaluation

COLORS = {MODEL: "#1f6feb", BASE: "#8b949e"}
ROW_INCHES = 0.32


def accuracies(found: Evaluation) -> str:
    """acc of each kind and way, the model's above its base's, with intervals; the majority baseline as a line."""
    keys = list(dict.fromkeys((one["kind"], one["language"], one["way"]) for one in found.choices))
    figure, axes = _figure(len(keys) * len(found.models))
    for place, key in enumerate(keys):
        rows = [one for one in found.choices if (one["kind"], one["language"], one["way"]) == key]
        for number, one in enumerate(rows):
            at = place + (number - (len(rows) - 1) / 2) * 0.36
            acc, low, high = (100 * one[name] for name in ("acc", "acc_low", "acc_high"))
            label = one["of"] if place == 0 else None
            axes.barh(at, acc, height=0.32, color=COLORS[one["of"]], alpha=0.75, label=label)
            axes.plot([low, high], [at, at], color="#1d2430", linewidth=1.2)
        majority = 100 * rows[0]["majority"]
        label = "majority" if place == 0 else None
        axes.plot([majority] * 2, [place - 0.45, place + 0.45], color="#cf222e", linewidth=1.5, label=label)
    axes.set_xlim(0, 100)
    axes.set_xlabel("right (%), with 95 % intervals")
    names = [f"{kind}, {language}, by {way}" if kind != language else f"all, by {way}" for kind, language, way in keys]
    return _drawn(figure, axes, names)


def differences(found: Evaluation) -> str:
    """Each difference over its base's value, in percent, so that losses and accuracies share an axis."""
    rows = [one for one in found.comparison if one["base"]]
    if not rows:
        return ""
    figure, axes = _figure(len(rows))
    axes.axvline(0, color="#1d2430", linewidth=1)
    for place, one in enumerate(rows):
        value, low, high = (100 * one[name] / abs(one["base"]) for name in ("difference", "low", "high"))
        color = {"better": "#1a7f37", "worse": "#cf222e"}.get(one["model_is"], COLORS[BASE])
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot([value], [place], "o", color=color, markersize=5)
    axes.set_xlabel("difference, model less base, in % of the base's value, with 95 % intervals")
    return _drawn(figure, axes, [f"{one['measure']}, {one['group']}" for one in rows], is_with_legend=False)


def _figure(num_rows: int):
    from matplotlib.figure import Figure  # slow to load; without pyplot it needs no display

    figure = Figure(figsize=(9, 1.1 + ROW_INCHES * num_rows))
    return figure, figure.subplots()


def _drawn(figure, axes, names: Sequence[str], is_with_legend: bool = True) -> str:
    import matplotlib

    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if is_with_legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
    figure.tight_layout()
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zerolite"}):  # texts stay texts; same bytes
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", written.getvalue(), flags=re.DOTALL)
