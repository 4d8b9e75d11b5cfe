"""Does `python -m zerolite.medqa.prepare` write what the files say, once, and account for every row?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import SHARED

from zerolite.medqa import data, prepare, readers

ROWS = [
    {
        "instruction": "What is gout?",
        "output": "Crystals in a joint.",
        "source": "book",
        "license": "MIT",
        "lang": "en",
    },
    {"instruction": "什么是痛风？", "input": "", "output": "尿酸结晶。", "system": "简短回答。", "topic": "痛风"},
    {
        "messages": [
            {"role": "user", "content": "Forty tablets?"},
            {"role": "assistant", "content": "Yes.", "weight": 0},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "No. Call 13812345678 or a@b.org."},
        ]
    },
]
AGAIN = {"instruction": " What is gout? ", "output": "Crystals in a joint.\n"}
BAD = [{"instruction": "a", "output": ""}, {"instruction": "a", "output": "b", "tools": [1]}, "x"]


def files(tmp_path: Path) -> list[Path]:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.json"
    first.write_text("\n".join(json.dumps(row) for row in [*ROWS, AGAIN]), encoding="utf-8")
    second.write_text(json.dumps([*BAD, {"instruction": "d", "output": "e"}]), encoding="utf-8")
    return [first, second]


def test_rows_card_and_rejects(tmp_path, capsys):
    output, given = tmp_path / "rows.jsonl", files(tmp_path)
    argv = [*map(str, given), "--output", str(output), "--licence", "CC | BY"]
    assert prepare.main(argv) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["language"], row["source"], row["licence"]) for row in rows] == [
        ("en", "book", "MIT"),
        ("zh", "first.jsonl", "CC | BY"),
        ("en", "first.jsonl", "CC | BY"),
        ("en", "second.json", "CC | BY"),
    ]
    assert rows[2]["messages"] == ROWS[2]["messages"]
    trained = data.read([output])  # what training reads of it is what training reads of the files
    assert trained.kept == data.read(given, skip_invalid=True).kept[:3] + data.read(given[1:], skip_invalid=True).kept
    assert trained.details() == []
    rejects = [json.loads(line) for line in (tmp_path / "rows.rejected.jsonl").read_text().splitlines()]
    assert [(Path(r["file"]).name, r["line"]) for r in rejects] == [("first.jsonl", 4)] + [("second.json", 1)] * 3
    card = (tmp_path / "rows.md").read_text(encoding="utf-8")
    assert card.strip() == capsys.readouterr().out.strip() and "No medical advice" in card
    for line in (
        "8 rows read, 4 kept, 4 dropped.",
        f"| {given[0]} | 4 | 3 | 1 |",
        f"| {given[1]} | 4 | 1 | 3 |",
        "| book | MIT | en | 1 |",
        "| first.jsonl | CC   BY | zh | 1 |",
        f"| {given[0]} | is an exact duplicate | 1 |",
        f"| {given[1]} | output: is empty | 1 |",
        "mobile number of China in 1 rows, e-mail address in 1 rows.",
        "Keys not used: topic in 1 rows.",
    ):
        assert line in card.splitlines() or line in card, line
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.jsonl", "rows.jsonl", "rows.md", "rows.rejected.jsonl", "second.json",
    ]  # fmt: skip


def test_refusals_leave_nothing(tmp_path, capsys):
    given, output = files(tmp_path), tmp_path / "rows.jsonl"
    empty, lfs = tmp_path / "empty", tmp_path / "lfs"
    empty.write_bytes(b"")
    lfs.write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "bad").write_text(json.dumps(BAD))
    before = sorted(tmp_path.iterdir())
    for argv, reason in [
        ([given[0], empty], "empty: no usable row"),
        ([given[0], lfs], "lfs: is a git LFS pointer"),
        ([given[0], tmp_path / "absent"], "absent: cannot be read"),
        ([tmp_path / "bad"], "no usable row: 3 rows read, 0 kept, 3 dropped"),
        ([given[0], "--columns", "x"], "--columns: expected FIELD=COLUMN"),
    ]:
        assert prepare.main([*map(str, argv), "--output", str(output)]) == 2
        assert reason in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before
    assert prepare.main([str(given[0]), "--output", str(tmp_path / "none" / "x.jsonl")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    output.write_text("precious")
    assert prepare.main([str(given[0]), "--output", str(output)]) == 2
    assert "exists" in capsys.readouterr().err and output.read_text() == "precious"


def test_columns_and_names_of_tables(tmp_path):
    (tmp_path / "t.csv").write_bytes("title,reply,from\n痛风？,看医生。,医院\n".encode("gb18030"))
    argv = [str(tmp_path / "t.csv"), "--columns", "question=title,answer=reply,source=from"]
    assert prepare.main([*argv, "--output", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["source"] == "医院" and row["language"] == "zh" and row["licence"] == "unknown"
    assert not (tmp_path / "rows.rejected.jsonl").exists()


def test_reasons_are_grouped():
    same = {prepare.kind_of_reason(f"message {n}: `content`: expected a text, got {n}") for n in range(3)}
    assert len(same) == 1
    assert prepare.kind_of_reason("a") != prepare.kind_of_reason("b")


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data set not beside the repository")
def test_every_real_file_in_one_run(tmp_path):
    given = sorted(path for path in (SHARED / "medqa/raw_samples").rglob("*") if path.is_file())
    counts = prepare.write(given, tmp_path / "rows.jsonl", None, None, "see SOURCES.md")
    assert str(counts) == "171 rows read, 161 kept, 10 dropped"
    read = data.read([tmp_path / "rows.jsonl"]).kept
    assert read == data.read(given, rows_of=readers.reader(None), skip_invalid=True).kept
