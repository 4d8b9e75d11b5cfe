"""Files that users have as rows of ours: gzip, UTF-16, CSV, TSV, Parquet, Arrow, MedQuAD's XML, PubMedQA's object.

What a file is, its first bytes say, not its name. A file that is none of these is refused for what it is.
"""

import csv
import functools
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.parsers import expat

from zerolite import DataError
from zerolite.medqa import json_rows
from zerolite.medqa.json_rows import Located
from zerolite.medqa.layouts import as_own, columns_of
from zerolite.medqa.rows import shown

ARROW_STREAM = b"\xff\xff\xff\xff"  # what `datasets` writes; files of Arrow begin with ARROW1
LEAST_CHINESE = 4  # characters that tell GB18030
BLANK = re.compile(r"[ \t\r\n]*")


def rows(file: Path, columns: dict[str, str] | None = None) -> Iterator[Located]:
    """Each row of a file with its line (of Parquet and Arrow: its number), in one of our layouts.

    columns: {field: column}, as `layouts.columns_of` gives it. Raises DataError for a file that cannot be read.
    """
    for line, value in _raw(file, json_rows.content_of(file)):
        yield line, lambda value=value: as_own(value(), columns)


def as_written(file: Path) -> Iterator[Located]:
    """Each row of a file as `rows` finds it, in the layout that it came in."""
    return _raw(file, json_rows.content_of(file))


def reader(columns: str | None) -> Callable[[Path], Iterator[Located]]:
    """`rows` for `data.read`, with the map of `--columns`."""
    return functools.partial(rows, columns=columns_of(columns) if columns else None)


def _raw(file: Path, content: bytes) -> Iterator[Located]:
    if content.startswith(b"\x1f\x8b"):
        content = _unpacked(file, content)
    if content.startswith((b"PAR1", b"ARROW1", ARROW_STREAM)):
        return _arrow(file, content)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or json_rows.is_utf16(content[: json_rows.LOOKED_AT]):
        content = _from_utf16(file, content)
    kind = json_rows.kind_of(content)
    if kind == "XML":
        return _medquad(file, content)
    if kind and kind.startswith(("CSV", "TSV")):
        return _table(file, content)
    content = _from_gb18030(content)
    keyed = _keyed(file, content) if content.lstrip().startswith(b"{") else None
    return json_rows.of_content(file, content) if keyed is None else keyed


def _unpacked(file: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content).removeprefix(json_rows.BOM)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: is compressed by gzip, but damaged: {error}") from None


def _from_utf16(file: Path, content: bytes) -> bytes:
    order = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-16-le"
    if order == "utf-16-le" and content[:1] == b"\x00":
        order = "utf-16-be"
    try:
        return content.decode(order).encode("utf-8")
    except UnicodeError as error:
        raise DataError(f"{file}: is UTF-16, but damaged: {error}") from None


def _from_gb18030(content: bytes) -> bytes:
    """Chinese lines of JSON that Windows wrote, as UTF-8; anything else as it is."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = content.decode("gb18030")
        except UnicodeDecodeError:
            return content
        return text.encode("utf-8") if _is_chinese(text) else content
    return content


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(file: Path, content: bytes) -> Iterator[Located]:
    """CSV or TSV with a header. A quote that is not closed ends the reading: what follows cannot be told apart."""
    delimiter = json_rows.delimiter_of(content[: json_rows.LOOKED_AT])
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = csv.reader(io.StringIO(_decoded(file, content), newline=""), delimiter=delimiter or ",", strict=True)
    header: list[str] | None = None
    while True:
        line = lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}, line {line}: the CSV breaks off in this row: {error}") from None
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise DataError(f"{file}, line {line}: the header names a column twice: {shown(header)}")
            continue
        yield line, functools.partial(_of_cells, header, cells)


def _of_cells(header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(f"expected {len(header)} cells, as the header has, got {len(cells)}")
    return dict(zip(header, cells, strict=True))


def _decoded(file: Path, content: bytes) -> str:
    """The text of a table in UTF-8, or in GB18030 where it reads as Chinese and not as another code by chance."""
    for encoding in ("utf-8", "gb18030"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            failed = error
            continue
        if encoding == "utf-8" or _is_chinese(text):
            return text
    line = content.count(b"\n", 0, failed.start) + 1
    raise DataError(f"{file}, line {line}: is in none of UTF-8, UTF-16 and GB18030: save it as UTF-8")


def _is_chinese(text: str) -> bool:
    """Whether text that was read as GB18030 is: of another code by chance, second bytes are letters of ASCII."""
    pairs = [character.encode("gb18030") for character in text if character > "\x7f"]
    usual = sum(len(pair) == 2 and 0xA1 <= pair[0] <= 0xF7 and pair[1] >= 0xA1 for pair in pairs)
    return len(pairs) >= LEAST_CHINESE and usual >= 0.9 * len(pairs)


def _arrow(file: Path, content: bytes) -> Iterator[Located]:
    """Rows of Parquet or Arrow by their number; pyarrow comes with `datasets`."""
    kind = "Parquet" if content.startswith(b"PAR1") else "Arrow"
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet, ipc = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow.ipc")
    except ImportError:
        raise DataError(f"{file}: is {kind}, which needs `pip install datasets` (or pyarrow)") from None
    number = 0
    try:
        source = pyarrow.BufferReader(content)
        if kind == "Parquet":
            batches = parquet.ParquetFile(source).iter_batches()
        elif content.startswith(b"ARROW1"):
            table = ipc.open_file(source)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            batches = ipc.open_stream(source)
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, lambda row=row: row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}, row {number + 1}: is {kind}, but damaged: {str(error)[:200]}") from None


# --- data sets' own files -------------------------------------------------------------------------------------------


def _medquad(file: Path, content: bytes) -> Iterator[Located]:
    """MedQuAD: a Document of QAPairs. Three of its collections have no answers: such rows are rejected one by one."""
    pairs: list[tuple[int, dict[str, str]]] = []
    inside: list[str] = []
    document: dict[str, str] = {}
    focus: list[str] = []  # the disease, which several documents may be of
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        inside.append(name)
        if name == "Document":
            document.update({key: attributes[key] for key in ("source", "url") if key in attributes})
            document["group"] = f"document {attributes.get('url') or attributes.get('id') or file}"
        if name == "QAPair":
            pairs.append((parser.CurrentLineNumber, {"instruction": "", "output": "", **document}))
        if name in ("Question", "Answer") and pairs:
            key = "instruction" if name == "Question" else "output"
            if pairs[-1][1][key]:
                raise DataError(f"{file}, line {parser.CurrentLineNumber}: a QAPair has two texts of {name}")

    def text(data: str) -> None:
        if inside[-1] == "Focus":
            focus.append(data)
        for name, key in (("Question", "instruction"), ("Answer", "output")):
            if pairs and name in inside:  # at any depth: what is marked inside an answer is part of it
                pairs[-1][1][key] += data

    def refuse(*_: object) -> None:
        raise DataError(f"{file}, line {parser.CurrentLineNumber}: is XML that declares entities, which is not read")

    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler = lambda name: inside.pop()
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise DataError(f"{file}, line {error.lineno}: is XML, but damaged: {error}") from None
    except (LookupError, ValueError) as error:  # an encoding that is none, or that expat does not know
        raise DataError(f"{file}, line 1: is XML of an encoding that is not read: {error}: save it as UTF-8") from None
    if not pairs:
        raise DataError(f"{file}: is XML, but not MedQuAD's: it holds no QAPair")
    disease = " ".join("".join(focus).split()).casefold()
    for line, row in pairs:
        yield line, lambda row=row: row | ({"group": f"disease {disease}"} if disease else {})


def _keyed(file: Path, content: bytes) -> Iterator[Located] | None:
    """Rows of one object that has a row for each key, as PubMedQA's; None where the file is not one object."""
    try:
        value = json.loads(content)
    except (RecursionError, ValueError):
        return None  # lines, or something that the reader of lines names
    if not isinstance(value, dict) or not value or not all(isinstance(row, dict) for row in value.values()):
        if content.strip().count(b"\n"):
            raise DataError(
                f"{file}: is one JSON object with the keys {shown(list(value))}, expected rows: JSON lines, an array, "
                "or an object with a row for each key"
            )
        return None
    return _values_of(content.decode("utf-8"))


def _values_of(text: str) -> Iterator[Located]:
    decoder, twice = json_rows.decoder()
    position, line, counted, seen = text.index("{") + 1, 1, 0, set()
    while True:
        position = BLANK.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        key, position = decoder.raw_decode(text, position)
        position = BLANK.match(text, text.index(":", position) + 1).end()
        twice.clear()
        value, position = decoder.raw_decode(text, position)
        repeated = [*twice, *([key] if key in seen else [])]
        seen.add(key)
        yield line, lambda key=key, value=value, repeated=repeated: {"group": key, **json_rows.once(value, repeated)}
        position = BLANK.match(text, position).end()
        if text[position] == "}":
            return
        position += 1
