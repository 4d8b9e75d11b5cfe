"""Token ids and labels: loss on answers and their EOS only, whatever the tokenizer; and the shipped tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import corpus, data, prompts, tokenizer
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Conversation
from zerolite.medqa.prompts import IGNORED, Example, encode, encode_prompt

SHIPPED = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
TOKENIZERS = [
    CORPUS / "tokenizer",
    SHARED / "tokenizers" / "mistral-zh-merged",  # no pad token, no chat template
    SHARED / "tokenizers" / "minimind-6400",  # byte level, its own chat template
    SHARED / "models" / "stories260K-hf",  # 512 pieces
]
DIALOGUE = Conversation(
    turns=(("咳嗽怎么办？", "多喝水。"), ("And a fever?", "Rest, and </s> see a doctor if it lasts.")),
    system="Answer briefly.",
)


@pytest.mark.parametrize("folder", TOKENIZERS, ids=lambda folder: folder.name)
def test_loss_is_on_answers_and_eos_only(folder):
    if not folder.is_dir():
        pytest.skip(f"{folder.name}: shared tokenizers not beside the repository")
    tok = AutoTokenizer.from_pretrained(folder)
    (example,), num_shortened = encode([DIALOGUE], tok, 512)
    ids, labels = example.input_ids, example.labels
    assert num_shortened == 0 and len(ids) == len(labels) and ids.dtype == np.int32
    learned = labels != IGNORED
    assert (labels[learned] == ids[learned]).all()
    ends = np.flatnonzero(ids == tok.eos_token_id)  # a special token's name inside a text stays text
    assert len(ends) == 2 and learned[ends].all()
    starts = np.flatnonzero(np.diff(learned.astype(int)) == 1) + 1
    answers = [tok.decode(ids[a:b]).strip() for a, b in zip(starts, ends, strict=True)]
    assert answers == [answer for _, answer in DIALOGUE.turns]
    asked = tok.decode(ids[: starts[0]], skip_special_tokens=True)
    assert "Answer briefly." in asked and "咳嗽怎么办？" in asked and "多喝水" not in asked
    if tok.bos_token_id is not None:
        assert ids[0] == tok.bos_token_id and (ids[1:] != tok.bos_token_id).all()


def test_what_is_asked_is_what_was_trained_on():
    (example,), _ = encode([DIALOGUE], SHIPPED, 512)
    prompt = encode_prompt(DIALOGUE, SHIPPED, 512)
    assert prompt == example.input_ids[: len(prompt)].tolist()
    assert example.labels[len(prompt)] != IGNORED and (example.labels[: len(prompt)] == IGNORED).all()
    assert encode_prompt(DIALOGUE, SHIPPED, 8) == [SHIPPED.bos_token_id, *prompt[-7:]]


def test_chat_template_is_the_same_format():
    messages = [{"role": "system", "content": DIALOGUE.system}]
    for question, answer in DIALOGUE.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (example,), _ = encode([DIALOGUE], SHIPPED, 512)
    assert SHIPPED.apply_chat_template(messages, return_dict=False) == example.input_ids.tolist()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
    cutoff=st.integers(16, 80),
    has_bos=st.booleans(),
)
def test_shortening(lengths, cutoff, has_bos):
    """At most cutoff_len tokens; every answer kept ends with EOS; nothing is cut that has room."""
    bos, eos = [-1] * has_bos, -2
    turns = [([100] * p + [101], [200] * a + [eos]) for p, a in lengths]  # 101: the end of "### Answer:"
    total = len(bos) + sum(len(p) + len(a) for p, a in turns)
    example, is_shortened = prompts._join(list(turns), bos, cutoff)
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    assert is_shortened == (total > cutoff) and len(ids) == min(len(ids), cutoff)
    assert ids[: len(bos)] == bos and ids[-1] == labels[-1] == eos
    assert [label for label in labels if label != IGNORED] == [i for i in ids if i in (200, eos)]
    if not is_shortened:
        assert len(ids) == total
    prompt, answer = turns[-1]
    room = cutoff - len(bos)
    if len(prompt) + len(answer) > room:  # one turn is left, and it fills the room, half to each where both are long
        assert len(ids) == cutoff and 101 in ids
        assert ids.count(100) + 1 >= min(len(prompt), room // 2)
        assert ids.count(200) + 1 >= min(len(answer), room - room // 2)


def test_a_set_without_labels_is_refused():
    empty = Example(np.array([1, 2], np.int32), np.array([IGNORED, IGNORED], np.int32))
    with pytest.raises(DataError, match="train: 1 rows without a single label token"):
        corpus.require_labels("train", [empty])


def test_corpus_is_large_enough_and_held_out():
    train, validation = (
        [row for file in sorted(CORPUS.glob(f"{name}.*.jsonl")) for row in data.read([file]).kept]
        for name in ("train", "validation")
    )
    assert sum(row.is_chinese for row in train) >= 400 and sum(not row.is_chinese for row in train) >= 400
    assert not {row.turns[0] for row in train} & {row.turns[0] for row in validation}
    assert not {row.turns[0][0] for row in train} & {row.turns[0][0] for row in validation}
    assert "NOT medical advice" in (CORPUS / "NOTICE.md").read_text(encoding="utf-8")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_shipped_tokenizer_gives_any_text_back(text):
    ids = SHIPPED(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert SHIPPED.decode(ids) == text


def test_shipped_tokenizer_is_what_its_script_makes():
    for text in ("Fever and cough 🤒🌡️", "高血压患者应低盐饮食。", "a\n\n\tb  c"):
        assert SHIPPED.decode(SHIPPED(text)["input_ids"]) == text
    assert len(SHIPPED) == tokenizer.NUM_PIECES and SHIPPED.chat_template == prompts.CHAT_TEMPLATE
    assert (SHIPPED.bos_token, SHIPPED.eos_token, SHIPPED.pad_token) == (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD)
    made = tokenizer.train(sorted(CORPUS.glob("train.*.jsonl"))).backend_tokenizer.to_str()
    assert json.loads(made) == json.loads((CORPUS / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
