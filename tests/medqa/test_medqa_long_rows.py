"""A row of any length gives the tokens that it gave when all of it was tokenised, and costs what its cut-off costs."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from transformers import AutoTokenizer

from zerolite.medqa import prompts, tokens
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Conversation

FOLDERS = [CORPUS / "tokenizer", SHARED / "tokenizers" / "mistral-zh-merged", SHARED / "tokenizers" / "minimind-6400"]
TOKENIZERS = [AutoTokenizer.from_pretrained(folder) for folder in FOLDERS if folder.is_dir()]

words = st.sampled_from(["a", "fever", "咳嗽怎么办", "\n\n", " 37.5 °C", "</s>", "🙂", "- ", "   ", "antidisest"])
texts = st.lists(words, min_size=1, max_size=400).map("x".join).filter(str.strip)
conversations = st.builds(
    Conversation, turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(tuple), system=st.just("") | texts
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: str(len(tokenizer)))
@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(conversation=conversations, cutoff_len=st.integers(64, 160))
def test_a_part_gives_the_tokens_of_the_whole(tokenizer, conversation, cutoff_len):
    """With the limits of a long row set so low that these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "WHOLE_CHARACTERS", 1 << 30)
        (whole,), num_whole = prompts.encode([conversation], tokenizer, cutoff_len)
        start = prompts.first_prompt(conversation, tokenizer, cutoff_len).ids
        patch.setattr(prompts, "WHOLE_CHARACTERS", 40)
        patch.setattr(prompts, "CHARACTERS_A_TOKEN", 1)
        (part,), num_part = prompts.encode([conversation], tokenizer, cutoff_len)
        assert prompts.first_prompt(conversation, tokenizer, cutoff_len).ids == start
    np.testing.assert_array_equal(part.input_ids, whole.input_ids)
    np.testing.assert_array_equal(part.labels, whole.labels)
    assert num_part == num_whole


@pytest.mark.parametrize("text", ["x " * 4_000_000, "x" * 8_000_000, "a" + " " * 8_000_000 + "b"], ids=len)
def test_a_row_of_megabytes_is_not_tokenised_whole(monkeypatch, text):
    num_characters = 0
    tokenize = tokens.tokenize

    def count(strings, *more, **named):
        nonlocal num_characters
        num_characters += sum(map(len, strings))
        return tokenize(strings, *more, **named)

    monkeypatch.setattr(tokens, "tokenize", count)
    monkeypatch.setattr(prompts, "tokenize", count)
    row = Conversation(turns=((text, text), (text, text)))
    tracemalloc.start()
    (example,), num_shortened = prompts.encode([row], TOKENIZERS[0], 48)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 10 < len(example.input_ids) <= 48 and num_shortened == 1
    assert num_characters <= 5 * prompts.WHOLE_CHARACTERS and peak_bytes < 8 * len(text)
