"""What a tracker leaves to look at: a table, plain numbers, a PNG, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import struct
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from live_bytes import LENGTH, ROWS, Case
from test_track import built, loss_of

import zerolite
from zerolite.memory import track_pictures


def pictures_of(case: Case, folder: str, num_steps: int) -> dict:
    plan = zerolite.plan(case.build(), case.stage, 1, batch=ROWS, length=LENGTH, device="cpu", precision=case.precision)
    model, optimizer = built(case)
    with zerolite.track(model, optimizer, plan=plan) as tracker:
        for _ in range(num_steps):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    tracker.write_page(Path(folder) / "memory.html")
    tracker.write_timeline(f"{folder}/memory.png")
    window = track_pictures.Window(tracker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install 'zerolite\[train\]'"):
            tracker.write_timeline(f"{folder}/never.png")
    return {
        "text": str(tracker), "json": tracker.as_dict(), "peak": tracker.peak_bytes, "kinds": window.kinds,
        "phases": [phase for phase, _, _ in window.phases()], "points": len(window.points),
    }  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.texts = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_and_the_picture(ranks, tmp_path):
    """The page has no script, no link and no address; its picture is well formed and shows the last two steps."""
    (found,) = ranks(1).run(pictures_of, Case(stage=2, dtype="bf16"), str(tmp_path), 3)
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert not {"src", "href", "onload", "onclick"} & reader.attributes and "://" not in page and "url(" not in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    assert len(svg.findall("polygon")) == len(found["kinds"]) and len(svg.findall("polyline")) == 1
    titles = [title.text for title in svg.iter("title")]
    assert sum(title.startswith("forward (model.layers.") for title in titles) == 2 * 5
    assert sum(title.startswith("optimizer step (AdamW)") for title in titles) == 2
    assert {"parameters", "moments", "activations", "forward, planned", "step", "together"} <= set(reader.texts)
    expected = ["outside", "forward", "backward", "outside", "step"]  # and, at the very end, what follows
    assert found["phases"] == [*expected, *expected, "outside"]
    header = (tmp_path / "memory.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert header.startswith(b"\x89PNG") and width == 1560 and height == 780
    assert not (tmp_path / "never.png").exists()


def test_the_table_and_the_numbers(ranks, tmp_path):
    """Measured and planned side by side; the dictionary goes through JSON and holds every step."""
    (found,) = ranks(1).run(pictures_of, Case(stage=0), str(tmp_path), 2)
    numbers = json.loads(json.dumps(found["json"]))
    assert [step["number"] for step in numbers["steps"]] == [1, 2]
    assert numbers["peak_bytes"] == found["peak"] == max(peak["total"] for peak in numbers["peaks"].values())
    assert numbers["states"] == numbers["plan"]["states"]
    assert set(numbers["peaks"]) == {"forward", "backward", "step", "outside"}
    assert set(numbers["peaks"]["forward"]) == {*numbers["plan"]["peaks"]["forward"], "other"}
    lines = found["text"].splitlines()
    assert lines[0].startswith("LlamaForCausalLM, 2 steps of ") and lines[0].endswith(
        f"{found['peak'] / 2**20:.3g} MiB"
    )
    assert lines[1].split()[0] == "MiB" and "backward, planned" in lines[1]
    parameters = next(line.split()[1:] for line in lines if line.startswith("  parameters"))
    assert len(set(parameters)) == 1 and len(parameters) == 7
    assert lines[-1].startswith("host: ")


def test_long_timelines_are_thinned(ranks, tmp_path, monkeypatch):
    """The highest of each run of neighbours stays."""
    points = [track_pictures.Point(index, "forward", (index,), index * 7 % 1000) for index in range(10_000)]
    thinned = track_pictures._thinned(points)
    assert len(thinned) <= track_pictures.MAX_SHOWN
    assert max(point.peak_bytes for point in thinned) == max(point.peak_bytes for point in points)
