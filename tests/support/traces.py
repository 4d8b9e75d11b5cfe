"""Chrome traces that a run has written, read and checked."""

from __future__ import annotations

import json
from pathlib import Path


def spans(folder: Path, rank: int = 0) -> list[dict]:
    """The spans of a rank's file, with the names of their process and thread for `pid` and `tid`."""
    events = json.loads((Path(folder) / f"rank-{rank:05d}.json").read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    return [
        event
        | {
            "pid": names["process_name", event["pid"], event["tid"]],
            "tid": names["thread_name", event["pid"], event["tid"]],
        }
        for event in events
        if event["ph"] == "X"
    ]


def assert_nested(spans: list[dict]) -> None:
    """On each track a span that begins inside another one ends inside it, else a viewer shows them wrongly."""
    open_ends: dict[tuple, list[float]] = {}
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        begin, end = span["ts"], span["ts"] + span["dur"]
        ends = open_ends.setdefault((span["pid"], span["tid"]), [])
        while ends and ends[-1] <= begin + 0.01:  # microseconds, of floats that lie at days
            ends.pop()
        assert not ends or end <= ends[-1] + 0.01, span
        ends.append(end)
