"""Rendered texts as token ids, as `tokenizer.apply_chat_template` makes them, with the place of each id in the text.

A special token's name inside a text of a row stays text: of the row only the template's own ones are special tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from zerolite.medqa.data import Conversation
from zerolite.medqa.images.files import ImageFile
from zerolite.medqa.images.sight import Sight
from zerolite.medqa.template import Segment, Template

IGNORED = -100  # label of a position without loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Example:
    """One row as the model reads it, or several one behind the other.

    `labels[i]` is `input_ids[i]` where it is to be learned, else IGNORED.
    """

    input_ids: np.ndarray  # (length,) int32
    labels: np.ndarray  # (length,) int32
    starts: tuple[int, ...] = (0,)  # where each row begins, whose first token has no label
    is_text: bool = False  # of a passage: no end of an answer is in it
    images: tuple[ImageFile, ...] = ()  # that stand in it, in their order
    sight: Sight | None = None  # of the model, where there are images

    @property
    def num_labels(self) -> int:
        """Positions with loss; the first position has none, since nothing predicts it."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Tokens:
    """Ids of a rendered text and where each of them ends in it, in characters."""

    segments: Sequence[Segment]
    ids: np.ndarray  # (length,) int32
    starts: np.ndarray  # (length,) int64
    ends: np.ndarray  # (length,) int64

    def of(self, begin: int, end: int) -> np.ndarray:
        """(length,) bool: which tokens have a character of [begin, end)."""
        return (self.ends > begin) & (self.starts < end)

    def spans(self) -> list[tuple[Segment, int, int]]:
        """Each segment with the characters that it has of the text."""
        borders = np.cumsum([0, *(len(segment.text) for segment in self.segments)]).tolist()
        return list(zip(self.segments, borders[:-1], borders[1:], strict=True))

    def example(self) -> Example:
        """Raises ValueError for a token that lies on both sides of a border: asked for alone, it is another one."""
        labels = np.full(len(self.ids), IGNORED, np.int32)
        learned = [False, *(segment.is_learned for segment in self.segments)]
        for (segment, begin, end), was_learned in zip(self.spans(), learned, strict=False):
            if not segment.is_learned:
                continue
            if not was_learned and np.any((self.starts < begin) & (self.ends > begin)):
                raise ValueError(
                    f"the answer {segment.text[:40]!r} merges with what stands before it into one token: "
                    "the template's prompt should end in a line feed or a special token"
                )
            inside = self.of(begin, end)
            labels[inside] = self.ids[inside]
        return Example(self.ids, labels)


def tokenize_all(rows: list[list[Segment]], template: Template) -> Iterator[Tokens]:
    is_plain = [not any(s.is_text and template.special.search(s.text) for s in segments) for segments in rows]
    texts = ["".join(s.text for s in row) for row, plain in zip(rows, is_plain, strict=True) if plain]
    plain_rows = iter(tokenize(texts, template.tokenizer))
    for row, plain in zip(rows, is_plain, strict=True):
        yield Tokens(row, *(next(plain_rows) if plain else _tokenize_defused(row, template)))


def tokenize(
    strings: list[str], tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = False
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, start, end of each in characters) of each text, as `apply_chat_template` tokenises."""
    if not strings:
        return []
    encoded = tokenizer(
        strings,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    result = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        result.append((np.array(ids, np.int32), starts, ends))
    return result


def _tokenize_defused(segments: list[Segment], template: Template) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a row whose texts hold a special token's name: only the template's own ones are special tokens.

    Raises ValueError where the tokenizer would make other ids of the parts between these than of the whole.
    """
    prefix = next((prefix for prefix in PART_PREFIXES if _is_separable(template, prefix)), None)
    if prefix is None:
        name = next(m.group() for s in segments if s.is_text and (m := template.special.search(s.text)))
        raise ValueError(f"the text has {name!r}, which this tokenizer reads as a special token")
    return _tokenize_parts(segments, template, prefix)


# A SentencePiece tokenizer puts a space before a text, but not behind a special token. Its parts are tokenised behind a
# line feed, which merges with nothing there.
PART_PREFIXES = "", "\n"


def _tokenize_parts(
    segments: list[Segment], template: Template, prefix: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What lies between the template's special tokens is tokenised apart, with names as text, behind `prefix`."""
    parts, text = [], ""
    for segment in segments:
        position = 0
        for special in [] if segment.is_text else template.special.finditer(segment.text):
            parts.append((text + segment.text[position : special.start()], special.group()))
            text, position = "", special.end()
        text += segment.text[position:]
    parts.append((text, ""))
    prefixes = ["", *[prefix] * (len(parts) - 1)] if parts[0][0] else [prefix] * len(parts)
    texts = [prefix + text for prefix, (text, _) in zip(prefixes, parts, strict=True)]
    encoded = tokenize(texts, template.tokenizer, split_special_tokens=True)
    found, begin = [], 0
    for prefix, (text, special), (ids, starts, ends) in zip(prefixes, parts, encoded, strict=True):
        own = ends > len(prefix) if prefix else np.full(len(ids), True)
        found.append((ids[own], starts[own] + begin - len(prefix), ends[own] + begin - len(prefix)))
        begin += len(text)
        if special:
            token_id = template.tokenizer.convert_tokens_to_ids(special)
            found.append(([token_id], [begin], [begin + len(special)]))
            begin += len(special)
    ids, starts, ends = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return ids.astype(np.int32), starts.astype(np.int64), ends.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _is_separable(template: Template, prefix: str) -> bool:
    """Whether the tokenizer makes the same ids of the parts between special tokens as of the whole text."""
    turns = ("Fever 38?", "咳嗽 See a doctor."), ("- b  c", "¿d\n\n1. e"), ("咳", "嗽。")
    row = template.segments(Conversation(turns))
    ((whole, _, _),) = tokenize(["".join(segment.text for segment in row)], template.tokenizer)
    return np.array_equal(whole, _tokenize_parts(row, template, prefix)[0])
