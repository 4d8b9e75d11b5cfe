"""Numbers of generated answers beside references: BLEU-4 and chrF of sacrebleu, ROUGE of rouge-score, distinct-n.

Chinese has no spaces between words: sacrebleu's `zh` tokenizer and characters stand in for words, since rouge-score's
own tokenizer, which keeps Latin letters and digits, gives 0 for any two Chinese texts. Numbers over the words that
jieba finds carry its name.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec

CHINESE = r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
CHARACTER = re.compile(rf"{CHINESE}|(?:(?!{CHINESE})[^\W_])+")
ROUGES = ("rouge1", "rouge2", "rougeL")
BLEU_TOKENIZERS = {"zh": "zh", "en": "13a"}
NEEDED = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "matplotlib": "matplotlib"}  # jieba is optional


class Characters:
    """Tokenizer of rouge-score: each Chinese character, and each run of other letters and digits in lower case."""

    def tokenize(self, text: str) -> list[str]:
        return CHARACTER.findall(text.lower())


class Words:
    """Tokenizer of rouge-score: the words that jieba finds, without punctuation."""

    def tokenize(self, text: str) -> list[str]:
        import jieba

        jieba.setLogLevel("ERROR")
        return [word for word in jieba.lcut(text.lower()) if CHARACTER.search(word)]


def require() -> None:
    """Raises ValueError where a library that an evaluation ends with is not installed: known before it begins."""
    if lacking := [name for module, name in NEEDED.items() if find_spec(module) is None]:
        raise ValueError(f"an evaluation needs {', '.join(lacking)}: pip install 'zerolite[evaluate]'")


def rouges(answers: Sequence[str], references: Sequence[str], language: str) -> dict[str, list[float]]:
    """F-measures of ROUGE-1, -2 and -L of each answer, 0 to 1; in Chinese also over jieba's words where it is there."""
    from rouge_score.rouge_scorer import RougeScorer

    found = {}
    tokenizers = {"": Characters() if language == "zh" else None}  # None: rouge-score's own one
    if language == "zh" and find_spec("jieba") is not None:
        tokenizers["_jieba"] = Words()
    for suffix, tokenizer in tokenizers.items():
        scorer = RougeScorer(list(ROUGES), tokenizer=tokenizer)
        rows = [scorer.score(target=r, prediction=a) for a, r in zip(answers, references, strict=True)]
        found |= {f"{name}{suffix}": [float(row[name].fmeasure) for row in rows] for name in ROUGES}
    return found


def corpus_numbers(answers: Sequence[str], references: Sequence[str], language: str) -> dict[str, float]:
    """BLEU-4 and chrF over all answers, 0 to 100, and distinct-1 and -2 of the answers, 0 to 1."""
    from sacrebleu.metrics import BLEU, CHRF

    answers, references = list(answers), [list(references)]
    bleu = BLEU(tokenize=BLEU_TOKENIZERS[language]).corpus_score(answers, references)
    return {
        "bleu4": float(bleu.score),
        "chrf": float(CHRF().corpus_score(answers, references).score),
        "distinct1": distinct(answers, 1),
        "distinct2": distinct(answers, 2),
    }


def distinct(answers: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of the answers, in words, or characters where they are Chinese; 0 of none."""
    grams = [
        tuple(tokens[start : start + n])
        for tokens in map(Characters().tokenize, answers)
        for start in range(len(tokens) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
