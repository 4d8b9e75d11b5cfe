"""Is every strange, malformed or huge row read right, or refused with its file and line, in both file layouts?

What a row says is decided here a second time, from its bytes and the documented layouts alone.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from limits import Limit
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import data, prompts
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Conversation

ROWS_A_FILE = 100
FILE_S = 20.0  # to read, encode and compare one file, on a quiet machine
CUTOFF_LEN = 48
BOM = b"\xef\xbb\xbf"
TOKENIZER = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")

ODD_TEXTS = [
    "", " ", "\n\t", "\u00a0", "\u2028", "\x00", "a\x00b", "\ud800", "a\udfff", "\ufeff", "\x1b[0m", "\r",
    "<s>", "</s>", "\x7f", "{}", "[]", "null", "什么是发烧？", "🙂" * 9, "e\u0301", "\u202e", "a" * 3000,
    "\\u0000", '"', "\\", "NaN",
]  # fmt: skip
ODD_VALUES = [
    None, True, False, 0, -1, 1.5, 10**30, float("nan"), float("inf"), [], {}, [[]], ["x"], {"x": 1}, [None], "", "x",
    {"role": "user", "content": "x"}, [{"type": "text", "text": "x"}],
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "User", "", "human", None, 3, ["user"], {"a": 1}]
WORDS = "fever cough 发烧 头痛 37.5 °C and or \n - what is 🙂 </s> \t a".split(" ")


def text(draw: random.Random) -> str:
    if draw.random() < 0.1:
        return draw.choice(ODD_TEXTS)
    size = draw.choice([1, 3, 10, 40]) if draw.random() < 0.998 else draw.choice([30_000, 300_000])
    return " ".join(draw.choices(WORDS, k=size))


def alpaca(draw: random.Random) -> object:
    row: dict = {"instruction": text(draw), "output": text(draw)}
    if draw.random() < 0.6:
        row["input"] = draw.choice([None, "", " ", text(draw), text(draw)])
    if draw.random() < 0.2:
        row[draw.choice(["id", "history", "system", "", "\ud800"])] = draw.choice(ODD_VALUES)
    return row


def messages(draw: random.Random) -> object:
    roles = ["system"] * draw.choice([0, 1]) + ["user", "assistant"] * draw.randint(1, 3)
    if draw.random() < 0.3:
        roles[draw.randrange(len(roles))] = draw.choice(ROLES)
    if draw.random() < 0.2:
        del roles[draw.randrange(len(roles))]
    return {"messages": [{"role": role, "content": text(draw)} for role in roles]}


def odd(draw: random.Random) -> object:
    """One place of a good row is something else, gone, or there twice."""
    row = draw.choice([alpaca, messages])(draw)
    inner = row
    while draw.random() < 0.7:
        places = [v for v in (inner.values() if isinstance(inner, dict) else inner) if v and isinstance(v, dict | list)]
        if not places:
            break
        inner = draw.choice(places)
    key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
    if draw.random() < 0.3:
        del inner[key]
    else:
        inner[key] = draw.choice(ODD_VALUES)
    return row


def any_value(draw: random.Random) -> object:
    return draw.choice(ODD_VALUES)


def both(draw: random.Random) -> object:
    return {**alpaca(draw), **messages(draw)}


def dumped(value: object, draw: random.Random) -> bytes:
    """JSON of one line, with or without escapes; half a surrogate pair only as an escape."""
    line = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    try:
        return line.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def damaged(line: bytes, draw: random.Random) -> bytes:
    """The bytes of a row, changed at some places; it stays one line."""
    line = bytearray(line[:4000])
    for _ in range(draw.choice([1, 1, 3, 20])):
        at = draw.randrange(len(line) or 1)
        match draw.randrange(5):
            case 0:
                line[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del line[at : at + draw.randint(1, 9)]
            case 2:
                line[at:at] = draw.choice(
                    [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u", b"\xff", b"\xef\xbb\xbf"]
                )
            case 3:
                line[at:at] = line[: draw.randint(1, 40)]
            case 4:
                del line[at:]
    return bytes(line).replace(b"\n", b" ")


def bomb(draw: random.Random) -> bytes:
    """What a parser chokes on."""
    depth = draw.choice([50, 400, 1100, 5000, 100_000])  # what json reads about 1000 deep depends on the stack
    digits = draw.choice([10, 4299, 4301, 100_000])
    good = b'{"instruction": "a", "output": "b", "x": %s}'
    return draw.choice(
        [
            good % (b"[" * depth + b"]" * depth),
            good % (b'{"a":' * depth + b"1" + b"}" * depth),
            b"[" * depth,
            good % (b"9" * digits),
            good % (b"1e" + b"9" * digits),
            b'{"instruction": %s, "output": "b"}' % (b"9" * digits),
            b'{"messages": %s}' % (b"[" * depth + b"]" * depth),
            b'{"messages": [%s]}' % b", ".join([b'{"role": "user", "content": "x"}'] * depth),
            b'{"instruction": "a", "output": "b", "output": 3}',
            b'{"instruction": "a", "output": 3, "output": "b"}',
            b"{" + b'"k": 1, ' * 1000 + b'"instruction": "a", "output": "b"}',
        ]
    )


def row(draw: random.Random) -> bytes:
    """One line."""
    make: Callable = draw.choices([alpaca, messages, odd, any_value, both, bomb], [8, 7, 6, 1, 1, 1])[0]
    if make is bomb:
        return bomb(draw)
    line = dumped(make(draw), draw)
    return damaged(line, draw) if draw.random() < 0.2 else line


# what a row says, a second time

MEANT_OTHERWISE = "tools functions function_call tool_calls reasoning_content images context chosen rejected".split()


class Twice(ValueError):
    """A key stands twice in an object."""


def distinct(pairs: list[tuple[str, object]]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise Twice
    return dict(pairs)


def meant(line: bytes) -> Conversation | None:
    """The conversation that a line holds; None where it holds none that can be used."""
    try:
        value = json.loads(line.removeprefix(BOM).decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError):
        return None
    return conversation(value)


def conversation(value: object) -> Conversation | None:
    if not isinstance(value, dict) or any(not says_nothing(value.get(key)) for key in MEANT_OTHERWISE):
        return None
    pair = {
        key: value[key] for key in ("instruction", "input", "output", "history") if not says_nothing(value.get(key))
    }
    system = "" if says_nothing(value.get("system")) else value["system"]
    if system != "" and not is_usable(system):
        return None
    turns = value.get("messages")
    if says_nothing(turns):
        usable = (
            {"instruction", "output"} <= pair.keys() and "history" not in pair and all(map(is_usable, pair.values()))
        )
        if not usable:
            return None
        question = "\n".join(pair[key].strip() for key in ("instruction", "input") if key in pair)
        return Conversation(((question, pair["output"].strip()),), system.strip())
    if pair or not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    roles, texts = [turn.get("role") for turn in turns], [turn.get("content") for turn in turns]
    if roles[:1] == ["system"]:
        said, roles, texts = texts[0], roles[1:], texts[1:]
        if not says_nothing(said):
            if not is_usable(said) or (system and system.strip() != said.strip()):
                return None
            system = said
    if not all(map(is_usable, texts)):
        return None
    texts = [content.strip() for content in texts]
    pairs = len(roles) // 2
    if pairs == 0 or roles != ["user", "assistant"] * pairs:
        return None
    return Conversation(tuple((texts[2 * i], texts[2 * i + 1]) for i in range(pairs)), system.strip())


def is_blank(value: str) -> bool:
    """Nothing to see: a NUL counts as something, since it is refused as what it is."""
    return not re.sub(r"[\s\u200b\ufeff\u202e\u0301\x01-\x1f\x7f\ud800-\udfff]", "", value)


def says_nothing(value: object) -> bool:
    if isinstance(value, str):
        return is_blank(value)
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def is_usable(value: object) -> bool:
    if not isinstance(value, str) or is_blank(value) or "\x00" in value:
        return False
    return not any(0xD800 <= ord(character) < 0xE000 for character in value)


# the campaign


def check_lines(path: Path, lines: list[bytes]) -> list[str]:
    """What is wrong with how a JSONL file of these lines is read; one that begins with a bracket would be an array."""
    lines = [b'{"instruction": "a", "output": "b"}', *lines]
    path.write_bytes(b"\n".join(lines))
    expected = {n: meant(line) for n, line in enumerate(lines, start=1) if line.removeprefix(BOM).strip()}
    return compare(path, expected)


def check_array(path: Path, lines: list[bytes], draw: random.Random) -> list[str]:
    """The same for a JSON array, with a row in each line; those that are no JSON break the array off there."""
    path.write_bytes(b"[" + b",\n".join(lines) + b"]" + draw.choice([b"", b"\n", b" \n\n"]))
    not_text = [number for number, line in enumerate(lines, start=1) if not is_text(line)]
    if not_text:  # found before any row
        return refused(path, f"{path}, line {not_text[0]}: ")
    expected: dict[int, Conversation | None] = {}
    for number, line in enumerate(lines, start=1):
        if not is_json(line):
            bad = [number for number, found in expected.items() if found is None]
            return refused(path, f"{path}, line {min([*bad, number])}: ")
        expected[number] = meant(line)
    return compare(path, expected)


def compare(path: Path, expected: dict[int, Conversation | None]) -> list[str]:
    bad = [number for number, found in expected.items() if found is None]
    problems = refused(path, f"{path}, line {bad[0]}: ") if bad else []
    if len(bad) == len(expected):
        return problems
    read = data.read([path], skip_invalid=True)
    if [reject.line for reject in read.rejected] != bad:
        problems.append(f"lines {[reject.line for reject in read.rejected]} are rejected, expected {bad}")
    if read.kept != [found for found in expected.values() if found is not None]:
        problems.append("the rows that are kept are others")
    for reject in read.rejected:
        if not 0 < len(reject.reason) < 400 or not str(reject).startswith(f"{path}, line {reject.line}: "):
            problems.append(f"line {reject.line} is rejected with {len(reject.reason)} characters")
        str(reject).encode()
    examples, _ = prompts.encode(read.kept, TOKENIZER, CUTOFF_LEN)
    lengths = [len(example.input_ids) for example in examples]
    if len(examples) != len(read.kept) or not all(0 < length <= CUTOFF_LEN for length in lengths):
        problems.append(f"{len(read.kept)} rows give {len(examples)} examples of up to {max(lengths)} tokens")
    return problems


def refused(path: Path, where: str) -> list[str]:
    try:
        data.read([path])
    except DataError as error:
        str(error).encode()
        return [] if str(error).startswith(where) else [f"is refused with {str(error)[:200]}, expected {where}"]
    return [f"is read, expected {where}"]


@pytest.mark.parametrize("rows", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_any_row_is_read_right_or_refused_by_file_and_line(tmp_path, rows):
    failures, kept = [], 0
    for seed in range(rows // ROWS_A_FILE):
        draw, limit = random.Random(seed), Limit(FILE_S)
        lines = [row(draw) for _ in range(ROWS_A_FILE)]
        kept += sum(meant(line) is not None for line in lines)
        path = tmp_path / f"rows-{seed}"
        is_array = seed % 2 == 1
        if is_array and seed % 4 == 1:  # as a whole; the others break off somewhere
            lines = [line for line in lines if line.strip() and is_json(line)]
        try:
            problems = check_array(path, lines, draw) if is_array else check_lines(path, lines)
        except Exception as error:
            problems = [f"{type(error).__name__}: {str(error)[:200]}"]
        failures += [f"seed {seed}: {problem}" for problem in problems]
        if limit.is_over():
            failures.append(f"seed {seed}: took more than {FILE_S:.0f} s")
        path.unlink()
    print(f"{rows} rows, {kept} of them usable: {len(failures)} failures")
    assert not failures, "\n".join(failures[:20])
    assert 0.3 * rows < kept < 0.9 * rows


def is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except ValueError:
        return False
    return True


def is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True
