"""Rows of JSONL and JSON array files, each with its line; a file that is no such thing is named for what it is."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from zerolite import DataError
from zerolite.medqa.rows import shown

BOM = b"\xef\xbb\xbf"
LOOKED_AT = 4096  # bytes that tell what a file is
LINES = re.compile(rb"\r?\n")

# (line from 1, function that gives the row's value or raises ValueError)
Located = tuple[int, Callable[[], object]]


def rows(file: Path) -> Iterator[Located]:
    """Each row of a file. Raises DataError for a file that cannot be read, or is neither JSONL nor a JSON array."""
    yield from of_content(file, content_of(file))


def content_of(file: Path) -> bytes:
    """The bytes of a file, without a byte order mark of UTF-8."""
    try:
        if file.exists() and not file.is_file() and not file.is_dir():  # a pipe may never end, and is read only once
            raise DataError(f"{file}: cannot be read: expected a file, got a pipe or a device")
        return file.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def of_content(file: Path, content: bytes) -> Iterator[Located]:
    """The rows in the bytes of a file."""
    kind = kind_of(content)
    if kind:
        raise DataError(f"{file}: is {kind}, expected JSON lines or a JSON array of rows")
    if content.lstrip().startswith(b"[") and not _is_lines_of_lists(content):
        yield from _array(file, content)
        return
    end = b"\r" if b"\n" not in content else b"\n"  # not splitlines(): U+2028 may stand in a text
    for number, line in enumerate(content.split(end), start=1):
        line = line.removeprefix(BOM)  # files that were put one behind the other
        if line.strip():
            yield number, lambda line=line: _json(line)


def kind_of(content: bytes) -> str | None:
    """What a file is that holds no rows of JSON; None where it may hold them."""
    head = content[:LOOKED_AT]
    for magic, kind in (
        (b"\x1f\x8b", "compressed by gzip"),
        (b"PK\x03\x04", "a zip archive (or a spreadsheet)"),
        (b"PAR1", "Parquet"),
        (b"ARROW1", "Arrow"),
        (b"BZh", "compressed by bzip2"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
        (b"\xfd7zXZ", "compressed by xz"),
        (b"%PDF", "PDF"),
        (b"version https://git-lfs", "a git LFS pointer (`git lfs pull` fetches the file itself)"),
    ):
        if head.startswith(magic):
            return kind
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or is_utf16(head):
        return "UTF-16"
    begin = head.lstrip()[:200].lower()
    if begin.startswith((b"<!doctype html", b"<html")):
        return "HTML (a saved web page?)"
    if begin.startswith(b"<"):
        return "XML"
    if not begin or begin.startswith((b"{", b"[")) or re.search(rb'(?m)^[ \t]*(?:\{\s*"|\[\s*\{)', head):
        return "one JSON object" if _is_one_object(content) else None
    delimiter = delimiter_of(head)
    return f"{'TSV' if delimiter == chr(9) else 'CSV'}, not JSON" if delimiter else "text, not JSON"


def is_utf16(head: bytes) -> bool:
    """Whether bytes without a mark look like UTF-16: every second one of them is NUL."""
    pairs = len(head) // 2
    return pairs >= 4 and max(head[0::2].count(0), head[1::2].count(0)) > 0.9 * pairs


def delimiter_of(head: bytes) -> str | None:
    """What separates the columns of a table, by its first line; None where it has one column."""
    first = LINES.split(head.lstrip(), maxsplit=1)[0]
    counts = {delimiter: first.count(delimiter.encode()) for delimiter in ("\t", ",", ";", "|")}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    return best if counts[best] else None


def decoder() -> tuple[json.JSONDecoder, list[str]]:
    """A JSON decoder, and the keys that its last value had twice: who decodes looks there, and empties it."""
    twice: list[str] = []

    def checked(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice.append(next(key for key in found if keys.count(key) > 1))
        return found

    return json.JSONDecoder(object_pairs_hook=checked), twice


def _json(line: bytes) -> object:
    found, twice = decoder()
    try:
        value = found.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"not usable JSON: {error}") from None
    return once(value, twice)


def once(value: object, twice: list[str]) -> object:
    """`value`; ValueError where it has a key twice, since the first one would be dropped."""
    if twice:
        raise ValueError(f"has the key {shown(twice[0])} twice")
    return value


def _is_one_object(content: bytes) -> bool:
    """Whether the file is one object over several lines, which is no row a line."""
    begin = content.lstrip()
    first = LINES.split(begin, maxsplit=1)[0]
    if not begin.startswith(b"{") or first == begin:
        return False
    for part, is_wanted in ((first, False), (begin, True)):
        try:
            json.loads(part)
            found = True
        except (RecursionError, ValueError):
            found = False
        if found != is_wanted:
            return False
    return True


def _is_lines_of_lists(content: bytes) -> bool:
    first, *rest = LINES.split(content.lstrip(), maxsplit=1)
    if not rest or not rest[0].strip():
        return False
    try:
        found = json.loads(first)
    except (RecursionError, ValueError):
        return False
    return bool(found) and not isinstance(found[0], dict)


def _array(file: Path, content: bytes) -> Iterator[Located]:
    """Rows of a JSON array one by one, so that each has its line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8") from None
    (found, twice), blank = decoder(), re.compile(r"[ \t\r\n]*")
    position, line, counted = blank.match(text, text.index("[") + 1).end(), 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        twice.clear()
        try:
            value, position = found.raw_decode(text, position)
        except (RecursionError, ValueError) as error:
            reason = getattr(error, "msg", error)
            raise DataError(f"{file}, line {line}: the JSON array breaks off in this row: {reason}") from None
        yield line, lambda value=value, twice=tuple(twice): once(value, twice)
        position = blank.match(text, position).end()
        if text.startswith(",", position):
            position = blank.match(text, position + 1).end()
        elif not text.startswith("]", position):
            raise DataError(f"{file}, line {line}: the JSON array breaks off after this row: expected ',' or ']'")
    if text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        rest = shown(text[position + 1 :].strip())
        raise DataError(f"{file}, line {line}: expected nothing after the JSON array's end, got {rest}")
