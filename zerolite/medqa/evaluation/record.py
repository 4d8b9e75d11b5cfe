"""The one source of `evaluation.json`, `evaluation.md` and `evaluation.html`: what was measured, as tables of rows."""

import math
from dataclasses import dataclass, field
from typing import Any

from zerolite.medqa.answers import CUT_OFF
from zerolite.medqa.evaluation import choices, intervals, texts
from zerolite.medqa.evaluation.measure import Measured, Work

MODEL, BASE = "model", "base"
NO_DIFFERENCE = "no difference shown"
LEAST_ROWS, TOO_FEW = 20, "too few rows to say"  # a bootstrap of a handful of rows is far too sure
NOT_COMPARED = (
    "losses a token are not compared: the tokenizers or templates of the two models make other label tokens of the rows"
)


@dataclass
class Evaluation:
    """All of an evaluation, in JSON's types. Rows of tables name whose they are in `of`: "model" or "base"."""

    notice: list[str]
    run: dict[str, Any]  # command, date, machine, duration, ranks: all that another run may have otherwise
    versions: dict[str, str]
    models: dict[str, dict[str, Any]]  # "model", and "base" where there is one: folder, template, precision, ...
    settings: dict[str, Any]
    data: list[dict[str, Any]]  # files: read, rejected, used
    notes: list[str] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    comparison: list[dict[str, Any]] = field(default_factory=list)
    safety: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)


def fill(found: Evaluation, work: Work, measured: dict[str, Measured]) -> None:
    """Add the tables. measured: of the model, and of its base where there is one."""
    for of, one in measured.items():
        found.losses += [{"of": of, **row} for row in _losses(work, one)]
        found.choices += [{"of": of, **row} for row in _choices(work, one)]
        shortened = {name: number for name, number in one.num_shortened.items() if number}
        if shortened:
            told = ", ".join(f"{number} of {name}" for name, number in shortened.items())
            found.notes.append(f"{of}: rows shortened, since the model or --cutoff_len has no room for them: {told}")
    languages = sorted({work.rows[number].language for number in work.answered})
    rouges = {of: _rouges(work, one, languages) for of, one in measured.items()}
    for of, one in measured.items():
        found.texts += [{"of": of, **row} for row in _texts(work, one, rouges[of], languages)]
    if BASE in measured:
        found.comparison = _comparison(work, measured, rouges, found.notes)
    found.safety = [
        {**question, **{of: one.safety[number]["text"] for of, one in measured.items()}}
        for number, question in enumerate(work.safety)
    ]
    found.answers = _answers(work, measured, rouges)
    found.questions = [
        {
            "kind": question.kind,
            "language": question.language,
            "question": question.choice.question,
            "answer": question.choice.answer,
            **{of: {way: one.choices[way][number] for way in choices.WAYS} for of, one in measured.items()},
        }
        for number, question in enumerate(work.questions)
    ]


def _by_language(languages: list[str]) -> dict[str, list[int]]:
    """Language: numbers of its rows; then of all, where there are several."""
    found = {language: [n for n, one in enumerate(languages) if one == language] for language in sorted({*languages})}
    return found | ({"all": list(range(len(languages)))} if len(found) > 1 else {})


def _losses(work: Work, one: Measured) -> list[dict]:
    found = []
    for language, numbers in _by_language([row.language for row in work.rows]).items():
        rows = [one.losses[number] for number in numbers]
        sums, labels = [row["loss"] for row in rows], [row["labels"] for row in rows]
        loss = sum(sums) / sum(labels)
        low, high = intervals.bootstrap(sums, labels)
        found.append(
            {
                "language": language,
                "rows": len(rows),
                "label_tokens": sum(labels),
                "loss": loss,
                "loss_low": low,
                "loss_high": high,
                "perplexity": math.exp(min(loss, 700)),  # a float holds no more
                "token_accuracy": sum(row["right"] for row in rows) / sum(labels),
            }
        )
    return found


def _rouges(work: Work, one: Measured, languages: list[str]) -> dict[str, dict[str, list[float]]]:
    """Language: metric: of each answered row of that language."""
    found = {}
    for language in languages:
        pairs = _pairs(work, one, language)
        found[language] = texts.rouges([p[0] for p in pairs], [p[1] for p in pairs], language)
    return found


def _pairs(work: Work, one: Measured, language: str) -> list[tuple[str, str]]:
    """(answer, reference) of the answered rows of a language."""
    return [
        (answer["text"].removesuffix(CUT_OFF if answer["is_cut"] else ""), work.rows[number].turns[-1][1])
        for number, answer in zip(work.answered, one.answers, strict=True)
        if work.rows[number].language == language
    ]


def _texts(work: Work, one: Measured, rouges: dict[str, dict[str, list[float]]], languages: list[str]) -> list[dict]:
    found = []
    for language in languages:
        answers, references = zip(*_pairs(work, one, language), strict=True)
        cut = [
            answer["is_cut"]
            for number, answer in zip(work.answered, one.answers, strict=True)
            if work.rows[number].language == language
        ]
        low, high = intervals.bootstrap(rouges[language]["rougeL"])
        means = {name: sum(values) / len(values) for name, values in rouges[language].items()}
        numbers = texts.corpus_numbers(answers, references, language)
        found.append(
            {"language": language, "answers": len(answers), "cut_off": sum(cut), **numbers, **means}
            | {"rougeL_low": low, "rougeL_high": high}
        )
    return found


def _choices(work: Work, one: Measured) -> list[dict]:
    found = []
    for (kind, language), numbers in choices.groups(work.questions).items():
        asked = [work.questions[number] for number in numbers]
        baselines = {"majority": choices.majority(asked), "chance": choices.by_chance(asked)}
        for way in choices.WAYS:
            rows = [one.choices[way][number]["right"] for number in numbers]
            row: dict[str, Any] = {"way": way, "kind": kind, "language": language, "questions": len(rows)}
            for name in rows[0]:
                num_right = sum(right[name] for right in rows)
                row[name] = num_right / len(rows)
                row[f"{name}_low"], row[f"{name}_high"] = intervals.wilson(num_right, len(rows))
            found.append(row | baselines)
    return found


def _comparison(work: Work, measured: dict[str, Measured], rouges: dict, notes: list[str]) -> list[dict]:
    """Model against base by paired bootstrap over rows."""
    model, base = measured[MODEL], measured[BASE]
    found = []
    labels = [[row["labels"] for row in one.losses] for one in (model, base)]
    if labels[0] != labels[1]:
        notes.append(NOT_COMPARED)
    else:
        for language, numbers in _by_language([row.language for row in work.rows]).items():
            sums = [[one.losses[number]["loss"] for number in numbers] for one in (model, base)]
            weights = [labels[0][number] for number in numbers]
            found.append(
                _compared("loss", language, len(numbers), intervals.paired_bootstrap(*sums, weights), is_better=-1)
            )
    for language in rouges[MODEL]:
        values = [rouges[of][language]["rougeL"] for of in (MODEL, BASE)]
        found.append(_compared("ROUGE-L", language, len(values[0]), intervals.paired_bootstrap(*values), is_better=1))
    for (kind, language), numbers in choices.groups(work.questions).items():
        for way in choices.WAYS:
            for name in ("acc",) if way == "letter" else ("acc", "acc_norm"):
                rights = [[one.choices[way][number]["right"][name] for number in numbers] for one in (model, base)]
                group = kind if kind == language else f"{kind}, {language}"
                difference = intervals.paired_bootstrap(*rights)
                found.append(_compared(f"{name} by {way}", group, len(numbers), difference, is_better=1))
    return found


def _compared(measure: str, group: str, num_rows: int, found: intervals.Difference, is_better: int) -> dict:
    """is_better: the sign of a difference that speaks for the model."""
    told = ("better" if found.value * is_better > 0 else "worse") if found.excludes_zero else NO_DIFFERENCE
    told = TOO_FEW if num_rows < LEAST_ROWS else told
    return {
        "measure": measure,
        "group": group,
        "rows": num_rows,
        "model": found.model,
        "base": found.base,
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "model_is": told,
    }


def _answers(work: Work, measured: dict[str, Measured], rouges: dict) -> list[dict]:
    found, next_of = [], {of: {language: iter(v["rougeL"]) for language, v in r.items()} for of, r in rouges.items()}
    for place, number in enumerate(work.answered):
        row = work.rows[number]
        found.append(
            {
                "language": row.language,
                "question": row.turns[-1][0],
                **({"images": [image.path.name for image in row.images]} if row.images else {}),
                "reference": row.turns[-1][1],
                **{of: one.answers[place]["text"] for of, one in measured.items()},
                "rougeL": {of: next(next_of[of][row.language]) for of in measured},
            }
        )
    return found
