"""Texts that say nearly the same, and texts that share a passage with an evaluation set.

Tokens are words, and single characters of Chinese, in lower case and of one width, without punctuation. Two texts are
near duplicates where the ROUGE-L F of their tokens is above 0.7. MinHash-LSH finds the candidates by 5-grams, and the
decision itself is exact: only a candidate that LSH misses is missed.

[Note: 5-grams of bytes] The grams are of UTF-8 bytes, without regard to the language: five letters in English, and
two to three characters in Chinese, of which the outer ones count in part. With grams of five words, or of five Chinese
characters, two texts with every fourth token changed would share hardly any.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Hashable, Iterable, Iterator

CHINESE = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{CHINESE}]|[^\W_{CHINESE}]+")
GRAM, ENDS = 5, b"\0\0"  # bytes, see [Note: 5-grams of bytes]; the ends of a text count in its outer grams
# A pair is a candidate where it agrees in one of 64 bands of two hashes; test_medqa_similar.py has the recall.
BANDS, ROWS = 64, 2
SEED = 1
# A shared passage is 13 words long, or 30 Chinese characters, or as much of both: their weights add up to one window.
WORD, CHARACTER, WINDOW = 30, 13, 390


def tokens_of(text: str) -> list[str]:
    """Words and single Chinese characters of a text, whatever its width, case, punctuation and invisible characters."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return TOKEN.findall("".join(c for c in plain if unicodedata.category(c) != "Cf"))


def rouge_l(left: str, right: str) -> float:
    """The F of ROUGE-L over the tokens of two texts, 0 to 1; 0 where one of them has none."""
    from rapidfuzz.distance import Indel

    first, second = tokens_of(left), tokens_of(right)
    return Indel.normalized_similarity(first, second) if first and second else 0.0


class NearDuplicates:
    """Texts by key, and which of them a new text nearly repeats. The same texts in the same order give the same keys.

    Raises ValueError where datasketch or rapidfuzz is not installed.
    """

    def __init__(self) -> None:
        try:
            import datasketch
            import rapidfuzz  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError(f"near duplicates need {error.name}: pip install 'zerolite[generate]'") from None
        self._empty = datasketch.MinHash(BANDS * ROWS, seed=SEED, hashfunc=zlib.crc32, scheme="affine32")
        self._index = datasketch.MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        self._numbers: dict[str, int] = {}  # of tokens, in the order of their coming
        self._keys: list[Hashable] = []
        self._texts: list[str] = []  # a character a token, which rapidfuzz compares fastest

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: Hashable, text: str) -> None:
        """Keep a text, which later ones are compared with; a key may have several."""
        tokens = tokens_of(text)
        if tokens:
            self._index.insert(len(self._keys), self._hashes(tokens))
            self._keys.append(key)
            self._texts.append(self._as_characters(tokens))

    def find(self, text: str) -> Hashable | None:
        """The key of the first text that came whose near duplicate `text` is; None where there is none."""
        return next(iter(self.find_all(text)), None)

    def find_all(self, text: str) -> list[Hashable]:
        """The keys of all texts whose near duplicate `text` is, in the order of their coming."""
        from rapidfuzz import process
        from rapidfuzz.distance import Indel, LCSseq

        tokens = tokens_of(text)
        if not tokens:
            return []
        numbers = sorted(self._index.query(self._hashes(tokens)))
        asked = self._as_characters(tokens)
        # Indel's similarity is the F of ROUGE-L; what is near by it is decided in integers.
        scores = process.cdist(
            [asked], [self._texts[number] for number in numbers], scorer=Indel.normalized_similarity, score_cutoff=0.69
        )[0]
        found = []
        for number in (number for number, score in zip(numbers, scores, strict=True) if score > 0):
            other = self._texts[number]
            if 20 * LCSseq.similarity(asked, other) > 7 * (len(asked) + len(other)):
                found.append(self._keys[number])
        return found

    def _hashes(self, tokens: list[str]):
        found, content = self._empty.copy(), ENDS + spaced(tokens).encode() + ENDS
        found.update_batch({content[start : start + GRAM] for start in range(len(content) - GRAM + 1)})
        return found

    def _as_characters(self, tokens: list[str]) -> str:
        """A text with a character for each token, of which there are a million."""
        return "".join([chr(self._numbers.setdefault(token, len(self._numbers))) for token in tokens])


def spaced(tokens: list[str]) -> str:
    """Tokens as a text: a space between words, none between Chinese characters."""
    text = " ".join(tokens)
    return re.sub(rf"(?<=[{CHINESE}]) (?=[{CHINESE}])", "", text)


class Overlap:
    """The passages of evaluation texts: 13 words or 30 Chinese characters in a row; shorter texts as a whole."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._passages: set[bytes] = set()
        self._short: set[tuple[str, ...]] = set()
        for tokens in map(tokens_of, texts):
            passages = [_digest(passage) for passage in _windows(tokens)]
            self._passages.update(passages)
            if tokens and not passages:
                self._short.add(tuple(tokens))

    def find(self, text: str) -> str | None:
        """The first passage that a text shares with an evaluation text, as its tokens; None where it shares none."""
        tokens = tokens_of(text)
        if tuple(tokens) in self._short:
            return spaced(tokens)
        return next((spaced(passage) for passage in _windows(tokens) if _digest(passage) in self._passages), None)


def _windows(tokens: list[str]) -> Iterator[list[str]]:
    """The shortest run of tokens from each place that is as long as a passage."""
    weights = [CHARACTER if re.match(f"[{CHINESE}]", token) else WORD for token in tokens]
    end, weight = 0, 0
    for start in range(len(tokens)):
        while weight < WINDOW and end < len(tokens):
            weight += weights[end]
            end += 1
        if weight < WINDOW:
            return
        yield tokens[start:end]
        weight -= weights[start]


def _digest(passage: list[str]) -> bytes:
    return hashlib.blake2b(" ".join(passage).encode(), digest_size=8).digest()
