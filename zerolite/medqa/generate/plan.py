"""What is asked: the list of requests, which depends on the seed and the files alone.

Request number n is drawn from the seed and n, so a longer list begins with the shorter one.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zerolite import DataError
from zerolite.medqa import data, json_rows, readers
from zerolite.medqa.generate import prompts
from zerolite.medqa.generate.prompts import Prompt
from zerolite.medqa.rows import Conversation, is_absent, text
from zerolite.medqa.similar import tokens_of

KINDS = ("self_instruct", "dialogue", "passage")
LANGUAGES = ("en", "zh")
SHIPPED_SEEDS = Path(__file__).with_name("seeds.jsonl")
NUM_EXAMPLES = 3  # of seed tasks in a prompt of self-instruct
NUM_ITEMS = {"self_instruct": 4, "dialogue": 1, "passage": 3}
LONGEST_PASSAGE = 1200  # tokens of similar.tokens_of; a longer text is cut at blank lines and ends of sentences


@dataclass(frozen=True)
class Passage:
    """A text that questions are made of."""

    place: str  # file, line and part
    text: str
    source: str
    licence: str
    language: str


@dataclass(frozen=True)
class Request:
    """One request of the plan, or the check of its answer."""

    id: str
    kind: str
    language: str
    messages: tuple[dict[str, str], ...]
    prompt: Prompt
    made_of: tuple[str, ...]  # seed tasks or the passage
    passage: Passage | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What requests depend on. Raises ValueError for kinds that lack their seed tasks or passages."""

    seed: int
    kinds: Sequence[str]
    languages: Sequence[str]
    seeds: Sequence[Conversation]
    passages: Sequence[Passage]
    prompts: Path | None  # a folder

    def __post_init__(self) -> None:
        for language in self.languages:
            if {"self_instruct", "dialogue"} & set(self.kinds) and not self.seeds_of(language):
                raise ValueError(f"--seed_file: has no row of language {language}")
        if "passage" in self.kinds and not self.passages_of:
            raise ValueError("the kind passage needs --passage_file, with texts of the --languages that are asked for")
        self.prompt("check", self.languages[0])
        for kind in self.kinds:
            for language in self.languages:
                self.prompt(kind, language)

    @functools.cache  # noqa: B019, one plan a process
    def prompt(self, kind: str, language: str) -> Prompt:
        return prompts.load(kind, language, self.prompts)

    @functools.cache  # noqa: B019
    def personas(self, language: str) -> list[str]:
        return prompts.personas(language, self.prompts)

    @functools.cache  # noqa: B019
    def seeds_of(self, language: str) -> list[tuple[int, Conversation]]:
        return [(number, row) for number, row in enumerate(self.seeds, start=1) if row.language == language]

    @functools.cached_property
    def passages_of(self) -> list[Passage]:
        return [passage for passage in self.passages if passage.language in self.languages]

    def fingerprint(self) -> dict[str, object]:
        """What must be the same when a run goes on."""
        names = [(kind, language) for kind in (*self.kinds, "check") for language in self.languages]
        return {
            "seed": self.seed,
            "kinds": list(self.kinds),
            "languages": list(self.languages),
            "seed_tasks": _digest([row.turns for row in self.seeds]),
            "passages": _digest([passage.text for passage in self.passages]),
            "prompts": {".".join(name): self.prompt(*name).digest for name in names},
            "personas": _digest([self.personas(language) for language in self.languages]),
        }

    def requests(self, number: int) -> Iterator[Request]:
        """The first `number` requests: kinds in turn, each in every language before the kind comes again."""
        for index in range(number):
            kind = self.kinds[index % len(self.kinds)]
            turn = index // len(self.kinds)
            draw = random.Random(f"{self.seed}/{index}")
            language = self.languages[turn % len(self.languages)]
            yield (
                self._of_passage(index, turn, draw)
                if kind == "passage"
                else self._of_seeds(index, kind, language, draw)
            )

    def _of_seeds(self, index: int, kind: str, language: str, draw: random.Random) -> Request:
        seeds = self.seeds_of(language)
        chosen = draw.sample(seeds, min(len(seeds), NUM_EXAMPLES if kind == "self_instruct" else 1))
        count, persona = str(NUM_ITEMS[kind]), draw.choice(self.personas(language))
        prompt = self.prompt(kind, language)
        messages = prompt.messages(examples=_examples([row for _, row in chosen]), count=count, persona=persona)
        made_of = tuple(f"seed {number}" for number, _ in chosen)
        return Request(f"{index:06d}-{kind}-{language}", kind, language, messages, prompt, made_of)

    def _of_passage(self, index: int, turn: int, draw: random.Random) -> Request:
        passage = self.passages_of[turn % len(self.passages_of)]
        language = passage.language
        count, persona = str(NUM_ITEMS["passage"]), draw.choice(self.personas(language))
        prompt = self.prompt("passage", language)
        messages = prompt.messages(passage=passage.text, count=count, persona=persona)
        name = f"{index:06d}-passage-{language}"
        return Request(name, "passage", language, messages, prompt, (passage.place,), passage)

    def check(self, request: Request, pairs: Sequence[tuple[str, str]]) -> Request:
        """The request that asks whether answers to a passage's questions follow from it."""
        assert request.passage is not None
        prompt = self.prompt("check", request.language)
        examples = "\n\n".join(f"{n}. {question}\n   {answer}" for n, (question, answer) in enumerate(pairs, start=1))
        words = {"passage": request.passage.text, "examples": examples, "count": str(len(pairs)), "persona": ""}
        messages = prompt.messages(**words)
        return Request(f"{request.id}-check", "check", request.language, messages, prompt, (request.id,))


def _examples(rows: Sequence[Conversation]) -> str:
    pairs = [{"question": row.turns[0][0], "answer": row.turns[0][1]} for row in rows]
    return "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_conversations(files: Sequence[Path]) -> list[Conversation]:
    """Seed tasks or evaluation rows, of any layout. Raises DataError for a row that is not usable."""
    return data.read(list(files), rows_of=readers.rows).kept


def read_passages(files: Sequence[Path], licence: str) -> list[Passage]:
    """Texts of JSONL rows with `text` (and source, licence, language), or the paragraphs of any other text in UTF-8.

    Raises DataError with file and line for a row that is none, and for a file without a text.
    """
    found = []
    for file in files:
        before = len(found)
        rows = json_rows.rows(file) if file.suffix in (".json", ".jsonl") else [(1, lambda file=file: _whole(file))]
        for line, value in rows:
            try:
                row = value()
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object with `text`, got {type(row).__name__}")
                content = text(row.get("text"), "text")
                said = {
                    name: text(row[name], name)
                    for name in ("source", "licence", "language")
                    if not is_absent(row.get(name))
                }
            except ValueError as error:
                raise DataError(f"{file}, line {line}: {error}") from None
            for number, part in enumerate(_parts(content), start=1):
                language = said.get("language") or _language(part)
                place = f"{file.name}, line {line}, part {number}"
                found.append(
                    Passage(place, part, said.get("source", file.name), said.get("licence", licence), language)
                )
        if len(found) == before:
            raise DataError(f"{file}: no passage in it")
    return found


def _whole(file: Path) -> dict[str, str]:
    try:
        return {"text": file.read_text(encoding="utf-8-sig")}
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None


def _language(passage: str) -> str:
    tokens = tokens_of(passage)
    return "zh" if 2 * sum(len(token) == 1 and not token.isascii() for token in tokens) > len(tokens) else "en"


def _parts(content: str) -> Iterator[str]:
    """A text in runs of whole paragraphs, or sentences of a long one, up to the longest passage."""
    units: list[str] = []
    for paragraph in re.split(r"(?<=\n)\s*\n", content):
        is_long = len(tokens_of(paragraph)) > LONGEST_PASSAGE
        units += re.split(r"(?<=[。！？])|(?<=[.!?]\s)", paragraph) if is_long else [paragraph + "\n"]
    part, length = "", 0
    for unit in units:
        size = len(tokens_of(unit))
        if part.strip() and length + size > LONGEST_PASSAGE:
            yield part.strip()
            part, length = "", 0
        part, length = part + unit, length + size
    if tokens_of(part):
        yield part.strip()
