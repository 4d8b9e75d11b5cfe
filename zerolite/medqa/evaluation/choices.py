"""Multiple choice: rows in, what is scored of each, which option the likelihoods choose.

Two ways to ask, as OLMES (Gu et al., 2024) has them:
- by letter: the question with its options below, as it is trained; `(A`, `(B` ... are scored, the beginnings of the
  trained answers `(A) text`;
- by text: the question alone; the texts of the options are scored.
`acc` takes the likeliest option, `acc_norm` the likeliest by character and `acc_bytes` by byte of UTF-8, as lm-eval
0.4.13 does. What ends an answer is not scored.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from zerolite import DataError
from zerolite.medqa import readers
from zerolite.medqa.data import Conversation, Reject
from zerolite.medqa.evaluation.scoring import Scored
from zerolite.medqa.layouts import Choice, choice_of
from zerolite.medqa.prompts import IGNORED, Example, tokens_within

WAYS = ("letter", "text")
YES_NO_MAYBE = "yes/no/maybe"


@dataclass(frozen=True)
class Question:
    """A usable row of multiple choice."""

    choice: Choice

    @property
    def language(self) -> str:
        return Conversation(((self.choice.asked, ""),)).language

    @property
    def kind(self) -> str:
        texts = {option.strip().lower() for option in self.choice.options.values()}
        return YES_NO_MAYBE if texts == {"yes", "no", "maybe"} else f"{len(self.choice.options)} options"

    @property
    def gold(self) -> int:
        """The number of the right option, from 0."""
        return list(self.choice.options).index(self.choice.answer)

    def continuations(self, way: str) -> list[str]:
        """What is scored, in the order of the options."""
        if way == "letter":
            return [f"({letter}" for letter in self.choice.options]
        return [option.strip() for option in self.choice.options.values()]

    def asked(self, way: str) -> str:
        return self.choice.asked if way == "letter" else self.choice.question


def read(file: Path, skip_invalid: bool, max_samples: int | None) -> tuple[list[Question], list[Reject]]:
    """The questions of a file in order, the first `max_samples` at most, and what is not usable.

    Raises DataError for the first row that is no question, unless `skip_invalid`, and for a file without a question.
    """
    found: list[Question] = []
    rejected: list[Reject] = []
    for line, value in readers.as_written(file):
        if len(found) == max_samples:
            break
        try:
            found.append(Question(choice_of(value())))
        except ValueError as error:
            rejected.append(Reject(str(file), line, str(error)))
            if not skip_invalid:
                raise DataError(f"{rejected[-1]} (--skip_invalid leaves such rows out)") from None
    if not found:
        raise DataError(f"{file}: no question of multiple choice in it, {len(rejected)} rows rejected")
    return found, rejected


@dataclass(frozen=True)
class Candidates:
    """What is scored of a question: options whose ids differ in the last one alone share a forward pass."""

    scored: list[Scored]
    options: list[tuple[int, ...]]  # of each `scored`, the options of its endings
    is_shortened: bool


def candidates(
    question: Question, way: str, tokenizer: PreTrainedTokenizerBase, room: int, system: str = ""
) -> Candidates:
    """Raises ValueError for a question that the template changes or that leaves an option no room."""
    groups: dict[bytes, list[tuple[int, Example]]] = {}
    is_shortened = False
    for number, text in enumerate(question.continuations(way)):
        conversation = Conversation(((question.asked(way), text),), system)
        fitted, tokens = tokens_within(conversation, tokenizer, room)
        is_shortened = is_shortened or fitted != conversation
        if fitted.turns[0][1] != text:
            raise ValueError(
                f"question {question.choice.question[:60]!r}: {room} tokens have no room for {text[:60]!r}"
            )
        ((begin, end),) = [(b, e) for segment, b, e in tokens.spans() if segment.slot == ("answer", 0)]
        inside = np.flatnonzero(tokens.of(begin, end))
        ids = tokens.ids[: inside[-1] + 1]
        labels = np.full(len(ids), IGNORED, np.int32)
        labels[inside] = ids[inside]
        groups.setdefault(ids[:-1].tobytes(), []).append((number, Example(ids, labels)))
    return Candidates(
        [Scored(group[0][1], tuple(int(one.input_ids[-1]) for _, one in group)) for group in groups.values()],
        [tuple(number for number, _ in group) for group in groups.values()],
        is_shortened,
    )


def is_right(question: Question, way: str, log_likelihoods: list[float]) -> dict[str, int]:
    """`acc`, `acc_norm` and `acc_bytes` of one question: 1 where the right option is the likeliest, else 0."""
    texts, found = question.continuations(way), np.asarray(log_likelihoods)
    lengths = {"acc": 1.0, "acc_norm": [len(t) for t in texts], "acc_bytes": [len(t.encode()) for t in texts]}
    return {name: int(np.argmax(found / np.asarray(length)) == question.gold) for name, length in lengths.items()}


def majority(questions: list[Question]) -> float:
    """The share that a model gets right which always says what is right most often: a letter, or yes, no or maybe."""
    golds = [
        q.choice.options[q.choice.answer].strip().lower() if q.kind == YES_NO_MAYBE else q.choice.answer
        for q in questions
    ]
    return max(golds.count(gold) for gold in set(golds)) / len(golds)


def by_chance(questions: list[Question]) -> float:
    return sum(1 / len(q.choice.options) for q in questions) / len(questions)


def groups(questions: list[Question]) -> dict[tuple[str, str], list[int]]:
    """(kind, language): the numbers of its questions; then of all, where there are several."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, question in enumerate(questions):
        found.setdefault((question.kind, question.language), []).append(number)
    found = dict(sorted(found.items()))
    return found | ({("all", "all"): list(range(len(questions)))} if len(found) > 1 else {})
