"""Does every reader account for every row of a damaged file: kept, rejected with file and line, or one named error?

Files are those that users bring: samples of public data sets in their own formats, and the shipped rows in every kind
of file. How many rows a file holds is counted here a second time, from what was written or by other readers.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from medqa_runs import needs_shared
from paths import SHARED
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import corpus, data, prepare, readers
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Reject
from zerolite.medqa.rows import usable

RAW = SHARED / "medqa" / "raw_samples"
FORMATS = SHARED / "medqa" / "formats"
MAX_ROWS = 4  # of a file
ODD = [
    None, True, False, 0, -1, 1.5, 10**30, 10**400, float("nan"), float("inf"), "", " ", "\u200b", "\x00", "\ud800",
    "x", "热" * 3000, [], {}, [[]], ["x"], {"x": 1}, [None], {"role": "user", "content": "x"}, "NaN", "\r\n", '"',
]  # fmt: skip
KEYS = [
    "instruction", "input", "output", "messages", "conversations", "role", "content", "from", "value", "system", "text",
    "history", "question", "answer", "options", "QUESTION", "LONG_ANSWER", "title", "ask", "tools", "weight", "group",
    "", " output", "Output", "\ud800", "k" * 300,
]  # fmt: skip
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "gb18030", "cp1252", "big5", "utf-32", "utf-7"]


@dataclass(frozen=True)
class Source:
    """Rows, and how a file of them is written; `count`: how many rows a file has, None where that cannot be told."""

    name: str
    rows: list
    written: Callable[[list], bytes]
    count: Callable[[bytes], int | None]


# --- files of every kind --------------------------------------------------------------------------------------------


def dumped(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def lines(rows: list) -> bytes:
    return b"\n".join(map(dumped, rows)) + b"\n"


def array(rows: list) -> bytes:
    return b"[\n" + b",\n".join(map(dumped, rows)) + b"\n]"


def keyed(rows: list) -> bytes:
    return b"{" + b",\n".join(b'"%d": %s' % (number, dumped(row)) for number, row in enumerate(rows)) + b"}"


def cells_of(row: object) -> list[str]:
    values = row.values() if isinstance(row, dict) else [row]
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def table(encoding: str, delimiter: str, rows: list) -> bytes:
    """Of the first row's columns; a row of other ones is one of other cells."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerow(rows[0] if rows and isinstance(rows[0], dict) else ["question", "answer"])
    writer.writerows(map(cells_of, rows))
    return out.getvalue().encode(encoding, "replace")


def parquet(rows: list) -> bytes:
    import pyarrow
    from pyarrow import parquet as writer

    columns = {
        str(key).encode("utf-8", "replace").decode(): None for row in rows if isinstance(row, dict) for key in row
    }
    texts = [
        {key: value if isinstance(value, str | None) else json.dumps(value) for key, value in row.items()}
        if isinstance(row, dict)
        else {}
        for row in rows
    ]
    clean = [{k: v and v.encode("utf-8", "replace").decode() for k, v in row.items()} for row in texts]
    out = io.BytesIO()
    writer.write_table(pyarrow.table({key: [row.get(key) for row in clean] for key in columns or {"x": None}}), out)
    return out.getvalue()


def xml(rows: list) -> bytes:
    root = ElementTree.Element("Document", id="1", source="NIH", url="http://x")
    ElementTree.SubElement(root, "Focus").text = "Gout"
    pairs = ElementTree.SubElement(root, "QAPairs")
    for row in rows:
        one = ElementTree.SubElement(pairs, "QAPair")
        for key, value in row.items() if isinstance(row, dict) else []:
            name = "".join(letter for letter in str(key) if letter.isascii() and letter.isalpha()) or "x"
            said = value if isinstance(value, str) else json.dumps(value)
            said = "".join(letter for letter in said if letter.isprintable() or letter == "\n")
            ElementTree.SubElement(one, name).text = said.encode("utf-8", "replace").decode()
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def count_json(content: bytes) -> int | None:
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values())
    return len(value) if isinstance(value, list) or whole else None


def count_lines(content: bytes) -> int | None:
    """Of lines of JSON that are no array, and no object in one."""
    if count_json(content) is not None or not content.lstrip().startswith(b"{") or b"\x00" in content:
        return None
    return sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in content.split(b"\n"))


def count_xml(content: bytes) -> int | None:
    try:
        return sum(1 for _ in ElementTree.fromstring(content).iter("QAPair"))
    except (ElementTree.ParseError, ValueError, LookupError):
        return None


def count_none(content: bytes) -> int | None:
    return None


def sources() -> list[Source]:
    shipped = [
        json.loads(line)
        for name in ("train.en", "train.zh")
        for line in (CORPUS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    ]
    pairs = [{"question": row["instruction"], "answer": row["output"]} for row in shipped]
    texts = [{"text": row["output"], "source": "a book"} for row in shipped]
    dialogue = [
        {"messages": [{"role": "user", "content": one["question"]}, {"role": "assistant", "content": one["answer"]}]}
        for one in pairs
    ]
    found = [
        Source("lines", shipped, lines, count_lines),
        Source("texts", texts, lines, count_lines),
        Source("messages", dialogue, array, count_json),
        Source("gzip", shipped, lambda rows: gzip.compress(lines(rows), mtime=0), count_none),
        Source("utf-16", shipped, lambda rows: lines(rows).decode("utf-8", "replace").encode("utf-16"), count_none),
        Source("csv", pairs, partial(table, "utf-8", ","), count_none),
        Source("tsv", pairs, partial(table, "utf-16", "\t"), count_none),
        Source("parquet", shipped, parquet, count_none),
        Source("xml", [{"Question": p["question"], "Answer": p["answer"]} for p in pairs], xml, count_xml),
    ]
    if SHARED.is_dir():
        for name, file in (
            ("apollo en", RAW / "apollo" / "en.sample20.json"),
            ("apollo zh", RAW / "apollo" / "zh.sample20.json"),
            ("huatuo dialogue", RAW / "huatuo" / "liver_cancer.sample20.json"),
            ("alpaca", FORMATS / "alpaca40.json"),
        ):
            found.append(Source(name, json.loads(file.read_text(encoding="utf-8")), array, count_json))
        for name, file in (
            ("huatuo", RAW / "huatuo" / "llama_data.sample20.json"),
            ("messages lines", FORMATS / "messages40.jsonl"),
            ("sharegpt", FORMATS / "sharegpt40.jsonl"),
        ):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            found.append(Source(name, rows, lines, count_lines))
        pubmedqa = json.loads((RAW / "pubmedqa" / "ori_pqal.sample20.json").read_text(encoding="utf-8"))
        found.append(Source("pubmedqa", list(pubmedqa.values()), keyed, count_json))
        toyhom = csv.DictReader((RAW / "toyhom" / "sample20.gb18030.csv").read_text("gb18030").splitlines())
        found.append(Source("toyhom", list(toyhom), partial(table, "gb18030", ","), count_none))
        with (FORMATS / "qa40.csv").open(encoding="utf-8", newline="") as file:
            found.append(Source("qa40", list(csv.DictReader(file)), partial(table, "utf-8", ","), count_none))
        for file in sorted((RAW / "medquad").rglob("*.xml")):
            content = file.read_bytes()[:6000]
            found.append(Source(file.parent.name, [], lambda rows, content=content: content, count_xml))
    return found


# --- mutations ------------------------------------------------------------------------------------------------------


def mutated_row(row: object, draw: random.Random) -> object:
    """One place of a row is something else, under another key, deeper, gone, or there once more."""
    row = json.loads(json.dumps(row))
    if draw.random() < 0.03 or not row or not isinstance(row, dict | list):
        return draw.choice(ODD)
    inner = row
    while draw.random() < 0.5:
        places = [v for v in (inner.values() if isinstance(inner, dict) else inner) if v and isinstance(v, dict | list)]
        if not places:
            break
        inner = draw.choice(places)
    key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
    match draw.randrange(6):
        case 0 if isinstance(inner, dict):
            inner[draw.choice(KEYS)] = inner.pop(key)
        case 1:
            del inner[key]
        case 2:
            for _ in range(draw.choice([1, 3, 400])):
                inner[key] = [inner[key]] if draw.random() < 0.5 else {"content": inner[key]}
        case 3 if isinstance(inner, dict):
            inner[draw.choice(KEYS)] = draw.choice(ODD)
        case 4 if isinstance(inner[key], str):
            at = draw.randrange(len(inner[key]) + 1)
            inner[key] = inner[key][:at] + draw.choice(["\x00", "\ud800", "\n", '"', ",", "\u2028", "<", ""])
        case _:
            inner[key] = draw.choice(ODD)
    return row


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    changed, size = bytearray(content), max(len(content), 1)
    at = draw.randrange(size)
    match draw.randrange(8):
        case 0:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + draw.choice([1, 9, 300])]
        case 3:
            changed[at:at] = draw.choice(
                [b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\n", b"\r", b"\xff", b"\x00", b"<"]
            )
        case 4:
            changed[at:at] = content[draw.randrange(size) :][: draw.choice([1, 40, 400])]
        case 5:
            text, encoding = content.decode("utf-8", "replace"), draw.choice(ENCODINGS)
            return text.encode(encoding, "replace")
        case 6:
            packed = gzip.compress(content, mtime=0)
            return packed if draw.random() < 0.5 else packed[: draw.randrange(len(packed))]
        case 7:
            for _ in range(20):
                at = draw.randrange(len(changed) or 1)
                changed[at : at + 1] = bytes([draw.randrange(256)])
    return bytes(changed)


def mutated_file(source: Source, draw: random.Random) -> tuple[bytes, int | None]:
    """A file with one mutation, and how many rows it holds, if that can be told without the readers."""
    if source.rows and draw.random() < 0.6:
        rows = draw.sample(source.rows, draw.randint(1, min(MAX_ROWS, len(source.rows))))
        at = draw.randrange(len(rows))
        rows[at] = mutated_row(rows[at], draw)
        if source.name in ("csv", "tsv", "toyhom", "qa40"):  # a line of empty cells is none
            return source.written(rows), sum(any(map(str.strip, cells_of(row))) for row in rows)
        return source.written(rows), len(rows)
    rows = draw.sample(source.rows, min(2, len(source.rows)))
    content = mutated_bytes(source.written(rows), draw)
    return content, source.count(content)


# --- what became of it ----------------------------------------------------------------------------------------------


def outcome(path: Path, num_rows: int | None, tokenizer) -> str:
    """What the readers say of a file; raises AssertionError where a row is not accounted for."""
    read = partial(data.read, [path], rows_of=readers.rows, usable=usable)
    try:
        found = read(skip_invalid=True)
    except DataError as error:
        message = str(error)
        message.encode()
        assert message.startswith((f"{path}: ", f"{path}, line ", f"{path}, row ")), message
        with pytest.raises(DataError):
            read()
        if "no usable row: 0 rows" not in message and "0 kept, " in message:
            assert num_rows is None or f"no usable row: {num_rows} rows read" in message, (message, num_rows)
            return "no row kept"
        return "named error"
    accounted = found.num_kept + len(found.rejected)
    assert num_rows is None or accounted == num_rows, f"{accounted} rows of {num_rows}"
    if found.rejected:
        with pytest.raises(DataError) as error:
            read()
        assert str(error.value).startswith(str(found.rejected[0])) and found.rejected[0].line >= 1
    counts = prepare.Counts()
    prepared = list(prepare.prepare([path], None, None, None, counts))
    assert counts.read.total() == accounted == counts.kept.total() + counts.dropped.total() == len(prepared)
    # It keeps each row once, and writes source, licence and language, which training does not look at.
    others = ("source: ", "lang: ", "language: ", "licence: ", "license: ")
    more = [one for one in prepared if isinstance(one, Reject) and one.reason.startswith((prepare.DUPLICATE, *others))]
    assert counts.kept.total() == found.num_kept - len(more)
    if tokenizer is not None:
        corpus.encode_rows("train", [*found.kept, *found.passages], tokenizer, 64)
    return "rows rejected" if found.rejected else "all rows kept"


@needs_shared
@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_every_row_of_a_damaged_file_is_accounted_for(tmp_path, number):
    tokenizer, given = AutoTokenizer.from_pretrained(CORPUS / "tokenizer"), sources()
    outcomes: Counter[str] = Counter()
    failures, counted = [], 0
    for seed in range(number):
        draw, source = random.Random(seed), given[seed % len(given)]
        content, num_rows = mutated_file(source, draw)
        counted += num_rows is not None
        path = tmp_path / f"rows-{seed}"
        path.write_bytes(content)
        try:
            outcomes[outcome(path, num_rows, tokenizer if seed % 10 == 0 else None)] += 1
        except BaseException as error:
            failures.append(f"seed {seed}, {source.name}: {type(error).__name__}: {str(error)[:300]}")
        path.unlink()
    told = ", ".join(f"{name} {times}" for name, times in sorted(outcomes.items()))
    told += f"; failures: {len(failures)}"
    print(f"{number} mutated files of {len(given)} kinds, rows of {counted} counted twice: {told}")
    assert not failures, f"{len(failures)}\n" + "\n".join(failures[:20])
    assert all(
        outcomes[name] > number / 50 for name in ("named error", "rows rejected", "all rows kept", "no row kept")
    )
