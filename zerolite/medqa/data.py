"""Reading rows of questions and answers: JSONL or JSON array files in, checked conversations out.

A row is `{"instruction", "input", "output"}` (alpaca; `input` may be absent, null or empty) or
`{"messages": [{"role", "content"}, ...]}`: an optional system message, then user and assistant in turn, ending with the
assistant. Other keys are ignored. A row that is not usable raises DataError with file, line and reason, or is
counted where the caller asks for that.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zerolite import DataError


@dataclass(frozen=True)
class Conversation:
    """One usable row: questions and answers in turn."""

    turns: tuple[tuple[str, str], ...]  # (question, answer), at least one
    system: str = ""

    @property
    def is_chinese(self) -> bool:
        """Whether the first question has a Chinese character."""
        return re.search("[\u3400-\u9fff]", self.turns[0][0]) is not None

    @property
    def language(self) -> str:
        """Of the first question: "zh" or, for every other one, "en"."""
        return "zh" if self.is_chinese else "en"


@dataclass(frozen=True)
class Reject:
    """A row that is not usable, and why."""

    file: str
    line: int  # of the row's first character, from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass
class Rows:
    """What reading gave: every row is either kept or rejected."""

    kept: list[Conversation] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)

    def __str__(self) -> str:
        read = len(self.kept) + len(self.rejected)
        return f"{read} rows read, {len(self.kept)} kept, {len(self.rejected)} rejected"


def read(files: list[Path], *, skip_invalid: bool = False, max_samples: int | None = None) -> Rows:
    """The conversations of `files` in order, of each file the first `max_samples` usable ones at most.

    Raises DataError for the first row that is not usable (with `skip_invalid` it goes to `Rows.rejected`), for a
    file that cannot be read, for a JSON array that breaks off (nothing behind that point can be told apart), and
    where no row is usable.
    """
    rows = Rows()
    for file in files:
        num_before = len(rows.kept)
        for line, value in values(file):
            try:
                rows.kept.append(_conversation(value()))
            except ValueError as error:
                reject = Reject(str(file), line, str(error))
                if not skip_invalid:
                    raise DataError(f"{reject} (--skip_invalid leaves such rows out)") from None
                rows.rejected.append(reject)
            if max_samples is not None and len(rows.kept) - num_before == max_samples:
                break
    if not rows.kept:
        raise DataError(f"{', '.join(map(str, files))}: no usable row: {rows}")
    return rows


def values(file: Path) -> Iterator[tuple[int, object]]:
    """(line, function that gives the row's JSON value or raises ValueError) for each row."""
    try:
        if file.exists() and not file.is_file() and not file.is_dir():  # a pipe may never end, and is read only once
            raise DataError(f"{file}: cannot be read: expected a file, got a pipe or a device")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        yield from _array(file, content)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):  # not splitlines(): U+2028 may stand in a text
        if line.strip():
            yield number, lambda line=line: _json(line)


def _json(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"not usable JSON: {error}") from None


def _array(file: Path, content: bytes) -> Iterator[tuple[int, object]]:
    """Rows of a JSON array one by one, so that each has its line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8") from None
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    position, line, counted = blank.match(text, text.index("[") + 1).end(), 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (RecursionError, ValueError) as error:
            reason = getattr(error, "msg", error)
            raise DataError(f"{file}, line {line}: the JSON array breaks off in this row: {reason}") from None
        yield line, lambda value=value: value
        position = blank.match(text, position).end()
        if text.startswith(",", position):
            position = blank.match(text, position + 1).end()
        elif not text.startswith("]", position):
            raise DataError(f"{file}, line {line}: the JSON array breaks off after this row: expected ',' or ']'")
    if text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        rest = _shown(text[position + 1 :].strip())
        raise DataError(f"{file}, line {line}: expected nothing after the JSON array's end, got {rest}")


def _conversation(row: object) -> Conversation:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if "messages" in row and "output" in row:
        raise ValueError("has both `messages` and `output`: one of the two layouts")
    if "messages" in row:
        return _from_messages(row["messages"])
    if "instruction" not in row or "output" not in row:
        raise ValueError(f"expected keys `instruction` and `output`, or `messages`; got {_shown(sorted(row))}")
    question = _text(row["instruction"], "instruction")
    context = row.get("input")
    if context is not None and not (isinstance(context, str) and not context.strip()):
        question += "\n" + _text(context, "input")
    return Conversation(turns=((question, _text(row["output"], "output")),))


def _from_messages(messages: object) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages`: expected a list of at least one message, got {_shown(messages)}")
    roles, texts = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {number}: expected an object with `role` and `content`, got {_shown(message)}")
        roles.append(message.get("role"))
        texts.append(_text(message.get("content"), f"message {number}: `content`"))
    system = texts.pop(0) if roles[0] == "system" else ""
    dialogue = roles[1:] if system else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise ValueError(f"expected roles [system,] user, assistant, user, assistant ..., got {_shown(roles)}")
    return Conversation(turns=tuple(zip(texts[::2], texts[1::2], strict=True)), system=system)


def _text(value: object, name: str) -> str:
    """`value` without white space at its ends, if it is a text that can be learned from."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {_shown(value)}")
    if not value.strip():
        raise ValueError(f"{name}: is empty")
    if "\x00" in value:
        raise ValueError(f"{name}: holds a NUL character (column {value.index(chr(0)) + 1} of the text)")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: holds half a surrogate pair (column {error.start + 1} of the text)") from None
    return value.strip()


def _shown(value: object) -> str:
    try:
        shown = json.dumps(value, ensure_ascii=True)
    except RecursionError:  # it gives up a level before json.loads
        return f"a deeply nested {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
