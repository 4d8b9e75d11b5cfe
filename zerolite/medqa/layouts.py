"""Rows of neighbouring layouts as rows of ours: ShareGPT, pairs, PubMedQA, Toyhom, multiple choice, and a column map.

What a row says stays: keys that a layout has no place for are handed on, so that `zerolite.medqa.rows` uses, counts or
refuses them.
"""

import re
from dataclasses import dataclass

from zerolite.medqa.rows import is_absent, shown

FIELDS = {  # of --columns: the key of an alpaca row that it becomes
    "question": "instruction",
    "context": "input",
    "answer": "output",
    "system": "system",
    "language": "language",
    "source": "source",
    "licence": "licence",
    "group": "group",
    "text": "text",
}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OPTION = re.compile(r"^\s*\(([A-Z])\)\s*", re.MULTILINE)


def columns_of(given: str) -> dict[str, str]:
    """`question=title,answer=answer` as {field: column}. Raises ValueError for anything else."""
    found: dict[str, str] = {}
    for part in given.split(","):
        field, equals, column = (text.strip() for text in part.partition("="))
        if not equals or not column or field not in FIELDS:
            raise ValueError(f"--columns: expected FIELD=COLUMN with a field of {', '.join(FIELDS)}; got {part!r}")
        if field in found:
            raise ValueError(f"--columns: names {field} twice")
        found[field] = column
    if {"question", "answer", "text"} & found.keys() not in ({"question", "answer"}, {"text"}):
        expected = "expected at least question=COLUMN and answer=COLUMN, or text=COLUMN"
        raise ValueError(f"--columns: {expected}; got {given!r}")
    return found


def as_own(row: object, columns: dict[str, str] | None = None) -> object:
    """A row in one of our layouts, or as it came. Raises ValueError where a known layout is broken."""
    if not isinstance(row, dict):
        return row
    if columns:
        return _mapped(row, columns)
    if not is_absent(row.get("conversations")):
        return _sharegpt(row)
    if not is_absent(row.get("messages")) or not is_absent(row.get("instruction")):
        return row
    if {"QUESTION", "LONG_ANSWER"} <= row.keys():
        return _pubmedqa(row)
    if {"question", "options", "answer"} <= row.keys() and not is_absent(row["options"]):
        return _multiple_choice(row)
    if {"title", "ask", "answer"} <= row.keys():
        found = _renamed(row, {"title": "instruction", "ask": "input", "answer": "output"})
        return found if is_absent(row["title"]) else {"group": f"title {row['title']}", **found}
    if {"question", "answer"} <= row.keys():
        return _renamed(row, {"question": "instruction", "context": "input", "answer": "output"})
    return row


def _renamed(row: dict, names: dict[str, str]) -> dict:
    """`row` with other names for some keys; ValueError where a name is there already and says something."""
    found = {names[key]: value for key, value in row.items() if key in names}
    for key, value in row.items():
        if key in names or (key in found and is_absent(value)):
            continue
        if key in found:
            old = next(old for old, new in names.items() if new == key)
            raise ValueError(f"has both `{old}` and `{key}`: --columns says which one is meant")
        found[key] = value
    return found


def _mapped(row: dict, columns: dict[str, str]) -> dict:
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise ValueError(f"--columns: expected a column `{missing[0]}`, got {shown(list(row))}")
    own = {FIELDS[field]: row[column] for field, column in columns.items()}
    for key, value in row.items():
        if key in columns.values() or is_absent(value):
            continue
        if key in ("instruction", "input", "output", "system"):
            raise ValueError(f"--columns leaves out `{key}`, which is not empty: map it, or remove it")
        own.setdefault(key, value)
    return own


def _sharegpt(row: dict) -> dict:
    """`conversations` of {"from", "value"} as messages; some of them have {"role", "content"}."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"`conversations`: expected a list of messages, got {shown(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"message {number}: expected an object with `from` and `value`, got {shown(turn)}")
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"message {number}: expected from {', '.join(SPEAKERS)}; got {shown(speaker)}")
        content = turn.get("value", turn.get("content"))
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        messages.append({"role": SPEAKERS[speaker], "content": content, **rest})
    rest = {key: value for key, value in row.items() if key != "conversations"}
    if not is_absent(rest.get("messages")):
        raise ValueError("has both `conversations` and `messages`: one of the two layouts")
    return {**rest, "messages": messages}


def _pubmedqa(row: dict) -> dict:
    """The abstract is the context; the answer begins with its yes, no or maybe."""
    contexts, decision, answer = row.get("CONTEXTS") or [], row.get("final_decision"), row["LONG_ANSWER"]
    if not isinstance(contexts, list) or not all(isinstance(part, str) for part in contexts):
        raise ValueError(f"CONTEXTS: expected a list of texts, got {shown(contexts)}")
    if not is_absent(decision):
        if decision not in ("yes", "no", "maybe"):
            raise ValueError(f"final_decision: expected yes, no or maybe, got {shown(decision)}")
        if isinstance(answer, str) and not is_absent(answer):
            answer = f"{decision.capitalize()}. {answer}"
    used = ("QUESTION", "CONTEXTS", "final_decision", "LONG_ANSWER")
    rest = {key: value for key, value in row.items() if key not in used}
    return {"instruction": row["QUESTION"], "input": "\n".join(contexts), "output": answer, **rest}


@dataclass(frozen=True)
class Choice:
    """A row of multiple choice."""

    question: str  # with the context before it, where there is one
    options: dict[str, str]  # letter: text
    answer: str  # the right letter
    rest: dict  # what else the row says

    @property
    def asked(self) -> str:
        """The question with its options below: what training and `zerolite evaluate` ask."""
        return "\n".join([self.question, *(f"({letter}) {option}" for letter, option in self.options.items())])

    def reply(self, letter: str) -> str:
        """The answer that names an option, as it is trained."""
        return f"({letter}) {self.options[letter]}"


def choice_of(row: object) -> Choice:
    """A row with `question`, `options`, `answer` and maybe `context`; ValueError for any other one."""
    if not isinstance(row, dict) or not {"question", "options", "answer"} <= row.keys():
        got = shown(sorted(map(str, row))) if isinstance(row, dict) else shown(row)
        raise ValueError(f"expected `question`, `options` and `answer`, got {got}")
    question, options, answer = row["question"], row["options"], row["answer"]
    if isinstance(options, str):
        parts = OPTION.split(options)
        if parts[0].strip():
            raise ValueError(f"options: expected `(A) ...` lines, got {shown(options)}")
        letters = parts[1::2]
        if len(set(letters)) < len(letters):
            raise ValueError(f"options: names a letter twice: {shown(letters)}")
        options = dict(zip(letters, (part.strip() for part in parts[2::2]), strict=True))
    if not isinstance(options, dict) or not all(isinstance(o, str) and not is_absent(o) for o in options.values()):
        raise ValueError(f"options: expected a text for each letter, got {shown(options)}")
    if len(options) < 2:
        raise ValueError(f"options: expected at least two, got {shown(options)}")
    letter = answer.strip().strip("()") if isinstance(answer, str) else answer
    if not isinstance(letter, str) or letter not in options:
        raise ValueError(f"answer: expected a letter of {', '.join(options)}; got {shown(answer)}")
    if not isinstance(question, str) or is_absent(question):
        raise ValueError(f"question: expected a text, got {shown(question)}")
    context = row.get("context")
    if not is_absent(context) and not isinstance(context, str):
        raise ValueError(f"context: expected a text, got {shown(context)}")
    rest = {key: value for key, value in row.items() if key not in ("question", "options", "answer", "context")}
    return Choice(question if is_absent(context) else f"{context}\n{question}", options, letter, rest)


def _multiple_choice(row: dict) -> dict:
    """The options stand below the question; the answer is its letter and its text."""
    found = choice_of(row)
    return {"instruction": found.asked, "output": found.reply(found.answer), **found.rest}
