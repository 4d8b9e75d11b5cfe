"""What of the answers is not kept: refusals, other languages, lengths, repetitions, evaluation questions; by name."""

import re
from collections.abc import Sequence

from zerolite.medqa.generate.replies import REFUSED, is_refusal
from zerolite.medqa.rows import Conversation
from zerolite.medqa.similar import NearDuplicates, Overlap, tokens_of

LANGUAGE = "not in the language that was asked for"
SHORT, LONG = "too short", "too long"
ONE_TURN = "a dialogue of one turn"
EXACT = "an exact duplicate"
NEAR = "a near duplicate of a row"
NEAR_SEED = "a near duplicate of a seed task"
EVALUATION = "shares a passage with the evaluation set"
NEAR_EVALUATION = "a near duplicate of an evaluation question"
QUESTION_TOKENS, ANSWER_TOKENS = (2, 400), (5, 1200)  # words, or Chinese characters
LEAST_CHINESE, MOST_CHINESE = 0.5, 0.1  # of the tokens of a Chinese text, of an English one
# English texts of some length have a quarter of these and more.
ENGLISH = frozenset(
    (
        "the is of and to for it that with are be or you your this not can if may have has should from by on when what"
    ).split()
)
LEAST_ENGLISH, JUDGED_FROM = 0.1, 12  # share of ENGLISH, from so many tokens


class Filters:
    """Judges conversations one after another; those that are kept count against later ones."""

    def __init__(self, seeds: Sequence[Conversation], evaluation: Sequence[Conversation]):
        """seeds, evaluation: what is not to be repeated. Raises ValueError where datasketch or rapidfuzz is missing."""
        self._exact: set[str] = set()
        self._near = NearDuplicates()
        self._overlap = Overlap(text for row in evaluation for turn in row.turns for text in turn)
        for reason, rows in ((NEAR_EVALUATION, evaluation), (NEAR_SEED, seeds)):
            for row in rows:
                self._near.add(reason, questions_of(row))

    def reason(self, row: Conversation, language: str, kind: str) -> str | None:
        """Why a conversation is not kept; None, and it is remembered, where it is."""
        found = self._of_itself(row, language, kind) or self._of_others(row)
        if found is None:
            self._exact.add(repr(row.turns))
            self._near.add(NEAR, questions_of(row))
        return found

    def _of_itself(self, row: Conversation, language: str, kind: str) -> str | None:
        if any(is_refusal(answer) for _, answer in row.turns):
            return REFUSED
        for question, answer in row.turns:
            for text, (least, most) in ((question, QUESTION_TOKENS), (answer, ANSWER_TOKENS)):
                length = len(tokens_of(text))
                if not least <= length <= most:
                    return SHORT if length < least else LONG
            if not is_in_language(question, language) or not is_in_language(answer, language):
                return LANGUAGE
        return ONE_TURN if kind == "dialogue" and len(row.turns) == 1 else None

    def _of_others(self, row: Conversation) -> str | None:
        if repr(row.turns) in self._exact:
            return EXACT
        if any(self._overlap.find(text) is not None for turn in row.turns for text in turn):
            return EVALUATION
        near = self._near.find(questions_of(row))
        return None if near is None else str(near)


def questions_of(row: Conversation) -> str:
    """What a conversation is compared by."""
    return "\n".join(question for question, _ in row.turns)


def is_in_language(text: str, language: str) -> bool:
    """Whether a text is Chinese ("zh") or English ("en")."""
    tokens = tokens_of(text)
    chinese = sum(re.match("[\u3400-\u9fff]", token) is not None for token in tokens) / max(1, len(tokens))
    if language == "zh":
        return chinese >= LEAST_CHINESE
    english = sum(token in ENGLISH for token in tokens) / max(1, len(tokens))
    is_latin = sum(token.isascii() for token in tokens) >= 0.7 * len(tokens)
    return chinese <= MOST_CHINESE and is_latin and (len(tokens) < JUDGED_FROM or english >= LEAST_ENGLISH)
