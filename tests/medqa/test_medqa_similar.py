"""Are near duplicates found, and only they, and passages that a text shares with an evaluation set?"""

from __future__ import annotations

import json
import random

import pytest
from paths import ROOT
from rouge_score import rouge_scorer

from zerolite.medqa import similar
from zerolite.medqa.similar import NearDuplicates, Overlap

PAIRS = 400


class Tokens:
    """What rouge_score asks for; its own tokenizer knows no Chinese."""

    tokenize = staticmethod(similar.tokens_of)


SCORER = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokens())


def rouge(left: str, right: str) -> float:
    return SCORER.score(left, right)["rougeL"].fmeasure


def texts_of(language: str) -> list[str]:
    rows = (ROOT / f"zerolite/medqa/corpus/train.{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for row in map(json.loads, rows) for text in (row["instruction"], row["output"])]


def changed(tokens: list[str], words: list[str], draw: random.Random) -> list[str]:
    """Tokens with changes all over, which is hardest for grams, or with one run replaced or left out."""
    if draw.random() < 0.5:
        rate = draw.uniform(0.02, 0.35)
        return [
            new
            for token in tokens
            for new in (
                [token]
                if draw.random() > rate
                else draw.choice([[], [draw.choice(words)], [token, draw.choice(words)]])
            )
        ]
    length = int(len(tokens) * draw.uniform(0.05, 0.45))
    start = draw.randrange(len(tokens))
    return tokens[:start] + draw.choices(words, k=draw.choice([0, length])) + tokens[start + length :]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_near_duplicates_are_found_and_nothing_else(language):
    """Pairs of ROUGE-L above 0.7 up to 0.95 by rouge_score, half of them below 0.78, among each other's originals."""
    draw, index = random.Random(7), NearDuplicates()
    originals = [text for text in dict.fromkeys(texts_of(language)) if len(similar.tokens_of(text)) >= 8][:600]
    words = [token for text in originals for token in similar.tokens_of(text)]
    for key, text in enumerate(originals):
        index.add(key, text)
    found, planted, wrong = {True: 0, False: 0}, {True: 0, False: 0}, []
    while sum(planted.values()) < PAIRS:
        key = draw.randrange(len(originals))
        text = similar.spaced(changed(similar.tokens_of(originals[key]), words, draw))
        score = rouge(originals[key], text)
        is_close_call = score < 0.78
        if not 0.7 + 1e-9 < score <= 0.95 or planted[is_close_call] == PAIRS // 2:
            continue
        keys = index.find_all(text)
        planted[is_close_call] += 1
        found[is_close_call] += key in keys
        wrong += [(text, originals[other]) for other in keys if not rouge(originals[other], text) > 0.7]
    recall, close_calls = sum(found.values()) / PAIRS, found[True] / planted[True]
    print(f"{language}: recall {recall:.4f} of {PAIRS} pairs, {close_calls:.4f} of those with ROUGE-L below 0.78")
    assert recall >= 0.985 and close_calls >= 0.975
    assert not wrong


def test_the_limit_is_above_seven_tenths():
    index = NearDuplicates()
    index.add("ten", "a1 a2 a3 a4 a5 a6 a7 a8 a9 a10")
    assert index.find("a1 a2 a3 a4 a5 a6 a7 b8 b9 b10") is None  # exactly 0.7
    assert index.find("a1 a2 a3 a4 a5 a6 a7 b8 b9") == "ten"
    assert similar.rouge_l("a1 a2 a3 a4 a5 a6 a7 b8 b9", "a1 a2 a3 a4 a5 a6 a7 a8 a9 a10") == pytest.approx(14 / 19)


def test_the_first_that_came_is_named_and_all_are():
    index = NearDuplicates()
    for key, text in (("b", "什么是痛风？"), ("a", "什么是痛风呢"), ("b", "What is gout?"), ("c", "它有哪些症状")):
        index.add(key, text)
    assert len(index) == 4
    assert index.find("什么　是痛风") == "b" and index.find_all("什么是痛风") == ["b", "a"]
    assert index.find("ＷＨＡＴ is “gout”") == "b"
    assert index.find("高血压不能吃什么") is None
    for empty in ("", " ", "?!。", "\u200b"):
        index.add("empty", empty)
        assert index.find(empty) is None
    assert len(index) == 4 and similar.rouge_l("", "") == 0


WORDS = "a man of forty has pain in his left knee after a long walk"  # 14
CHARACTERS = "患者男四十岁左膝关节疼痛三天活动后加重休息后可以缓解应该怎么办才好"  # 33


@pytest.mark.parametrize(
    "text",
    [
        WORDS.upper().replace(" ", " - "),
        "He said: “A man, of forty; has pain in his left\tknee after a LONG...” and so on",
        "Ａ man of forty has pain in his left kn\u00adee after a long walk",
        CHARACTERS[:30],
        "问：" + "，".join(CHARACTERS[3:]) + "？",
        "患者\u200b" + CHARACTERS[2:] + " thank you",
    ],
)
def test_shared_passages_are_found_across_punctuation_width_and_case(text):
    passage = Overlap([CHARACTERS, "", WORDS]).find(text)
    assert passage is not None
    weights = [30 if token.isascii() else 13 for token in similar.tokens_of(passage)]
    assert sum(weights) == 390 and passage in similar.spaced(similar.tokens_of(text))


def test_what_is_shorter_is_no_shared_passage_but_as_a_whole():
    overlap = Overlap([WORDS, WORDS, CHARACTERS, "What is gout?", "什么是痛风？"])
    assert overlap.find(" ".join(WORDS.split()[:12])) is None
    assert overlap.find(CHARACTERS[:29]) is None
    assert overlap.find("what is GOUT") == "what is gout" and overlap.find("“什么是痛风”") == "什么是痛风"
    assert overlap.find("what is gout in the knee") is None and overlap.find("") is None
    assert overlap.find(WORDS) is not None  # though it was given twice


def test_a_passage_of_both_languages_counts_as_both():
    mixed = "服用 aspirin 和 warfarin 期间如果出现 black stool 或者 nose bleeding 应该先停药还是先去医院检查"
    overlap = Overlap([mixed])
    assert overlap.find("请问" + mixed.upper()) is not None
    assert overlap.find(mixed[: len(mixed) // 3]) is None
