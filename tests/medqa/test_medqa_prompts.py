"""Token ids and labels: loss on answers and their EOS only, whatever the tokenizer; and the shipped tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import corpus, data, template, tokenizer
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.data import Conversation
from zerolite.medqa.prompts import IGNORED, Example, encode, first_prompt

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


@pytest.fixture(params=TOKENIZERS, ids=lambda folder: folder.name)
def tok(request):
    if not request.param.is_dir():
        pytest.skip(f"{request.param.name}: shared tokenizers not beside the repository")
    opened = AutoTokenizer.from_pretrained(request.param)
    template.choose(opened, None)
    return opened


def messages_of(conversation: Conversation) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for question, answer in conversation.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def runs(ids: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """The ids of each run of learned positions."""
    learned = (labels != IGNORED).astype(int)
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()
    borders = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]])))
    return [ids[a:b].tolist() for a, b in zip(borders[::2], borders[1::2], strict=True)]


def test_the_ids_of_training_are_those_of_the_written_template(tok, tmp_path):
    """Of what transformers makes of the tokenizer's folder; the marks of that template are the labels."""
    tok.save_pretrained(tmp_path)
    written = AutoTokenizer.from_pretrained(tmp_path)
    two = (*DIALOGUE.turns[:1], ("And a fever?", "Rest, and see a doctor."))
    for turns in (two[:1], two, (("a", "b"), ("- c  d", "1. e\n\n\n2. f"), ("¿g?", "¡h!"))):
        row = Conversation(turns, DIALOGUE.system)
        (example,), num_shortened = encode([row], tok, 512)
        expected = written.apply_chat_template(messages_of(row), return_dict=True, return_assistant_tokens_mask=True)
        assert num_shortened == 0 and example.input_ids.dtype == np.int32
        assert example.input_ids.tolist() == expected["input_ids"]
        assert (example.labels != IGNORED).astype(int).tolist() == expected["assistant_masks"]
        asked = written.apply_chat_template(messages_of(row)[:2], add_generation_prompt=True, return_dict=False)
        assert first_prompt(row, tok, 512).ids == asked == expected["input_ids"][: len(asked)]


def test_loss_is_on_answers_and_their_end_only(tok):
    """A special token's name inside a text stays text, in what is given and in what is learned."""
    eos = tok.eos_token
    row = Conversation(
        ((f"a {eos} b", "多喝水。"), ("And a fever?", f"Rest, and {eos} see a doctor.")), "Answer briefly."
    )
    (example,), _ = encode([row], tok, 512)
    found = runs(example.input_ids, example.labels)
    assert [ids[-1] for ids in found] == [tok.eos_token_id] * 2
    assert [tok.decode(ids[:-1]).strip() for ids in found] == [answer for _, answer in row.turns]
    assert all(tok.eos_token_id not in ids[:-1] for ids in found)
    given = tok.decode(example.input_ids[example.labels == IGNORED])
    assert "Answer briefly." in given and "And a fever?" in given and "多喝水" not in given


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(*[st.integers(1, 60)] * 2), min_size=1, max_size=4),
    cutoff=st.integers(40, 120),
    system=st.sampled_from(["", "Be brief. " * 3]),
)
def test_shortening(turns, cutoff, system):
    """At most cutoff_len tokens; whole turns go first; then the question keeps its end and the answer its beginning."""
    row = Conversation(tuple(("q" + " 咳嗽" * q, "a" + " fever" * a) for q, a in turns), system.strip())
    (whole,), _ = encode([row], SHIPPED, 10_000)
    (example,), num_shortened = encode([row], SHIPPED, cutoff)
    assert num_shortened == (len(whole.input_ids) > cutoff)
    if not num_shortened:
        assert example.input_ids.tolist() == whole.input_ids.tolist()
        return
    assert len(example.input_ids) <= cutoff
    found = [SHIPPED.decode(ids) for ids in runs(example.input_ids, example.labels)]
    assert all(text.endswith(SHIPPED.eos_token) for text in found)
    answers = [answer for _, answer in row.turns][-len(found) :]
    if len(found) > 1:
        assert [text.removesuffix(SHIPPED.eos_token) for text in found] == answers
    assert answers[0].startswith(found[0].removesuffix(SHIPPED.eos_token))
    given = SHIPPED.decode(example.input_ids[example.labels == IGNORED])
    if len(found) == 1:
        kept = given.split("### Question:\n")[1].split("\n\n### Answer:")[0]
        assert row.turns[-1][0].endswith(kept)
        is_cut = kept != row.turns[-1][0] or found[0].removesuffix(SHIPPED.eos_token) != answers[0]
        assert not is_cut or len(example.input_ids) > cutoff - 4, "what has room is not cut"


def test_a_cutoff_without_room_for_the_template_is_refused():
    with pytest.raises(ValueError, match=r"cutoff_len: 10 tokens have no room for the chat template's own \d+"):
        encode([DIALOGUE], SHIPPED, 10)


def test_what_trains_can_be_asked():
    """At any cutoff_len that a row of training fits into, its prompt fits too, and leaves an answer a token."""
    lengths = []
    for cutoff_len in range(8, 80):
        try:
            encode([DIALOGUE], SHIPPED, cutoff_len)
        except ValueError:
            assert not lengths, "what has room with less has room with more"
            continue
        lengths.append((len(first_prompt(DIALOGUE, SHIPPED, cutoff_len).ids), cutoff_len))
    assert len(lengths) > 40 and all(length < cutoff_len for length, cutoff_len in lengths)
    assert lengths[0][0] > lengths[0][1] // 2, "the template alone takes more than half of the smallest one"


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
    assert len(SHIPPED) == tokenizer.NUM_PIECES and SHIPPED.chat_template == template.ZEROLITE
    assert (SHIPPED.bos_token, SHIPPED.eos_token, SHIPPED.pad_token) == (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD)
    made = tokenizer.train(tokenizer.LEARNED_FROM).backend_tokenizer.to_str()
    assert json.loads(made) == json.loads((CORPUS / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
