"""What one model makes of the rows of an evaluation, row by row: losses, answers, choices, safety questions."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Conversation
from zerolite.medqa.evaluation import choices
from zerolite.medqa.evaluation.choices import Candidates, Question
from zerolite.medqa.evaluation.scoring import Scored, scores
from zerolite.medqa.evaluation.sharing import on_ranks
from zerolite.medqa.generation import Settings, end_ids, replies
from zerolite.medqa.opening import Opened
from zerolite.medqa.processes import Processes
from zerolite.medqa.prompts import encode, prompt_of

SAFETY = CORPUS / "safety.jsonl"


@dataclass(frozen=True)
class Work:
    """What every model of an evaluation is asked."""

    rows: list[Conversation]
    answered: list[int]  # numbers of the rows whose last question is answered
    questions: list[Question]
    safety: list[dict[str, str]]
    batch_rows: int
    cutoff_len: int  # token ids of a row, where the model reads so many
    settings: Settings


@dataclass
class Measured:
    """Of one model: the results of `Work`, in its order."""

    losses: list[dict[str, Any]] = field(default_factory=list)  # loss (nats, a sum), labels, right
    answers: list[dict[str, Any]] = field(default_factory=list)  # text, is_cut, left_out
    choices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # way: log_likelihoods, right
    safety: list[dict[str, Any]] = field(default_factory=list)  # as answers
    num_shortened: dict[str, int] = field(default_factory=dict)  # rows that had no room


def safety_questions(file: Path = SAFETY) -> list[dict[str, str]]:
    """`kind`, `language` and `question` of each: what is listed, with what the model says, and not scored."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def with_system(rows: list[Conversation], system: str) -> list[Conversation]:
    """Rows with a system text where they have none."""
    return [replace(row, system=row.system or system) for row in rows]


def measure(opened: Opened, work: Work, system: str, ranks: Processes) -> Measured:
    """The model's results, the same on every rank. Every rank must call it.

    Raises ValueError for a row that its template or tokenizer changes.
    """
    found = Measured()
    room = min(opened.room, work.cutoff_len)
    rows = with_system(work.rows, system)
    if rows:
        found.losses, found.num_shortened["loss"] = _losses(opened, rows, room, work, ranks)
        asked = [rows[number] for number in work.answered]
        found.answers = _answers(opened, asked, work, ranks, "answers")
        found.num_shortened["answers"] = sum(bool(one["left_out"]) for one in found.answers)
    for way in choices.WAYS if work.questions else ():
        found.choices[way], found.num_shortened[f"choices by {way}"] = _choices(
            opened, work.questions, way, room, system, work, ranks
        )
    asked = [Conversation(((one["question"], ""),), system) for one in work.safety]
    found.safety = _answers(opened, asked, work, ranks, "safety questions")
    return found


def _losses(opened: Opened, rows: list[Conversation], room: int, work: Work, ranks: Processes) -> tuple[list, int]:
    """Of the tokens that training learns from: answers, and what ends them."""
    examples, num_shortened = encode(rows, opened.tokenizer, room)
    score = _scorer(opened)

    def batch(scored: list[Scored]) -> list[dict]:
        return [
            {"loss": -one.log_likelihoods[0], "labels": one.num_labels, "right": one.num_right} for one in score(scored)
        ]

    lengths = [len(example.input_ids) for example in examples]
    found = on_ranks([*map(Scored, examples)], lengths, work.batch_rows, batch, ranks, "losses")
    _expect_finite(opened, [row["loss"] for row in found])
    return found, num_shortened


def _expect_finite(opened: Opened, values: Iterable[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{opened.folder}: its losses are not finite: its weights hold NaN or Inf, or overflow")


def _choices(
    opened: Opened, questions: list[Question], way: str, room: int, system: str, work: Work, ranks: Processes
) -> tuple[list, int]:
    of_each = [choices.candidates(question, way, opened.tokenizer, room, system) for question in questions]
    scored = [one for candidates in of_each for one in candidates.scored]
    score = _scorer(opened)
    found = iter(
        on_ranks(
            scored,
            [len(one.example.input_ids) for one in scored],
            work.batch_rows,
            lambda batch: [one.log_likelihoods for one in score(batch)],
            ranks,
            f"choices by {way}",
        )
    )
    rows = []
    for question, candidates in zip(questions, of_each, strict=True):
        values = _in_order(candidates, [next(found) for _ in candidates.scored])
        _expect_finite(opened, values)
        rows.append({"log_likelihoods": values, "right": choices.is_right(question, way, values)})
    return rows, sum(candidates.is_shortened for candidates in of_each)


def _in_order(candidates: Candidates, found: list[list[float]]) -> list[float]:
    """A log likelihood for each option, in the order of the options."""
    pairs = [
        pair
        for options, values in zip(candidates.options, found, strict=True)
        for pair in zip(options, values, strict=True)
    ]
    return [value for _, value in sorted(pairs)]


def _scorer(opened: Opened) -> Callable[[list[Scored]], list]:
    pad = opened.tokenizer.pad_token_id
    pad = end_ids(opened.tokenizer, opened.model)[0] if pad is None else pad
    return lambda batch: scores(opened.model, batch, pad)


def _answers(opened: Opened, asked: list[Conversation], work: Work, ranks: Processes, told: str) -> list[dict]:
    if not asked:
        return []
    if len({bool(one.images) for one in asked}) > 1:  # apart: at stage 3 ranks run the same part of a model
        seen, plain = ([one for one in asked if bool(one.images) is has] for has in (True, False))
        found = {
            True: iter(_answers(opened, seen, work, ranks, f"{told} about images")),
            False: iter(_answers(opened, plain, work, ranks, told)),
        }
        return [next(found[bool(one.images)]) for one in asked]
    room = opened.room - work.settings.longest(opened.room)
    lengths = [len(prompt_of(one, opened.tokenizer, room).ids) for one in asked]

    def batch(conversations: list[Conversation]) -> list[dict]:
        return [
            {"text": one.text, "is_cut": one.is_cut, "left_out": one.prompt.loss}
            for one in replies(opened, conversations, work.settings)
        ]

    return on_ranks(asked, lengths, work.batch_rows, batch, ranks, told)
