"""A text without a question as examples of continued pretraining: loss on every token, nothing of it left out."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from zerolite.medqa.rows import Passage
from zerolite.medqa.tokens import IGNORED, Example, tokenize

# A tokeniser takes 200 bytes a character. Of a longer text it gets parts, cut before a space or a line feed where there
# is one: tokens at such a cut may be others than those of the whole text.
PART_CHARACTERS = 1 << 17


def encode_passages(
    passages: list[Passage], tokenizer: PreTrainedTokenizerBase, cutoff_len: int
) -> list[list[Example]]:
    """Examples of at most `cutoff_len` tokens of each passage.

    A text begins with BOS where the tokenizer has one and ends with EOS. Behind a cut an example repeats the token
    before it, without loss: so every token but the first is predicted once. A special token's name stays text.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for passage in passages:
        parts = tokenize(_parts(passage.text), tokenizer, split_special_tokens=True)
        ids = np.concatenate([bos, *(ids for ids, _, _ in parts), [tokenizer.eos_token_id]]).astype(np.int32)
        starts = range(0, len(ids) - 1, cutoff_len - 1)
        found.append([_example(ids[start : start + cutoff_len]) for start in starts])
    return found


def _example(ids: np.ndarray) -> Example:
    labels = ids.copy()
    labels[0] = IGNORED
    return Example(ids, labels, is_text=True)


def _parts(text: str) -> list[str]:
    parts = []
    while len(text) > PART_CHARACTERS:
        cut = max(text.rfind(" ", 1, PART_CHARACTERS), text.rfind("\n", 1, PART_CHARACTERS))
        cut = cut if cut > 0 else PART_CHARACTERS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]
