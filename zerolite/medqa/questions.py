"""Files of questions in, files of answers out: what is answered already is not asked again.

A row of JSONL or of a JSON array is a text, or an object with `question`, `instruction` (and `input`) or `messages`,
with `system` and `history` where it has them; any other file has a question a line. A row of answers names what gave
it, so that a file never holds answers of two models or settings.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from zerolite import DataError
from zerolite.medqa import json_rows
from zerolite.medqa.answers import NOTICE
from zerolite.medqa.data import Conversation
from zerolite.medqa.generation import Reply, Settings, replies
from zerolite.medqa.images import rows as image_rows
from zerolite.medqa.opening import Opened

TABLES = (".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".xml", ".gz")  # read as lines, their markup would be asked
UNUSED = ("tools", "functions", "images", "image", "audios", "videos")  # what a question may mean by them is not asked


def read_questions(file: Path, system: str, image_folder: Path | None = None) -> list[Conversation]:
    """The conversations whose last questions are to be answered; `system`: of those that have none.

    image_folder: of the images that rows name; None: no row has any.
    Raises DataError with file and line for the first row that is no question.
    """
    if file.suffix.lower() in TABLES:
        raise DataError(f"{file}: expected .jsonl, .json, or a text with a question a line; got {file.suffix}")
    reads = None if image_folder is None else image_rows.reader(image_folder)
    rows = json_rows.rows(file) if file.suffix in (".json", ".jsonl") else _lines(file)
    found = []
    for line, value in rows:
        try:
            row, images = image_rows.apart(value()) if reads is not None else (value(), [])
            one = _conversation(row, system)
            found.append(one if reads is None else image_rows.with_images(one, [reads(name) for name in images]))
        except ValueError as error:
            raise DataError(f"{file}, line {line}: {error}") from None
    if not found:
        raise DataError(f"{file}: no question in it")
    return found


def _lines(file: Path) -> Iterator[tuple[int, object]]:
    def text(line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line); save it as UTF-8") from None

    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, lambda line=line: text(line)


def _conversation(row: object, system: str) -> Conversation:
    if isinstance(row, str):
        return Conversation(((question_of(row, "question"), ""),), system)
    if not isinstance(row, dict):
        raise ValueError(f"expected a text or an object, got {type(row).__name__}")
    if unused := [name for name in UNUSED if row.get(name)]:
        hint = "; --image_folder FOLDER reads images" if "images" in unused or "image" in unused else ""
        raise ValueError(f"{', '.join(unused)}: a model is asked in texts alone{hint}")
    kinds = [name for name in ("question", "instruction", "messages") if row.get(name) is not None]
    if len(kinds) != 1:
        raise ValueError(f"expected one of `question`, `instruction`, `messages`; got {kinds or sorted(row)[:8]}")
    system = question_of(row["system"], "system") if row.get("system") else system
    if kinds == ["messages"]:
        return _from_messages(row["messages"], system)
    question = question_of(row[kinds[0]], kinds[0])
    if row.get("input"):
        question += "\n" + question_of(row["input"], "input")
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise ValueError("history: expected a list of [question, answer]")
    turns = [(question_of(asked, "history"), question_of(said, "history")) for asked, said in history]
    return Conversation((*turns, (question, "")), system)


def _from_messages(messages: object, system: str) -> Conversation:
    """Of a dialogue that ends in an answer, as a row of training does, the last question."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("messages: expected a list of objects with `role` and `content`")
    texts = [(one.get("role"), question_of(one.get("content"), "content")) for one in messages]
    if texts and texts[0][0] == "system":
        system = texts.pop(0)[1]
    if texts and texts[-1][0] == "assistant":
        texts.pop()
    roles = [role for role, _ in texts]
    if len(texts) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ValueError(f"messages: expected roles [system,] user, assistant, ..., user; got {roles}")
    texts = [*(text for _, text in texts), ""]
    return Conversation(tuple(zip(texts[::2], texts[1::2], strict=True)), system)


def question_of(value: object, name: str) -> str:
    """A text without the white space around it; ValueError where it is none, is empty or cannot be encoded."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected a text, got {'an empty one' if isinstance(value, str) else repr(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name}: holds half a surrogate pair, which is no character") from None
    if "\x00" in value:
        raise ValueError(f"{name}: holds a NUL character")
    return value.strip()


# --- answers --------------------------------------------------------------------------------------------------------


class AnswersFile:
    """The rows of an answers file, of one model and one choice of settings; new ones are appended as they come."""

    def __init__(self, file: Path):
        """Read what is there. Raises ValueError where that is no file of answers, or there is no folder for it."""
        self.file = file
        self.rows: list[dict] = []
        self.num_bytes = 0  # of whole rows: what a kill left behind them is no row
        if not file.parent.is_dir():
            raise ValueError(f"--answers {file}: there is no folder {file.parent}")
        if file.is_dir():
            raise ValueError(f"--answers {file}: is a folder, expected a file")
        if file.exists():
            self._read()

    def _read(self) -> None:
        content = self.file.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                key_of_row(row), row["answer"], row["source"]  # noqa: B018
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(
                    f"--answers {self.file}, line {number}: is no row of answers; name a new file"
                ) from None
            self.rows.append(row)
        self.num_bytes = content.rfind(b"\n") + 1
        if not self.rows and content.strip():
            raise ValueError(f"--answers {self.file}: is no file of answers; name a new file")

    def left(self, questions: Sequence[Conversation], source: dict) -> list[Conversation]:
        """Those without an answer. Raises ValueError where the rows are of another source than `source`."""
        for number, row in enumerate(self.rows, start=1):
            if other := [name for name in source if row["source"].get(name) != source[name]]:
                told = ", ".join(f"{name} was {row['source'].get(name)} and is {source[name]}" for name in other)
                raise ValueError(f"--answers {self.file}, line {number}: {told}; name a new file")
        answered = Counter(key_of_row(row) for row in self.rows)
        found = []
        for one in questions:
            if answered[key_of(one)]:
                answered[key_of(one)] -= 1
            else:
                found.append(one)
        return found

    def append(self, questions: Sequence[Conversation], opened: Opened, settings: Settings, batch_size: int) -> int:
        """Ask and write, batch after batch; how many answers were written. ValueError where another run writes it."""
        source, num_written = source_of(opened, settings), 0
        with open(self.file, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--answers {self.file}: another run is writing it") from None
            file.truncate(self.num_bytes)
            for start in range(0, len(questions), batch_size):
                batch = questions[start : start + batch_size]
                for one, found in zip(batch, replies(opened, batch, settings), strict=True):
                    row = json.dumps(row_of(one, found, opened, source), ensure_ascii=False)
                    file.write(row.encode() + b"\n")
                    num_written += 1
                file.flush()
                os.fsync(file.fileno())
        return num_written


def source_of(opened: Opened, settings: Settings) -> dict:
    """What answers depend on, beside the question."""
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    chosen = {**asdict(settings), "max_new_tokens": settings.longest(opened.room), "precision": dtype}
    template = hashlib.sha256(opened.tokenizer.chat_template.encode()).hexdigest()[:16]
    return {"weights": opened.print, "template": template, **chosen}


def row_of(conversation: Conversation, found: Reply, opened: Opened, source: dict) -> dict:
    row = {"question": conversation.turns[-1][0], "answer": found.text, "is_cut": found.is_cut}
    if len(conversation.turns) > 1 or conversation.system:
        row["system"], row["history"] = conversation.system, [list(turn) for turn in conversation.turns[:-1]]
    if conversation.images:
        row["images"] = [image.digest for image in conversation.images]
    if found.prompt.loss:
        row["left_out"] = found.prompt.loss
    template = opened.told.removeprefix("chat template: ")
    return {**row, "model": str(opened.folder), "template": template, "source": source, "notice": NOTICE}


def key_of(conversation: Conversation) -> str:
    images = [image.digest for image in conversation.images]
    return json.dumps([conversation.system, conversation.turns[:-1], conversation.turns[-1][0], images])


def key_of_row(row: dict) -> str:
    return json.dumps([row.get("system", ""), row.get("history", []), row["question"], row.get("images", [])])
