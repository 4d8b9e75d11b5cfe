"""Does a part of the rows to validate on hold whole groups, of the right size, in whichever order they come?"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from medqa_runs import needs_shared, tiny_llama, to_flags
from paths import SHARED
from transformers import AutoTokenizer

import train_medqa
from zerolite import DataError
from zerolite.cli import main as zerolite
from zerolite.medqa import corpus, data, readers
from zerolite.medqa.arguments import CORPUS, Options, parse
from zerolite.medqa.rows import Conversation, Passage, Row, usable
from zerolite.medqa.split import apart, groups_of, split

ANSWER = "Crystals of uric acid lie in the joint, which swells and hurts at night."
NEAR = ANSWER.replace("swells", "reddens")
LONG_ZH = "尿酸结晶沉积在关节里，晚上会肿痛。"


def pair(question: str, answer: str, group: str = "") -> Conversation:
    return Conversation(((question, answer),), group=group)


JOINED = [  # rows that belong together, and why
    ("the question, but for its case and signs", pair("What is gout?", "Crystals."), pair(" what is GOUT ", "Pain.")),
    ("the answer", pair("What is gout?", ANSWER), pair("痛风是什么？", ANSWER)),
    ("the Chinese answer", pair("什么是痛风？", LONG_ZH), pair("关节为什么痛？", LONG_ZH)),
    ("near duplicates", pair("Why does it hurt, doctor?", ANSWER), pair("Why does it hurt then, doctor?", NEAR)),
    ("the document", pair("Is it?", "Yes.", "pubmed 1"), pair("Was it?", "Hardly.", "pubmed 1")),
    ("the text", Passage("A book."), Passage("a book")),
    (
        "a later question of a dialogue",
        Conversation((("Hello", "Hello"), ("How much paracetamol a day is safe?", "Four grams."))),
        Conversation((("Hi", "Hi"), ("How much paracetamol a day is safe?", "It depends."))),
    ),
]
FREE = [  # rows that share what many rows share
    (pair("Is it gout?", "Yes."), pair("Does it hurt?", "Yes.")),
    (pair("Which one?\n(A) x\n(B) y", "(B) y"), pair("Who?\n(A) z\n(B) y", "(B) y")),
    (Conversation((("你好", "您好"), ("痛", "看医生"))), Conversation((("你好", "您好"), ("咳", "多喝水")))),
]


@pytest.mark.parametrize(("why", "first", "second"), JOINED, ids=[why for why, *_ in JOINED])
def test_rows_that_share_something_are_one_group(why, first, second):
    others = [pair("What is asthma?", "Narrow airways."), pair("骨折怎么办？", "去医院。")]
    groups = groups_of([others[0], first, others[1], second])
    assert groups.of_row[1] == groups.of_row[3] and len(groups.sizes) == 3
    assert groups.num_near == 2 or why != "near duplicates"


def test_rows_that_share_a_word_are_not():
    for rows in FREE:
        assert len(groups_of(rows).sizes) == 2


def drawn_rows(draw: st.DrawFn) -> list[Row]:
    """Rows of few questions, answers and documents, so that chains of them come together."""
    number = st.integers(0, 12)
    kinds = st.lists(st.tuples(number, number, number, st.booleans()), min_size=2, max_size=40)
    return [
        pair(
            " ".join(f"{'问' if is_chinese else 'q'}{letter}{question}" for letter in "abcdef"),
            " ".join(f"{letter}{answer}" for letter in "ghijklmnop"),
            f"document {group}" if group < 4 else "",
        )
        for question, answer, group, is_chinese in draw(kinds)
    ]


rows_strategy = st.composite(drawn_rows)()


@given(rows_strategy, st.one_of(st.floats(0.01, 0.99), st.integers(1, 39)), st.integers(0, 3), st.randoms())
def test_no_group_crosses_and_sizes_are_right(rows, size, seed, shuffle):
    groups, languages = groups_of(rows), [row.language for row in rows]
    wanted = max(1, round(size * len(rows))) if size < 1 else size
    largest, smallest = max(groups.sizes.values()), min(groups.sizes.values())
    if wanted >= len(rows) or len(groups.sizes) == 1:
        with pytest.raises(DataError, match="--val_size .*; --validation_file names other rows"):
            split(groups, languages, size, seed)
        return
    chosen = split(groups, languages, size, seed)
    inside, outside = ({groups.of_row[row] for row in part} for part in (chosen, set(range(len(rows))) - {*chosen}))
    assert not inside & outside and outside
    for key in ("group", "turns"):  # what a reader of the rows would call shared, without asking groups_of
        one, other = ({getattr(rows[row], key) for row in part} for part in (chosen, set(range(len(rows))) - {*chosen}))
        assert not (one & other) - {""}
    assert wanted - largest < len(chosen) <= max(wanted, smallest)
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    again = split(groups_of([rows[row] for row in order]), [languages[row] for row in order], size, seed)
    assert Counter(rows[order[row]] for row in again) == Counter(rows[row] for row in chosen)


def test_languages_keep_their_parts_and_the_seed_draws():
    rows: list[Row] = [pair(f"What is {number}?", f"{number}.") for number in range(300)]
    rows += [pair(f"什么是{number}？", f"{number}。") for number in range(100)]
    for size, wanted in ((40, {"en": 30, "zh": 10}), (0.1, {"en": 30, "zh": 10}), (6, {"en": 5, "zh": 1})):
        train, held_out, told = apart(rows, size, seed=1)
        assert Counter(row.language for row in held_out) in (wanted, {"en": 4, "zh": 2})
        assert len(train) + len(held_out) == 400
        assert told.startswith(f"{len(held_out)} of these rows (--val_size {size}")
    first, again, other = (apart(rows, 40, seed) for seed in (1, 1, 2))
    assert first == again and first[1] != other[1]


@needs_shared
def test_files_of_data_sets_name_the_document_the_disease_or_the_title():
    raw, groups = SHARED / "medqa" / "raw_samples", {}
    for folder in ("medquad", "pubmedqa", "toyhom"):
        files = sorted(path for path in (raw / folder).rglob("*") if path.is_file())
        kept = data.read(files, rows_of=readers.rows, skip_invalid=True).kept
        groups[folder] = Counter(row.group for row in kept)
        assert all(groups[folder])
    assert len(groups["medquad"]) == 9 and groups["medquad"]["disease surviving cancer"] > 1  # a file each
    assert len(groups["pubmedqa"]) == 20 and "19156007" in groups["pubmedqa"]
    assert "title 有胃病可以吃炔雌醇环丙孕吗？" in groups["toyhom"]


# --- in training ----------------------------------------------------------------------------------------------------

SHIPPED = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def some_rows(number: int = 20) -> list[dict]:
    """Two rows of each document, and one long text."""
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}.", "group": n // 2} for n in range(number)]
    return [*rows, {"text": "A long text. " * 60}]


def test_options_say_what_is_validated_on(tmp_path):
    path = str(written(tmp_path / "rows.jsonl", some_rows()))
    own = corpus.load(Options(train_file=(path,), val_size=4), SHIPPED, None)
    held_out = len(own.validation)
    assert 2 < held_out <= 4 and f"validation: {held_out} of these rows (--val_size 4)" in own.summary
    kept_in = {row.turns[0][0] for row in own.validation_rows}
    assert all((f"What is {n}?" in kept_in) == (f"What is {n + 1}?" in kept_in) for n in range(0, 20, 2))
    for val_size in (None, 0.0):
        none = corpus.load(Options(train_file=(path,), val_size=val_size), SHIPPED, None)
        assert none.validation == [] and "validation: none: --validation_file names rows" in none.summary
    shipped = corpus.load(Options(max_samples=2), SHIPPED, None)
    assert len(shipped.validation) == 4 and sorted(shipped.validation_by_language) == ["en", "zh"]
    for argv, reason in [
        (["--train_file", path, "--validation_file", path], "--val_size and --validation_file: expected one of them"),
        ([], "--val_size: is of rows of yours"),
    ]:
        with pytest.raises(ValueError, match=reason):
            parse([*argv, "--val_size", "0.1"])
    for size in ("1.5", "nan", "inf", "-1", "x"):
        with pytest.raises(ValueError, match="--val_size: expected"):
            parse(["--train_file", path, "--val_size", size])
    with pytest.raises(DataError, match="--val_size 100: 100 rows to validate on leave none of 21"):
        corpus.load(Options(train_file=(path,), val_size=100), SHIPPED, None)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("val_size", [None, 4])
def test_training_with_and_without_rows_to_validate_on(tiny_folder, tmp_path, capsys, val_size):
    """Conversations and a text that is cut, also evaluated in between; every number is one."""
    options = {"model_name_or_path": tiny_folder, "tokenizer_name_or_path": CORPUS / "tokenizer", "cutoff_len": 64}
    options |= {"train_file": written(tmp_path / "rows.jsonl", some_rows()), "max_steps": 3, "eval_steps": 1}
    options |= {"val_size": val_size} if val_size else {}
    argv = to_flags({**options, "logging_steps": 1, "output_dir": tmp_path / "out", "stage": 0})
    run = train_medqa.prepare(parse(argv))
    assert train_medqa.train(run) == 0
    out = capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert "nan" not in (out + report).lower() and not any(value is None for r in records for value in r.values())
    steps = [record["step"] for record in records if "validation_loss" in record]
    assert steps == ([0, 1, 2, 3] if val_size else [])
    assert ("No rows were there to validate on" in report) == (val_size is None)
    assert ("There was no held-out question to ask" in report) == (val_size is None)
    assert (tmp_path / "out" / "loss.png").is_file() and "1 texts in" in out and "1 of them cut" in out


# --- zerolite prepare -----------------------------------------------------------------------------------------------


def test_prepare_splits_as_training_does(tmp_path, capsys):
    given = written(tmp_path / "given.jsonl", some_rows())
    argv = [str(given), "--output", str(tmp_path / "rows.jsonl"), "--val_size", "0.2", "--seed", "42"]
    assert zerolite(["prepare", *argv]) == 0
    parts = [data.read([tmp_path / name], usable=usable) for name in ("rows.jsonl", "rows.validation.jsonl")]
    train, held_out, _ = apart(
        [*(r := data.read([given], rows_of=readers.rows, usable=usable)).kept, *r.passages], 0.2, 42
    )
    assert [[*part.kept, *part.passages] for part in parts] == [train, held_out]
    assert [[row.group for row in part.kept] for part in parts] == [
        [row.group for row in part if isinstance(row, Conversation)] for part in (train, held_out)
    ]
    card = (tmp_path / "rows.md").read_text(encoding="utf-8")
    assert "11 groups, the largest of 2 rows; 0 have a near duplicate." in card
    assert f"| rows.validation.jsonl | en | {len(held_out)} |" in card and f"| rows.jsonl | en | {len(train)} |" in card
    assert capsys.readouterr().out.strip() == card.strip()
    for more, reason in ((["--val_size", "2.5"], "expected a fraction below 1"), ([], "exists: remove it")):
        assert zerolite(["prepare", *argv[:3], *more]) == 2
        assert reason in capsys.readouterr().err
