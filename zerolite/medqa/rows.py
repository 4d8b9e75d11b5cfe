"""One row as a checked conversation: which keys are used, which are refused by name, which are only counted.

A row is `{"instruction", "input", "output"}` (alpaca, with `history` and `system` where it has them) or
`{"messages": [{"role", "content"}, ...]}`: an optional system message, then user and assistant in turn. `{"text"}`
alone is a passage. null, NaN and texts without a visible character are absent, as tables that were joined write
them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerolite.medqa.images.files import ImageFile

PLACE = "<image>"  # where an image stands in a question, of a row that has images
ALPACA = ("instruction", "input", "output", "history")
# Told apart, but nothing is learned from them.
METADATA = ("id", "lang", "language", "source", "licence", "license", "provenance", "group", "pubid")
GROUP = ("group", "pubid")  # what rows of one document or disease share
# Keys that say something about what is to be learned, which nothing here reads: refused, unless they say nothing.
UNUSED = (
    "tools", "functions", "function_call", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking",
    "images", "image", "videos", "video", "audios", "audio", "documents", "context", "contexts", "passage", "chosen",
    "rejected", "kto_tag", "loss_mask", "options",
)  # fmt: skip
OF_MESSAGES = (*UNUSED, "name", "mask", "prefix")
SWITCHES = ("weight", "train", "trainable", "loss")  # of a message: whether it has loss
# Columns that a pair may stand in; --columns maps them.
PAIRS = (
    ("query", "response"), ("prompt", "response"), ("prompt", "completion"), ("prompt", "output"),
    ("instruction", "response"), ("Question", "Answer"), ("Instruction", "Output"), ("question", "answer"),
    ("input", "output"),
)  # fmt: skip
PROMPTS = ("system", "prompt", "query", "question", "Question", "Instruction")  # that a passage has no place for
KNOWN = {*ALPACA, *METADATA, *UNUSED, *SWITCHES, "messages", "system"}
INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Mn", "Me"}
FILLERS = "\u115f\u1160\u3164\uffa0\u2800\ufffd"  # letters and symbols by their category, but nothing to read
MARKER = re.compile(r"<(user|bot)>\s*[:：]")


@dataclass(frozen=True)
class Conversation:
    """One usable row: questions and answers in turn."""

    turns: tuple[tuple[str, str], ...]  # (question, answer), at least one
    system: str = ""
    trained: tuple[bool, ...] = ()  # whether each answer has loss, the last one always; (): all of them
    group: str = field(default="", compare=False, repr=False)  # the document or disease that it is of, if that is known
    images: tuple[ImageFile, ...] = ()  # in the places of the questions, as many as these

    @property
    def is_chinese(self) -> bool:
        """Whether the first question has a Chinese character."""
        return _is_chinese(self.turns[0][0])

    @property
    def language(self) -> str:
        """Of the first question: "zh" or, for every other one, "en"."""
        return "zh" if self.is_chinese else "en"

    def has_loss(self, turn: int) -> bool:
        """Whether the answer of a turn is learned."""
        return not self.trained or self.trained[turn]

    def part(self, start: int, stop: int | None = None) -> Conversation:
        """The turns of `start` to `stop`, with their images."""
        turns, trained = self.turns[start:stop], self.trained[start:stop]
        first, number = self.num_places(0, start), self.num_places(start, stop)
        return replace(self, turns=turns, trained=trained, images=self.images[first : first + number])

    def num_places(self, start: int, stop: int | None = None) -> int:
        """Images of the turns of `start` to `stop`; in a row without images the texts hold no place."""
        return sum(question.count(PLACE) for question, _ in self.turns[start:stop]) if self.images else 0


@dataclass(frozen=True)
class Passage:
    """One usable row of continued pretraining: a text that is learned whole."""

    text: str
    group: str = field(default="", compare=False, repr=False)

    @property
    def language(self) -> str:
        """As of a conversation."""
        return "zh" if _is_chinese(self.text) else "en"


Row = Conversation | Passage


def _is_chinese(text: str) -> bool:
    return re.search("[\u3400-\u9fff]", text) is not None


def usable(row: object, ignored: Counter[str] | None = None) -> Row:
    """As `conversation`, and a passage where a row has `text` and neither question nor answer."""
    if isinstance(row, dict) and "text" in row:
        if all(is_absent(row.get(key)) for key in (*ALPACA, "output", "messages")):
            return _passage(row, ignored)
    return conversation(row, ignored)


def _passage(row: dict, ignored: Counter[str] | None) -> Passage:
    for key in PROMPTS:
        if not is_absent(row.get(key)):
            raise ValueError(f"`{key}` beside `text`: a text is learned whole and has no prompt")
    _refuse(row, UNUSED, "")
    _check_switches(row)
    found = Passage(text(row["text"], "text"), _group(row))
    if ignored is not None:
        ignored.update(str(key) for key in row if key not in KNOWN and key != "text")
    return found


def _group(row: dict) -> str:
    """What rows of one document or disease share: rows of one group never stand on both sides of a split."""
    for key in GROUP:
        value = row.get(key)
        if is_absent(value):
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"{key}: expected a text or a whole number, got {shown(value)}")
        return text(str(value), key)
    return ""


def conversation(row: object, ignored: Counter[str] | None = None) -> Conversation:
    """What a row says. `ignored` counts its keys that are not used.

    Raises ValueError for a row that is not usable, with the reason.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    has_messages = not is_absent(row.get("messages"))
    other = next((key for key in ("output", *ALPACA) if not is_absent(row.get(key))), None)
    if has_messages and other:
        raise ValueError(f"has both `messages` and `{other}`: one of the two layouts")
    is_dialogue = has_messages or (other is None and "messages" in row)
    if not is_dialogue and not ("instruction" in row and "output" in row):
        expected = "expected keys `instruction` and `output`, or `messages`"
        raise ValueError(f"{expected}; got {shown(sorted(row))}{_hint(row)}")
    _refuse(row, UNUSED, "")
    _check_switches(row)
    found = _from_messages(row, ignored) if is_dialogue else _from_alpaca(row)
    if ignored is not None:
        ignored.update(str(key) for key in row if key not in KNOWN)
    return found


def _check_switches(row: dict) -> None:
    for key in SWITCHES:
        if not is_absent(row.get(key)) and row[key] != 1:
            raise ValueError(f"`{key}` of a row is not used: expected 1 or none, got {shown(row[key])}")


def _hint(row: dict) -> str:
    """How a row of another layout can be read."""
    if "conversations" in row:
        return ": ShareGPT, which `zerolite.medqa.prepare` and train_medqa.py read"
    if "chosen" in row and "rejected" in row:
        return ": pairs of preferences are not learned from"
    if "text" in row:
        return ": a text to be learned whole is neither question nor answer"
    for question, answer in PAIRS:
        if question in row and answer in row:
            return f": --columns question={question},answer={answer} says what they are"
    return ""


def _refuse(row: dict, unused: tuple[str, ...], where: str) -> None:
    """ValueError for a key that carries meaning and is not used, unless it is empty."""
    for key in unused:
        if key in row and not is_absent(row[key]):
            hint = "; --image_folder FOLDER reads images" if key in ("image", "images") else ""
            raise ValueError(f"{where}`{key}` is not used, and the row may mean another thing without it{hint}")


def _from_alpaca(row: dict) -> Conversation:
    question = text(row["instruction"], "instruction")
    if not is_absent(row.get("input")):
        question += "\n" + text(row["input"], "input")
    answer = text(row["output"], "output")
    turns = [] if is_absent(row.get("history")) else _history(row["history"])
    if question.startswith("<user>"):
        *earlier, (question, _) = _dialogue(question)
        turns += earlier
    return Conversation((*turns, (question, answer)), _system(row), group=_group(row))


def _history(history: object) -> list[tuple[str, str]]:
    if not isinstance(history, list):
        raise ValueError(f"history: expected a list of [question, answer], got {shown(history)}")
    turns = []
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history {number}: expected [question, answer], got {shown(turn)}")
        turns.append((text(turn[0], f"history {number}: question"), text(turn[1], f"history {number}: answer")))
    return turns


def _dialogue(question: str) -> list[tuple[str, str]]:
    """Turns of Huatuo's ` <user>: … <bot>: … <user>: …`; the last one has no answer yet."""
    parts = MARKER.split(question)
    roles, texts = parts[1::2], [part.strip() for part in parts[2::2]]
    if parts[0].strip() or len(roles) % 2 == 0 or roles != (["user", "bot"] * len(roles))[: len(roles)]:
        raise ValueError(f"instruction: expected <user>: and <bot>: in turn, ending with <user>:, got {shown(roles)}")
    texts = [text(part, f"instruction: <{role}>") for role, part in zip(roles, texts, strict=True)]
    return list(zip(texts[::2], [*texts[1::2], ""], strict=True))


def _system(row: dict) -> str:
    return "" if is_absent(row.get("system")) else text(row["system"], "system")


def _from_messages(row: dict, ignored: Counter[str] | None) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages`: expected a list of at least one message, got {shown(messages)}")
    roles, texts, trained, system = [], [], [], _system(row)
    for number, message in enumerate(messages):
        where = f"message {number}: "
        if not isinstance(message, dict):
            raise ValueError(f"{where}expected an object with `role` and `content`, got {shown(message)}")
        _refuse(message, OF_MESSAGES, where)
        role, content = message.get("role"), message.get("content")
        if ignored is not None:
            ignored.update(
                f"messages: {key}" for key in message if key not in ("role", "content", *SWITCHES, *OF_MESSAGES)
            )
        is_trained = _is_trained(message, role, where)
        if number == 0 and role == "system":
            content = "" if is_absent(content) else text(content, f"{where}`content`")
            if system and content and system != content:
                raise ValueError("has both a `system` and a system message, with different texts")
            system = system or content
            continue
        roles.append(role)
        texts.append(text(content, f"{where}`content`"))
        trained += [is_trained] if role == "assistant" else []
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        got = shown([message.get("role") for message in messages])
        raise ValueError(f"expected roles [system,] user, assistant, user, assistant ..., got {got}")
    if not any(trained):
        raise ValueError("no answer of the row has loss: each has weight 0 or train false")
    while not trained[-1]:  # nothing is learned behind the last answer that has loss
        trained.pop()
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))[: len(trained)]
    return Conversation(turns, system, () if all(trained) else tuple(trained), _group(row))


def _is_trained(message: dict, role: object, where: str) -> bool:
    """Whether a message has loss, by its switches; an answer has it where none of them is given."""
    given = {key: message[key] for key in SWITCHES if not is_absent(message.get(key))}
    for key, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"{where}`{key}`: expected 0 or 1, false or true, got {shown(value)}")
        if value and role != "assistant" and key != "weight":
            raise ValueError(f"{where}`{key}` asks for loss on a {role} message: only answers are learned")
    if role != "assistant":
        given.pop("weight", None)  # 1 is what exporters put on every message
    if len({bool(value) for value in given.values()}) > 1:
        raise ValueError(f"{where}{' and '.join(f'`{key}`' for key in given)} contradict each other")
    return all(given.values())


def is_absent(value: object) -> bool:
    """Whether a value says nothing: null, NaN, a text or a list without anything in it."""
    if isinstance(value, str):
        return not is_visible(value)
    return value is None or value != value or (isinstance(value, (list, dict)) and not value)


def is_visible(value: str) -> bool:
    """Whether a text has a character that a person would see."""
    return any(
        character not in FILLERS and unicodedata.category(character) not in INVISIBLE or character == "\x00"
        for character in value
    )


def text(value: object, name: str) -> str:
    """`value` without white space at its ends, if it is a text that can be learned from."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {shown(value)}")
    if "\x00" in value:
        raise ValueError(f"{name}: holds a NUL character (column {value.index(chr(0)) + 1} of the text)")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: holds half a surrogate pair (column {error.start + 1} of the text)") from None
    if not is_visible(value):
        raise ValueError(f"{name}: is empty" if not value.strip() else f"{name}: is empty but for invisible characters")
    return value.strip()


def shown(value: object) -> str:
    """A value as JSON of at most 80 characters, for messages."""
    try:
        found = json.dumps(value, ensure_ascii=True)
    except (RecursionError, TypeError):  # it gives up a level before json.loads; a table's values are any type
        return f"a deeply nested {type(value).__name__}" if isinstance(value, (list, dict)) else repr(value)[:80]
    return found if len(found) <= 80 else found[:77] + "..."
