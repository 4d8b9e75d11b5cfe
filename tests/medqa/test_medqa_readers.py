"""Is every file that users have read as what it says, in both languages, or refused by file, line and kind?"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib.util
import io
import json
import random
from pathlib import Path

import pytest
from paths import SHARED
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import corpus, data, readers
from zerolite.medqa.arguments import CORPUS, Options, parse
from zerolite.medqa.rows import Conversation

TURNS = [("What is gout?", 'Crystals, "tophi",\nin a joint.'), ("什么是痛风？", "尿酸结晶，沉积在关节里。")]
WANTED = [Conversation((turn,)) for turn in TURNS]
ALPACA = [{"instruction": question, "output": answer} for question, answer in TURNS]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ALPACA)
MEDQA = SHARED / "medqa"
PUBMEDQA = {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "It is.", "final_decision": "yes"}
CHOICE = {"question": "哪一个？", "options": "(A) 甲.\n(B) 乙.", "answer": "(B)"}


def read(path: Path, content: bytes | str, columns: str | None = None, **options) -> list[Conversation]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return data.read([path], rows_of=readers.reader(columns), **options).kept


def table(header: list[str], delimiter: str = ",", rows: list[tuple[str, ...]] = TURNS, end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([header, *rows])
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
def test_tables_in_every_encoding(tmp_path, delimiter, encoding):
    turns = TURNS if encoding != "utf-16-le" else TURNS[:1]  # without a mark, Latin letters tell it
    content = table(["question", "answer"], delimiter, turns, "\r\n").encode(encoding)
    assert read(tmp_path / "x", content) == WANTED[: len(turns)]
    assert read(tmp_path / "x", gzip.compress(content)) == WANTED[: len(turns)]


def test_lines_in_every_encoding_and_with_every_line_end(tmp_path):
    contents = [JSONL.encode(e) for e in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "gb18030")]
    contents[3] = codecs.BOM_UTF16_BE + contents[3]
    contents += [JSONL.replace("\n", end).encode() for end in ("\r\n", "\r", "\n\n")]
    contents += [b"\n".join(codecs.BOM_UTF8 + line.encode() for line in JSONL.split("\n")), gzip.compress(contents[2])]
    for content in contents:
        assert read(tmp_path / "x", content) == WANTED


def test_other_encodings_are_not_read_as_chinese(tmp_path):
    row = table(["question", "answer"], rows=[("Was heißt Übelkeit?", "événement, à l'hôpital, éruption, œdème")])
    for encoding in ("cp1252", "iso8859-15"):
        with pytest.raises(DataError, match="in none of UTF-8, UTF-16 and GB18030"):
            read(tmp_path / "x", row.encode(encoding))
    with pytest.raises(DataError, match="in none of UTF-8, UTF-16 and GB18030"):
        read(tmp_path / "x", table(["question", "answer"], rows=[("什麼是痛風？", "尿酸")] * 4).encode("big5"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer\na,b\nc\n", "line 3: expected 2 cells, as the header has, got 1"),
        ('question,answer\n"a\nb",c\nd,e,f\n', "line 4: expected 2 cells, as the header has, got 3"),
        ('question,answer\na,b\nc,"d\ne,f\n', "line 3: the CSV breaks off in this row"),
        ("question,answer,answer\na,b,c\n", "line 1: the header names a column twice"),
        ("question,answer\na,\n", "line 2: output: is empty"),
        ("topic,reply\na,b\n", "line 2: expected keys `instruction` and `output`"),
        ("question,answer\n", "no usable row: the file holds none"),
        ("a line of prose\nand another\n", "is text, not JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git LFS pointer"),
        ("<!DOCTYPE html><html>404</html>", "is HTML"),
        ("<a><b>text</b></a>", "is XML, but not MedQuAD's"),
        ("<Document>\n<QAPair>\n<Question>", "line 3: is XML, but damaged"),
        ('<!DOCTYPE d [\n<!ENTITY a "b">]><d>&a;</d>', "line 2: is XML that declares entities"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"\x1f\x8b\x08broken", "is compressed by gzip, but damaged"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-9], "is compressed by gzip, but damaged"),
        (codecs.BOM_UTF16_LE + b"a", "is UTF-16, but damaged"),
        (json.dumps({"version": 1, "data": ALPACA}, indent=1), 'one JSON object with the keys ["version", "data"]'),
        (f'{{"1": {json.dumps(PUBMEDQA)},\n "1": {json.dumps(PUBMEDQA)}}}', 'line 2: has the key "1" twice'),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    with pytest.raises(DataError) as error:
        read(tmp_path / "x.jsonl", content)
    assert str(error.value).startswith(str(tmp_path / "x.jsonl")) and message in str(error.value)
    is_a_row = "cells" in message or "output" in message or "expected keys" in message or "twice" in message
    assert ("--skip_invalid" in str(error.value)) == (is_a_row and "header names" not in message)


def test_the_reader_of_json_alone_names_every_other_kind(tmp_path):
    kinds = {
        b"PAR1....": "Parquet",
        b"ARROW1..": "Arrow",
        gzip.compress(b"{}"): "gzip",
        JSONL.encode("utf-16"): "UTF-16",
    }
    kinds |= {b"a,b\n1,2\n": "CSV", b"a\tb\n1\t2\n": "TSV", b"<?xml version='1.0'?><a/>": "XML", b"%PDF-1.4": "PDF"}
    kinds |= {table(["问", "答"]).encode("gb18030"): "CSV", b'{\n"a": {"b": 1}\n}': "one JSON object"}
    for content, kind in kinds.items():
        path = tmp_path / "x"
        path.write_bytes(content)
        for skip_invalid in (False, True):
            with pytest.raises(DataError) as error:
                data.read([path], skip_invalid=skip_invalid)
            assert f"is {kind}" in str(error.value) or f"compressed by {kind}" in str(error.value)
            assert "--skip_invalid" not in str(error.value)


def test_sharegpt(tmp_path):
    said = [{"from": "human", "value": "痛风?"}, {"from": "gpt", "value": "尿酸。"}]
    wanted = Conversation((("痛风?", "尿酸。"),), "Be short.")
    rows = [
        {"conversations": [{"from": "system", "value": "Be short."}, *said]},
        {"conversations": said, "system": "Be short.", "tools": "", "messages": None},
        {"conversations": [{**said[0], "from": "user"}, {**said[1], "from": "assistant"}], "system": "Be short."},
    ]
    assert read(tmp_path / "x", "\n".join(map(json.dumps, rows))) == [wanted] * 3
    twice = {"conversations": [said[0], {**said[1], "weight": 0}, *said]}
    assert read(tmp_path / "x", json.dumps(twice))[0].trained == (False, True)
    for row, reason in [
        ({"conversations": said, "tools": "[{}]"}, "`tools` is not used"),
        ({"conversations": [said[0], {"from": "function_call", "value": "{}"}]}, 'got "function_call"'),
        ({"conversations": [said[0]]}, 'got ["user"]'),
        ({"conversations": said, "messages": [1]}, "has both `conversations` and `messages`"),
        ({"conversations": "x"}, "`conversations`: expected a list"),
        ({"conversations": [{"from": "human"}, said[1]]}, "message 0: `content`: expected a text, got null"),
    ]:
        with pytest.raises(DataError, match="line 1: ") as error:
            read(tmp_path / "x", json.dumps(row))
        assert reason in str(error.value)


def test_columns_say_what_a_table_holds(tmp_path):
    rows = [("消化科", "痛风", "怎么办？", "看医生。"), ("内科", "Gout", "", "See a doctor.")]
    content = table(["department", "topic", "ask", "reply"], rows=rows)
    found = read(tmp_path / "x", content, "question=topic,context=ask,answer=reply")
    assert found == [Conversation((("痛风\n怎么办？", "看医生。"),)), Conversation((("Gout", "See a doctor."),))]
    for columns, reason in [
        ("question=topic,answer=nothing", "line 2: --columns: expected a column `nothing`"),
        ("question=topic", "expected at least question=COLUMN and answer=COLUMN"),
        ("question=topic,answer=reply,colour=ask", "expected FIELD=COLUMN with a field of question, context"),
        ("question=topic,question=ask,answer=reply", "names question twice"),
    ]:
        with pytest.raises(ValueError if "column `" not in reason else DataError, match=reason):
            read(tmp_path / "x", content, columns)
    with pytest.raises(DataError, match="--columns leaves out `input`"):
        read(tmp_path / "x", json.dumps({"q": "a", "a": "b", "input": "39 °C"}), "question=q,answer=a")
    for argv, reason in (["topic"], "expected FIELD=COLUMN"), (["question=a,answer=b"], "is about files of yours"):
        with pytest.raises(ValueError, match=f"--columns:? {reason}"):
            parse(["--columns", *argv])


def test_training_reads_them(tmp_path):
    """Through the options of train_medqa.py; no rows that were not named are validated on."""
    path = tmp_path / "rows.csv"
    path.write_bytes(table(["topic", "reply"]).encode("gb18030"))
    options = Options(
        train_file=(str(path),),
        columns="question=topic,answer=reply",
        max_samples=2,
    )
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    found = corpus.load(options, tokenizer, None)
    assert "train: 2 rows read, 2 kept, 0 rejected" in found.summary and len(found.train) == 2
    assert "validation: none: --validation_file" in found.summary and not found.validation_by_language


def test_layouts_of_data_sets(tmp_path):
    xml = """<?xml version="1.0"?>\n<Document source="X"><QAPairs>\n<QAPair><Question>What is gout ?</Question>
<Answer>Crystals &lt; 1 mm <b>in</b> a joint.</Answer></QAPair>\n<QAPair><Question>Why?</Question><Answer/></QAPair>
</QAPairs></Document>"""
    wanted = Conversation((("What is gout ?", "Crystals < 1 mm in a joint."),))
    assert read(tmp_path / "x", xml, skip_invalid=True) == [wanted]
    with pytest.raises(DataError, match="line 5: output: is empty"):
        read(tmp_path / "x", xml)
    for encoding in ("UTF-8a", "gb18030"):  # no encoding; one that the parser does not know
        with pytest.raises(DataError, match="line 1: is XML of an encoding that is not read: .* save it as UTF-8"):
            read(tmp_path / "x", xml.replace("?>", f' encoding="{encoding}"?>'))
    bad = {**PUBMEDQA, "LONG_ANSWER": ""}
    keyed = json.dumps({"1": PUBMEDQA, "2": bad}, indent=1)
    with pytest.raises(DataError, match="line 11: output: is empty"):
        read(tmp_path / "x", keyed)
    assert read(tmp_path / "x", keyed, skip_invalid=True)[0].turns == (("Is it?\nOne.\nTwo.", "Yes. It is."),)
    lettered = {**CHOICE, "options": {"A": "甲.", "B": "乙."}, "answer": "B", "context": ""}
    for row in (CHOICE, lettered):
        assert read(tmp_path / "x", json.dumps(row))[0].turns == (("哪一个？\n(A) 甲.\n(B) 乙.", "(B) 乙."),)
    for change in ({"answer": "(C)"}, {"options": "甲, 乙"}, {"options": "(A) a\n(A) b"}, {"options": {"A": 3}}):
        with pytest.raises(DataError, match="line 1: (answer|options): "):
            read(tmp_path / "x", json.dumps({**CHOICE, **change}))
    toyhom = table(["department", "title", "ask", "answer"], rows=[("内科", "痛风？", "怎么办", "看医生")])
    assert read(tmp_path / "x", toyhom.encode("gb18030"))[0].turns == (("痛风？\n怎么办", "看医生"),)


def test_parquet_and_arrow(tmp_path):
    if importlib.util.find_spec("pyarrow") is None:
        for content, kind in ((b"PAR1....PAR1", "Parquet"), (b"ARROW1..", "Arrow"), (b"\xff" * 8, "Arrow")):
            with pytest.raises(DataError, match=f"is {kind}, which needs `pip install datasets`"):
                read(tmp_path / "x", content)
        return
    import pyarrow
    import pyarrow.parquet

    joined = pyarrow.Table.from_pylist([{**row, "messages": None, "input": None} for row in ALPACA])
    pyarrow.parquet.write_table(joined, tmp_path / "parquet")
    with pyarrow.OSFile(str(tmp_path / "file"), "wb") as out, pyarrow.ipc.new_file(out, joined.schema) as writer:
        writer.write_table(joined)
    with pyarrow.OSFile(str(tmp_path / "stream"), "wb") as out, pyarrow.ipc.new_stream(out, joined.schema) as writer:
        writer.write_table(joined)
    for name in ("parquet", "file", "stream"):
        content = (tmp_path / name).read_bytes()
        assert read(tmp_path / "x", content) == WANTED
        with pytest.raises(DataError, match="is (Parquet|Arrow), but damaged"):
            read(tmp_path / "x", content[: len(content) // 2])


def test_damaged_files_end_in_an_error_or_in_rejects(tmp_path):
    """Bytes changed anywhere in any kind of file never end in another exception, and no row is gone without a count."""
    draw = random.Random(0)
    xml = "<Document><QAPair><Question>a</Question><Answer>b</Answer></QAPair></Document>"
    files = [JSONL, table(["question", "answer"]), xml, json.dumps({"1": PUBMEDQA}), json.dumps(ALPACA, indent=1)]
    contents = [file.encode() for file in files] + [files[1].encode("gb18030"), JSONL.encode("utf-16")]
    contents += [gzip.compress(contents[0]), json.dumps(CHOICE).encode()]
    for number in range(900):
        content = bytearray(contents[number % len(contents)])
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 1, 1, 4])] = draw.choice(
                [b"", b'"', b"{", b"[", b"\x00", b"\xff", b"\n", b","]
            )
            content = content or bytearray(b"x")
        path = tmp_path / "x"
        path.write_bytes(content)
        try:
            found = data.read([path], rows_of=readers.reader(None), skip_invalid=True)
        except DataError as error:
            assert str(path) in str(error)
        else:
            ((_, kept, rejected),) = found.files
            assert (kept, rejected) == (len(found.kept), len(found.rejected))


ODD = [
    None,
    True,
    0,
    1.5,
    float("nan"),
    "",
    " ",
    "x",
    "\x00",
    "\ud800",
    [],
    ["x"],
    [None],
    [[]],
    {},
    {"A": "x"},
    {"from": []},
]
SHAREGPT = {"conversations": [{"from": "human", "value": "痛风?"}, {"from": "gpt", "value": "尿酸。", "weight": 1}]}


def odd(value: object, draw: random.Random) -> object:
    """`value` with one place of it something else."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.2:
        return draw.choice(ODD)
    changed = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(changed) if isinstance(changed, dict) else range(len(changed)))
    changed[key] = odd(changed[key], draw)
    return changed


def test_odd_values_in_every_layout_are_kept_or_rejected(tmp_path):
    draw = random.Random(1)
    lettered = {**CHOICE, "options": {"A": "甲.", "B": "乙."}, "context": "c"}
    layouts = [ALPACA[0], SHAREGPT, PUBMEDQA, CHOICE, lettered, {"title": "a", "ask": "b", "answer": "c"}]
    rows = [odd(draw.choice(layouts), draw) for _ in range(2000)]
    (tmp_path / "x").write_text("\n".join(map(json.dumps, [ALPACA[0], *rows])))
    found = data.read([tmp_path / "x"], rows_of=readers.reader(None), skip_invalid=True)
    assert len(found.kept) + len(found.rejected) == 2001 and 200 < len(found.kept) < 1600
    assert all(0 < len(reject.reason) < 400 for reject in found.rejected)


@pytest.mark.skipif(not MEDQA.is_dir(), reason="shared data set not beside the repository")
def test_the_real_files_are_read():
    counts = {"pubmedqa": 20, "huatuo": 40, "apollo": 40, "toyhom": 20}
    for folder, count in counts.items():
        files = sorted((MEDQA / "raw_samples" / folder).iterdir())
        assert len(data.read(files, rows_of=readers.reader(None)).kept) == count
    files = sorted((MEDQA / "raw_samples/medquad").rglob("*.xml"))
    found = data.read(files, rows_of=readers.reader(None), skip_invalid=True)
    assert (len(files), len(found.rejected), {reject.reason for reject in found.rejected}) == (
        10,
        10,
        {"output: is empty"},
    )
    rows = [json.loads(line) for line in (MEDQA / "val.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
    wanted = [((row["instruction"] + "\n" + row["input"]).strip(), row["output"]) for row in rows]
    for file in sorted((MEDQA / "formats").iterdir()):
        assert [row.turns[0] for row in data.read([file], rows_of=readers.reader(None)).kept] == wanted, file
    turns = {row.turns for row in data.read([MEDQA / "multiturn_zh.jsonl"]).kept}
    dialogues = data.read([MEDQA / "raw_samples/huatuo/liver_cancer.sample20.json"]).kept
    assert all(row.turns in turns for row in dialogues)  # read a second time, by those who made the data set
