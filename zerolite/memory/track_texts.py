"""What a tracker found, as a table and as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zerolite.memory.state_bytes import Peak
from zerolite.memory.track_records import TRACKED_KINDS

if TYPE_CHECKING:
    from zerolite.memory.plan import Plan
    from zerolite.memory.track import Tracker

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def unit_of(nbytes: int) -> tuple[str, int]:
    """(name, bytes) of the largest unit that `nbytes` has one of."""
    return next((unit for unit in UNITS if nbytes >= unit[1]), UNITS[-1])


def shown(nbytes: int) -> str:
    """As "1.25 GiB"."""
    name, size = unit_of(abs(nbytes))
    return f"{nbytes / size:.3g} {name}" if size > 1 else f"{nbytes} {name}"


def columns(peaks: Mapping[str, Peak], plan: Plan | None) -> dict[str, Mapping[str, int]]:
    """Heading -> bytes by kind: what was measured and, beside it, what was planned."""
    found: dict[str, Mapping[str, int]] = {}
    for phase, peak in peaks.items():
        found[phase] = peak.bytes_of
        if plan is not None and phase in plan.peaks:
            found[f"{phase}, planned"] = plan.peaks[phase].bytes_of
    return found


def kind_rows(found: Mapping[str, Mapping[str, int]]) -> tuple[str, dict[str, list[str]]]:
    """The unit that all numbers are in, and a row for each kind that any column has, with the sums, "together"."""
    totals = {name: sum(bytes_of.values()) for name, bytes_of in found.items()}
    unit, size = unit_of(max(totals.values(), default=0))
    rows = {
        kind: [f"{bytes_of.get(kind, 0) / size:.2f}" for bytes_of in found.values()]
        for kind in TRACKED_KINDS
        if any(bytes_of.get(kind, 0) >= size / 200 for bytes_of in found.values())  # what is not printed as 0.00
    }
    return unit, {**rows, "together": [f"{total / size:.2f}" for total in totals.values()]}


def kinds_table(found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Lines, as of `kind_rows`."""
    unit, rows = kind_rows(found)
    widths = [max(10, len(name) + 2) for name in found]
    lines = [f"{unit + ' on this device':20}" + "".join(map(str.rjust, found, widths))]
    return [*lines, *(f"  {kind:18}" + "".join(map(str.rjust, cells, widths)) for kind, cells in rows.items())]


def head(tracker: Tracker) -> str:
    """As "LlamaForCausalLM, 12 steps of 0.53 s: at most 1.2 GiB"."""
    steps = list(tracker.steps)[1:] or list(tracker.steps)  # the first makes what the others have
    seconds = f" of {sum(step.seconds for step in steps) / len(steps):.3g} s" if steps else ""
    number = tracker.steps[-1].number if tracker.steps else 0
    text = f"{tracker.model_name}, {number} step{'s' * (number != 1)}{seconds}: at most {shown(tracker.peak_bytes)}"
    return text + (f", {shown(tracker.reserved_bytes)} reserved" if tracker.reserved_bytes else "")


def host_line(tracker: Tracker) -> str:
    """What this rank takes of its host, at the last reading."""
    usage = tracker.host
    if usage is None:
        return ""
    line = f"host: {shown(usage.process_bytes)} this process (PSS), {shown(usage.children_bytes)} its workers"
    if usage.arena_bytes:
        parts = ", ".join(f"{kind} {shown(nbytes)}" for kind, nbytes in usage.arena.items() if nbytes)
        line += f"; of both {shown(usage.arena_bytes)} offloaded ({parts}), {shown(usage.pinned_bytes)} pinned"
    return line + (f"; {shown(usage.file_bytes)} on a drive" if usage.file_bytes else "")


def table(tracker: Tracker) -> str:
    lines = [head(tracker), *kinds_table(columns(tracker.all_peaks, tracker.plan)), host_line(tracker)]
    return "\n".join(filter(None, lines))


def as_dict(tracker: Tracker) -> dict[str, Any]:
    steps = [
        {
            "number": step.number,
            "seconds": step.seconds,
            "peaks": _peaks(step.peaks),
            "states": step.states,
            "host": asdict(step.host),
        }
        for step in tracker.steps
    ]
    usage = tracker.host
    return {
        "model": tracker.model_name,
        "peak_bytes": tracker.peak_bytes,
        "reserved_bytes": tracker.reserved_bytes,
        "peaks": _peaks(tracker.all_peaks),
        "states": tracker.states,
        "host": asdict(usage) if usage is not None else None,
        "steps": steps,
        "plan": tracker.plan.as_dict() if tracker.plan is not None else None,
    }


def _peaks(peaks: Mapping[str, Peak]) -> dict[str, dict[str, int]]:
    """As those of `Plan.as_dict`."""
    return {phase: {"total": peak.total_bytes, **peak.bytes_of} for phase, peak in peaks.items()}
