"""Are the numbers of generated answers those of the libraries, in both languages, and are Chinese ones not 0?"""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest

from zerolite import cli
from zerolite.medqa import data, readers
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.evaluation import texts

NUM_PAIRS = 200


def pairs(language: str) -> tuple[list[str], list[str]]:
    """(answers, references): each answer is a mixture of its reference and of another one."""
    rows = data.read([CORPUS / f"train.{language}.jsonl"], rows_of=readers.reader(None)).kept[:NUM_PAIRS]
    references, rng = [row.turns[-1][1][:120] for row in rows], random.Random(0)
    answers = []
    for number, text in enumerate(references):
        cut = rng.randrange(len(text) + 1)
        answers.append(text[:cut] + references[number - 1][cut : cut + 60])
    answers[3], answers[4] = "", references[4]
    return answers, references


@pytest.mark.parametrize("language", ["en", "zh"])
def test_numbers_of_200_pairs_are_those_of_the_libraries(language):
    import sacrebleu
    from rouge_score import rouge_scorer

    answers, references = pairs(language)
    assert len(answers) == NUM_PAIRS
    found = texts.corpus_numbers(answers, references, language)
    tokenize = {"en": "13a", "zh": "zh"}[language]
    assert found["bleu4"] == sacrebleu.corpus_bleu(answers, [references], tokenize=tokenize).score
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
    rouges = texts.rouges(answers, references, language)
    if language == "en":
        scored = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
        rows = [scored.score(r, a) for a, r in zip(answers, references, strict=True)]
    else:  # by hand: letters for characters, so that rouge-score's own tokenizer sees each as a word
        alphabet: dict[str, str] = {}

        def spelled(text: str) -> str:
            tokens = texts.CHARACTER.findall(text.lower())
            return " ".join(alphabet.setdefault(token, f"w{len(alphabet)}") for token in tokens)

        scored = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
        rows = [scored.score(spelled(r), spelled(a)) for a, r in zip(answers, references, strict=True)]
    for name in texts.ROUGES:
        assert rouges[name] == [row[name].fmeasure for row in rows]
        assert rouges[name][3] == 0 and rouges[name][4] == 1 and 0.2 < sum(rouges[name]) / NUM_PAIRS < 1


def test_the_default_tokenizers_of_both_libraries_give_0_for_chinese_and_ours_do_not():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "感冒了应该多喝水，注意休息。", "感冒时应该多喝热水，好好休息。"
    assert RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure == 0
    assert sacrebleu.corpus_bleu([answer], [[reference]]).score < 1e-9
    assert texts.rouges([answer], [reference], "zh")["rougeL"][0] == pytest.approx(2 * 9 / (12 + 13))
    assert texts.corpus_numbers([answer], [reference], "zh")["bleu4"] > 10


def test_numbers_over_words_of_jieba_carry_its_name():
    found = texts.rouges(["感冒多喝水 Aspirin 100"], ["感冒多喝热水 aspirin 100"], "zh")
    names = {f"{name}_jieba" for name in texts.ROUGES} if find_spec("jieba") else set()
    assert set(found) == {*texts.ROUGES, *names}
    assert not names & texts.rouges(["a"], ["a"], "en").keys()
    if names:
        import jieba

        answer, reference = ([w for w in jieba.lcut(t) if w.strip()] for t in ("感冒多喝水", "感冒多喝热水"))
        common = len(set(answer) & set(reference)) + 2
        assert found["rouge1_jieba"][0] == pytest.approx(2 * common / (len(answer) + len(reference) + 4))


def test_a_library_that_is_missing_is_named_with_its_extra_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(texts, "find_spec", lambda name: None if name == "rouge_score" else find_spec(name))
    assert cli.main(["evaluate", "anything"]) == 2
    assert "needs rouge-score: pip install 'zerolite[evaluate]'" in capsys.readouterr().err


def test_distinct_n_counts_words_of_english_and_characters_of_chinese():
    assert texts.distinct(["Drink water, drink TEA.", "Drink"], 1) == 3 / 5
    assert texts.distinct(["Drink water, drink TEA.", "Drink"], 2) == 3 / 3
    assert texts.distinct(["多喝多喝水"], 1) == 3 / 5 and texts.distinct(["多喝多喝水"], 2) == 3 / 4
    assert texts.distinct(["", "a"], 2) == 0
