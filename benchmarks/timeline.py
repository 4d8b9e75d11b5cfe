"""When a training step's parts run: one rank's Chrome trace as a table of what overlaps, and as a picture.

    ZEROLITE_TRACE=folder torchrun ... train_medqa.py ...
    python benchmarks/timeline.py folder                 # the last two steps of rank 0, beside the trace
    python benchmarks/timeline.py folder --rank 1 --steps 4 --output picture.png

Rows: `phase` (forward, backward, step), `unit` (blocks that compute), `wait` (blocks that wait for their parameters),
`reduce` and `gather` (collectives from their start until somebody has waited), `down` and `up` (copies between device
and host), `host` (the trainer, sleeping until workers are done) and one row a worker's thread. What the trace has from
the streams of a GPU stands for what the trainer's threads saw of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

LOOP = "loop"  # the kind of the phases that a training loop marks: forward, backward, step


@dataclass(frozen=True)
class Span:
    row: str
    label: str
    phase: str  # in which it began
    start: float  # seconds since the first span
    end: float
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


# kind in the trace -> row; of workers -> label
ROW_OF = {
    LOOP: "phase",
    "forward": "unit",
    "backward": "unit",
    "recompute": "unit",
    "unshard": "wait",
    "D2H": "down",
    "H2D": "up",
    "worker step wait": "host",
}
FLYING_ROW_OF = {"reduce-scatter": "reduce", "all-gather": "gather"}
WORKERS_LABEL_OF = {
    "worker step": "stepping",
    "worker prepare": "stepping",
    "worker norm": "adding",
    "worker accumulate": "accumulating",
}


def read(folder: Path, rank: int = 0) -> list[Span]:
    """The spans of a rank's trace that have a row, in the order of their starts."""
    events = json.loads((folder / f"rank-{rank:05d}.json").read_text())["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    processes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "process_name"}
    all_found: list[tuple[str, dict, bool]] = []  # (row, event, on a stream)
    for event in (event for event in events if event["ph"] == "X"):
        track, kind = (event["pid"], event["tid"]), event["cat"]
        row: str | None
        if "worker" in processes[track]:
            row = threads[track].replace("thread", "worker") if kind in WORKERS_LABEL_OF else None
        elif f"{kind} in flight" in threads[track]:
            row = FLYING_ROW_OF.get(kind, ROW_OF.get(kind))
        else:
            row = ROW_OF.get(kind)
        if row is not None and not (row == "unit" and event["args"]["name"] == "(root)"):  # the blocks lie inside it
            all_found.append((row, event, threads[track].startswith("stream")))
    if not any(row == "phase" for row, *_ in all_found):
        all_found += [("phase", event, False) for event in _outermost(events, "optimizer step")]
    streamed = {row for row, _, is_streamed in all_found if is_streamed} - {"phase", "host"}
    found = [(row, event) for row, event, is_streamed in all_found if is_streamed == (row in streamed)]
    origin = min((event["ts"] for _, event in found), default=0.0)
    phases = sorted((e["ts"], e["ts"] + e["dur"], _label(row, e)) for row, e in found if row == "phase")
    spans = []
    for row, event in found:
        start, label = event["ts"], _label(row, event)
        phase = next((name for begin, end, name in phases if begin <= start < end), "") if row != "phase" else label
        end = start + event["dur"]
        spans.append(
            Span(row, label, phase, (start - origin) / 1e6, (end - origin) / 1e6, event["args"].get("bytes", 0))
        )
    return sorted(spans, key=lambda span: span.start)


def _label(row: str, event: dict) -> str:
    if row == "phase":
        return event["args"]["name"] if event["cat"] == LOOP else "step"
    return WORKERS_LABEL_OF[event["cat"]] if row.startswith("worker") else event["args"]["name"]


def _outermost(events: list[dict], kind: str) -> list[dict]:
    """Spans of a kind that lie in no other one of it."""
    chosen: list[dict] = []
    for event in sorted((e for e in events if e.get("cat") == kind), key=lambda e: (e["ts"], -e["dur"])):
        if not chosen or event["ts"] >= chosen[-1]["ts"] + chosen[-1]["dur"]:
            chosen.append(event)
    return chosen


def last_steps(spans: list[Span], steps: int) -> list[Span]:
    """What came after the last but `steps` step, in seconds since its end; everything where there are fewer."""
    ends = [span.end for span in spans if span.row == "phase" and span.label == "step"]
    if len(ends) <= steps:
        return spans
    begin = ends[-steps - 1]
    later = [span for span in spans if span.end > begin]
    return [dataclasses.replace(s, start=max(s.start - begin, 0.0), end=s.end - begin) for s in later]


# --- what overlaps --------------------------------------------------------------------------------------------------


def exposed(spans: list[Span]) -> dict[str, float]:
    """Seconds of `step`, of waits at entrances of units in forward, and of both that the trainer slept for workers."""

    def total(row: str, *phases: str) -> float:
        return sum(span.seconds for span in spans if span.row == row and span.phase in phases)

    return {
        "step": sum(span.seconds for span in spans if span.row == "phase" and span.label == "step"),
        "forward": total("wait", "forward"),
        "workers": total("host", "forward", "backward", "step"),
    }


def union(spans: list[Span]) -> list[tuple[float, float]]:
    """When at least one of the spans runs, as intervals in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((span.start, span.end) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def overlap(one: list[Span], other: list[Span]) -> float:
    """Seconds in which both run."""
    return sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in union(one)
        for other_start, other_end in union(other)
    )


def table(spans: list[Span]) -> list[list[str]]:
    """Row, number of spans, milliseconds in which at least one runs, and the share of them in which blocks compute."""
    units = [span for span in spans if span.row == "unit"]
    lines = []
    for row in rows_of(spans):
        mine = [span for span in spans if span.row == row]
        seconds = sum(end - start for start, end in union(mine))
        share = f"{overlap(mine, units) / seconds:.0%}" if seconds and row not in ("phase", "unit") else ""
        lines.append([ROWS.get(row, row), str(len(mine)), f"{1000 * seconds:.1f}", share])
    return lines


def rows_of(spans: list[Span]) -> list[str]:
    """The rows that there are, from top to bottom."""
    present = {span.row for span in spans}
    workers = sorted((row for row in present if row.startswith("worker")), key=lambda row: int(row.split()[1]))
    return [*(row for row in ROWS if row in present), *workers]


# --- the picture ----------------------------------------------------------------------------------------------------

COLORS = {
    "forward": "#2563eb",
    "backward": "#7c3aed",
    "step": "#dc2626",
    "unit": "#93c5fd",
    "wait": "#f59e0b",
    "host": "#f59e0b",
    "reduce": "#a78bfa",
    "gather": "#60a5fa",
    "down": "#0d9488",
    "up": "#65a30d",
    "stepping": "#c2410c",
    "adding": "#fdba74",
    "accumulating": "#a8a29e",
}
ROWS = {
    "phase": "forward, backward, step",
    "unit": "blocks compute",
    "wait": "blocks wait to begin",
    "reduce": "reduce-scatter in flight",
    "gather": "all-gather in flight",
    "down": "gradients: device to host",
    "up": "parameters: host to device",
    "host": "trainer sleeps for workers",
}


def draw(path: Path, title: str, panels: dict[str, list[Span]]) -> None:
    """One panel a contender, under each other and on one scale of milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = {name: rows_of(spans) for name, spans in panels.items()}
    heights = [len(of_panel) for of_panel in rows.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(13, 1.5 + 0.42 * sum(heights) + 0.7 * len(panels)), sharex=True, squeeze=False,
        layout="constrained", height_ratios=heights,
    )  # fmt: skip
    used = set()
    shortest = max((1000 * span.end for spans in panels.values() for span in spans), default=0.0) / 400
    for axis, (name, spans) in zip(axes[:, 0], panels.items(), strict=True):
        for position, row in enumerate(rows[name]):
            mine = [span for span in spans if span.row == row]
            kinds = [span.label if span.label in COLORS else row for span in mine]
            used |= set(kinds)
            bars = [(1000 * span.start, 1000 * span.seconds) for span in mine]
            colors = [COLORS.get(kind, "#94a3b8") for kind in kinds]
            # White edges tell neighbours apart, and would cover a short span.
            edges = ["white" if bar[1] > shortest else color for bar, color in zip(bars, colors, strict=True)]
            axis.broken_barh(bars, (position - 0.38, 0.76), facecolors=colors, edgecolors=edges, linewidth=0.4)
        axis.set_yticks(range(len(rows[name])), [ROWS.get(row, row) for row in rows[name]])
        axis.invert_yaxis()
        axis.set_title(name, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds")
    shown = {kind: color for kind, color in COLORS.items() if kind in used and kind not in ROWS}
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in shown.items()],
        loc="outside lower center",
        ncols=max(len(shown), 1),
        frameon=False,
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what ZEROLITE_TRACE was")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2, help="the last ones")
    parser.add_argument("--output", type=Path, help="the picture (default: beside the trace)")
    options = parser.parse_args()
    spans = last_steps(read(options.folder, options.rank), options.steps)
    if not spans:
        parser.error(f"the trace of rank {options.rank} has no spans: was a step taken?")
    lines = [["row", "spans", "milliseconds", "of them while blocks compute"], *table(spans)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        print(
            name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)), sep="  "
        )
    output = options.output or options.folder / f"rank-{options.rank:05d}.png"
    draw(output, f"The last {options.steps} steps of rank {options.rank}", {"": spans})


if __name__ == "__main__":
    main()
