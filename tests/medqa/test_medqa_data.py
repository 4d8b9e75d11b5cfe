"""Reading: both row layouts, both file layouts, and file, line and reason for every row that is not usable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import SHARED

from zerolite import DataError
from zerolite.medqa import data
from zerolite.medqa.data import Conversation

GOOD = {"instruction": "What is a fever?", "input": "", "output": "A raised body temperature."}
MEDQA = SHARED / "medqa"


def lines(tmp_path: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    """A JSONL file; bytes go in as they are."""
    encoded = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = tmp_path / name
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def messages(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]}


def test_alpaca_rows(tmp_path):
    absent = {key: GOOD[key] for key in ("instruction", "output")}
    rows = [absent, {**GOOD, "input": " It is 39 °C. \n"}, {**GOOD, "input": None}, {**GOOD, "input": "  ", "id": 3}]
    kept = data.read([lines(tmp_path, *rows)]).kept
    plain = Conversation(turns=((GOOD["instruction"], GOOD["output"]),))
    assert kept == [
        plain,
        Conversation(turns=(("What is a fever?\nIt is 39 °C.", GOOD["output"]),)),
        plain,
        plain,
    ]


def test_messages_rows(tmp_path):
    row = messages("system", "user", "assistant", "user", "assistant")
    (kept,) = data.read([lines(tmp_path, row)]).kept
    assert kept == Conversation(turns=(("text 1", "text 2"), ("text 3", "text 4")), system="text 0")


def test_language_is_told_by_the_question():
    assert Conversation(turns=(("什么是CT？", "a scan"),)).is_chinese
    assert not Conversation(turns=(("What is a CT?", "扫描"),)).is_chinese


BAD_ROWS = [
    (b'{"instruction": "a"', "not JSON"),
    (b"{'instruction': 'a'}", "not JSON"),
    (b'{"instruction": "\xff", "output": "b"}', "not UTF-8 (byte 18"),
    (b"[" * 100_000, "not usable JSON"),
    ("text", "expected a JSON object, got str"),
    (["a"], "expected a JSON object, got list"),
    (None, "expected a JSON object, got NoneType"),
    (
        {"question": "a", "answer": "b"},
        'expected keys `instruction` and `output`, or `messages`; got ["answer", "question"]',
    ),
    ({"instruction": "a"}, "expected keys `instruction` and `output`"),
    ({**GOOD, "output": 3}, "output: expected a text, got 3"),
    ({**GOOD, "output": None}, "output: expected a text, got null"),
    ({**GOOD, "output": ""}, "output: is empty"),
    ({**GOOD, "output": " \n\t"}, "output: is empty"),
    ({**GOOD, "instruction": "  "}, "instruction: is empty"),
    ({**GOOD, "input": ["x"]}, 'input: expected a text, got ["x"]'),
    ({**GOOD, "output": "a\x00b"}, "output: holds a NUL character (column 2"),
    ({**GOOD, "output": "ab\ud800"}, "output: holds half a surrogate pair (column 3"),
    ({**GOOD, **messages("user", "assistant")}, "both `messages` and `output`"),
    ({"messages": []}, "`messages`: expected a list of at least one message, got []"),
    ({"messages": "hi"}, "`messages`: expected a list"),
    ({"messages": ["hi"]}, "message 0: expected an object with `role` and `content`"),
    ({"messages": [{"role": "user"}]}, "message 0: `content`: expected a text, got null"),
    (messages("user"), 'expected roles [system,] user, assistant, user, assistant ..., got ["user"]'),
    (messages("system"), "expected roles"),
    (messages("assistant", "user"), "expected roles"),
    (messages("user", "user", "assistant"), "expected roles"),
    (messages("user", "assistant", "user"), "expected roles"),
    (messages("user", "tool"), "expected roles"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:30] for _, reason in BAD_ROWS])
def test_a_bad_row_is_named(tmp_path, row, reason):
    path = lines(tmp_path, GOOD, b"", GOOD, row, GOOD)
    with pytest.raises(DataError) as error:
        data.read([path])
    assert str(error.value).startswith(f"{path}, line 4: ") and reason in str(error.value)
    str(error.value).encode()  # it can be printed
    rows = data.read([path], skip_invalid=True)
    assert len(rows.kept) == 3 and [(r.file, r.line) for r in rows.rejected] == [(str(path), 4)]
    assert reason in rows.rejected[0].reason and str(rows) == "4 rows read, 3 kept, 1 rejected"


def test_line_endings_and_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps({**GOOD, "output": "one\u2028two"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row)  # U+2028 ends no line of JSONL
    assert [c.turns[0][1] for c in data.read([path]).kept] == ["one\u2028two"] * 2


def test_json_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "output": ""}, GOOD], indent=2))
    with pytest.raises(DataError, match="line 7: output: is empty"):
        data.read([path])
    assert len(data.read([path], skip_invalid=True).kept) == 2
    for content, message in [
        ("[]", "no usable row"),
        ('[{"a": 1}\n,', "line 2: the JSON array breaks off in this row"),
        ('[\n{"a": 1} {"a": 2}]', "line 2: the JSON array breaks off after this row"),
        ('[\n\n{"a": ', "line 3: the JSON array breaks off in this row"),
        ('[{"a": 1}] more', "expected nothing after the JSON array"),
        ("[" * 50_000, "line 1: the JSON array breaks off in this row"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError) as error:
            data.read([path], skip_invalid=True)
        assert message in str(error.value), content
    path.write_bytes(b'[\n"\xff"]')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        data.read([path])


def test_files_that_give_nothing(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        data.read([tmp_path / "absent.jsonl"])
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        data.read([tmp_path])
    with pytest.raises(DataError, match="no usable row"):
        data.read([lines(tmp_path, b"")])
    with pytest.raises(DataError, match="no usable row: 2 rows read, 0 kept, 2 rejected"):
        data.read([lines(tmp_path, {}, {})], skip_invalid=True)


def test_max_samples_counts_the_kept_rows_of_each_file(tmp_path):
    first, second = lines(tmp_path, GOOD, {}, GOOD, GOOD, name="a"), lines(tmp_path, GOOD, GOOD, {}, name="b")
    rows = data.read([first, second], skip_invalid=True, max_samples=2)
    assert (len(rows.kept), len(rows.rejected)) == (4, 1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data set not beside the repository")
@pytest.mark.parametrize(
    ("file", "num_rows"),
    [
        ("train.jsonl", 12525),
        ("val.jsonl", 574),
        ("multiturn_zh.jsonl", 500),
        ("formats/messages40.jsonl", 40),
        ("formats/alpaca40.json", 40),
        ("raw_samples/huatuo/llama_data.sample20.json", 20),
    ],
)
def test_shared_files_are_usable_whole(file, num_rows):
    assert len(data.read([MEDQA / file]).kept) == num_rows
