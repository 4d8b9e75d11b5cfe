"""A tracker's timeline as a PNG, by matplotlib, and as one HTML page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from zerolite.memory.track_records import OUTSIDE, TRACKED_KINDS, Point, Region
from zerolite.memory.track_texts import columns, head, host_line, kind_rows, shown, unit_of

if TYPE_CHECKING:
    from zerolite.memory.track import Tracker

NUM_STEPS = 2  # shown: the last ones
MAX_SHOWN = 3000  # points of a page
COLORS = {
    "parameters": "#1d4e89", "master": "#3f7cac", "moments": "#95b8d1", "gradients": "#7b2d8b",
    "units in flight": "#00798c", "buckets": "#c77dbb", "activations": "#e09f3e", "logits": "#9e2a2b",
    "step scratch": "#6a994e", "other": "#adb5bd",
}  # fmt: skip
PHASE_COLORS = {"forward": "#f8edd8", "backward": "#f3e4f0", "step": "#e3efdb", OUTSIDE: "#ffffff"}


class Window:
    """The last steps of a timeline, in milliseconds from their begin, with bytes in one unit."""

    def __init__(self, tracker: Tracker):
        """ValueError where nothing was tracked."""
        points = list(tracker.points)
        ends = [step.end for step in tracker.steps]
        if len(ends) > NUM_STEPS:
            points = [point for point in points if point.time >= ends[-NUM_STEPS - 1]]
        if len(points) < 2:
            raise ValueError(
                "nothing was tracked yet: train inside `with zerolite.track(model, optimizer) as tracker:`"
            )
        self.begin, self.last = points[0].time, points[-1].time
        self.points = _thinned(points)
        self.regions = [one for one in tracker.regions if one.begin >= self.begin]
        self.most_bytes = max(max(point.peak_bytes, sum(point.bytes_of)) for point in points)
        self.unit, self.size = unit_of(self.most_bytes)
        self.kinds = [
            kind for index, kind in enumerate(TRACKED_KINDS) if any(point.bytes_of[index] > 0 for point in points)
        ]

    def milliseconds(self, time: int) -> float:
        return (time - self.begin) / 1e6

    def values(self, kind: str) -> list[float]:
        index = TRACKED_KINDS.index(kind)
        return [max(point.bytes_of[index], 0) / self.size for point in self.points]

    def phases(self) -> Iterator[tuple[str, float, float]]:
        """(phase, begin, end) in milliseconds, one after the other."""
        begin, phase = self.points[0].time, self.points[1].phase
        for last, point in pairwise(self.points):
            if point.phase != phase:  # a point's phase is that of the time before it
                yield phase, self.milliseconds(begin), self.milliseconds(last.time)
                begin, phase = last.time, point.phase
        yield phase, self.milliseconds(begin), self.milliseconds(self.last)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_SHOWN of them, the highest of each run of neighbours."""
    stride = -(-len(points) // MAX_SHOWN)
    return [
        max(points[first : first + stride], key=lambda point: point.peak_bytes)
        for first in range(0, len(points), stride)
    ]


def write_timeline(tracker: Tracker, path: Path) -> None:
    """See `Tracker.write_timeline`."""
    try:
        figure_of = import_module("matplotlib.figure").Figure  # without pyplot it needs no display
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the timeline as a PNG needs matplotlib: pip install 'zerolite[train]', or write_page(...), which needs "
            "nothing",
            name="matplotlib",
        ) from error
    window = Window(tracker)
    figure = figure_of(figsize=(12, 6), layout="constrained")
    axis = figure.subplots()
    times = [window.milliseconds(point.time) for point in window.points]
    names = set()
    for phase, begin, end in window.phases():
        axis.axvspan(begin, end, color=PHASE_COLORS[phase], zorder=0, linewidth=0)
        if end - begin > 0.05 * times[-1]:
            axis.text((begin + end) / 2, 1.01, phase, transform=axis.get_xaxis_transform(), ha="center", fontsize=9)
        names.add(phase)
    axis.stackplot(
        times,
        *(window.values(kind) for kind in window.kinds),
        labels=window.kinds,
        colors=[COLORS[kind] for kind in window.kinds],
        linewidth=0,
    )
    peaks = [point.peak_bytes / window.size for point in window.points]
    axis.plot(times, peaks, color="#212529", linewidth=0.7, label="most between two labels")
    axis.set_xlim(0, times[-1])
    axis.set_ylim(0, 1.05 * window.most_bytes / window.size)
    axis.set_xlabel(f"milliseconds, the last {min(NUM_STEPS, max(len(tracker.steps), 1))} steps")
    axis.set_ylabel(f"{window.unit} on this rank's device")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(head(tracker), x=0.01, ha="left", fontsize=11)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130, format="png")


# The page #

WIDTH, HEIGHT, LEFT, TOP, ROW = 1100, 360, 96, 24, 12
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #212529; max-width: 1140px; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.25rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { white-space: nowrap; padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #dee2e6 }
th:first-child, td:first-child { text-align: left } .planned { color: #6c757d } .wide { overflow-x: auto }
.legend span { margin-right: 1.1rem; white-space: nowrap }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em }
"""


def write_page(tracker: Tracker, path: Path) -> None:
    """See `Tracker.write_page`."""
    window = Window(tracker)
    title = escape(head(tracker))
    legend = "".join(f'<span><i style="background:{COLORS[kind]}"></i>{kind}</span>' for kind in window.kinds[::-1])
    shown_steps = min(NUM_STEPS, max(len(tracker.steps), 1))
    parts = [
        f"<h1>{title}</h1>",
        f"<h2>The last {shown_steps} step{'s' * (shown_steps > 1)}, this rank</h2>",
        f'<p class="legend">{legend}<span>black line: the most between two labels</span></p>',
        _timeline(window),
        "<h2>Peaks by kind</h2>",
        _kinds(columns(tracker.all_peaks, tracker.plan)),
        f"<p>{escape(host_line(tracker))}</p>",
        "<h2>Steps</h2>",
        _steps(tracker),
    ]
    page = f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><body>\n"
    path.write_text(page + "\n".join(filter(None, parts)) + "\n</body></html>\n", encoding="utf-8")


def _timeline(window: Window) -> str:
    """An SVG: phases, stacked kinds, and a row of regions for each kind of label."""
    duration = max(window.milliseconds(window.last), 1e-6)
    top_value = 1.05 * window.most_bytes / window.size
    rows = list(dict.fromkeys(region.kind for region in window.regions))
    total_height = TOP + HEIGHT + 34 + ROW * 1.5 * len(rows)

    def x(milliseconds: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * milliseconds / duration

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - value / top_value)

    parts = [f'<svg viewBox="0 0 {WIDTH} {total_height:.0f}" role="img" font-size="12" fill="#212529">']
    for phase, begin, end in window.phases():
        parts.append(
            _box(x(begin), TOP, x(end) - x(begin), HEIGHT, PHASE_COLORS[phase], f"{phase}: {end - begin:.3g} ms")
        )
        if x(end) - x(begin) > 60:
            parts.append(f'<text x="{(x(begin) + x(end)) / 2:.0f}" y="{TOP - 7}" text-anchor="middle">{phase}</text>')
    times = [window.milliseconds(point.time) for point in window.points]
    below = [0.0] * len(times)
    for kind in window.kinds:
        above = [low + value for low, value in zip(below, window.values(kind), strict=True)]
        edge = [f"{x(time):.1f},{y(value):.1f}" for time, value in zip(times, above, strict=True)]
        back = [f"{x(time):.1f},{y(value):.1f}" for time, value in zip(times, below, strict=True)]
        points = " ".join([*edge, *reversed(back)])
        parts.append(f'<polygon fill="{COLORS[kind]}" points="{points}"><title>{kind}</title></polygon>')
        below = above
    line = " ".join(
        f"{x(time):.1f},{y(point.peak_bytes / window.size):.1f}"
        for time, point in zip(times, window.points, strict=True)
    )
    parts.append(f'<polyline fill="none" stroke="#212529" stroke-width="0.8" points="{line}"/>')
    for value in _ticks(top_value):
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.4g}</text>')
    for time in _ticks(duration):
        parts.append(f'<text x="{x(time):.0f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{time:.4g} ms</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP - 7}" text-anchor="end">{window.unit}</text>')
    for index, kind in enumerate(rows):
        row_y = TOP + HEIGHT + 28 + ROW * 1.5 * index
        parts.append(f'<text x="{LEFT - 6}" y="{row_y + 10:.0f}" text-anchor="end" font-size="10">{kind}</text>')
        for region in window.regions:
            if region.kind == kind:
                parts.append(_region(region, window, x, row_y))
    return "\n".join([*parts, "</svg>"])


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 on, four to nine, below `end` by a twentieth at least."""
    step = 10 ** math.floor(math.log10(end))
    step = next(step * part for part in (1, 0.5, 0.2, 0.1) if end / (step * part) >= 4)
    return [step * number for number in range(int(0.96 * end / step) + 1)]


def _region(region: Region, window: Window, x, row_y: float) -> str:
    begin, end = window.milliseconds(region.begin), window.milliseconds(region.end)
    text = f"{region.kind} ({region.name}): {end - begin:.3g} ms"
    return _box(
        x(begin),
        row_y,
        max(x(end) - x(begin), 0.6),
        ROW,
        "#3f7cac",
        text,
        'fill-opacity="0.55" stroke="#fff" stroke-width="0.4"',
    )


def _box(x: float, y: float, width: float, height: float, color: str, title: str, more: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}" {more}>'
        f"<title>{escape(title)}</title></rect>"
    )


def _kinds(found: Mapping[str, Mapping[str, int]]) -> str:
    """A row a kind, a column a phase, and what was planned for it."""
    unit, rows = kind_rows(found)
    marks = [' class="planned"' if name.endswith("planned") else "" for name in found]
    lines = [f"<tr><th>{unit}</th>" + "".join(map("<th{}>{}</th>".format, marks, found)) + "</tr>"]
    for kind, cells in rows.items():
        lines.append(f"<tr><td>{kind}</td>" + "".join(map("<td{}>{}</td>".format, marks, cells)) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _steps(tracker: Tracker) -> str:
    """The last twenty."""
    if not tracker.steps:
        return "<p>No step has ended.</p>"
    phases = list(tracker.all_peaks)
    names = ["step", "seconds", *phases, "host, this process", "host, workers"]
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for step in list(tracker.steps)[-20:]:
        peaks = [shown(step.peaks[phase].total_bytes) if phase in step.peaks else "-" for phase in phases]
        host = [shown(step.host.process_bytes), shown(step.host.children_bytes)]
        cells = [str(step.number), f"{step.seconds:.3g}", *peaks, *host]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'
