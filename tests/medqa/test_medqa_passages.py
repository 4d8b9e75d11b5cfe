"""Is a text without a question learned whole: every token once, wherever it is cut, and nothing of it left out?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from medqa_runs import needs_shared
from paths import SHARED
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import corpus, data, passages, readers
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.passages import encode_passages
from zerolite.medqa.prompts import IGNORED
from zerolite.medqa.rows import Conversation, Passage, usable

SHIPPED = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
PAIR = {"instruction": "What is gout?", "output": "Crystals in a joint."}
words = st.text(st.sampled_from("ab 发烧.\n🙂<>/s|e1"), min_size=1, max_size=300).filter(str.strip)


@given(words, st.integers(16, 40))
def test_every_token_but_the_first_is_predicted_once(text, cutoff):
    (examples,) = encode_passages([Passage(text)], SHIPPED, cutoff)
    plain = SHIPPED(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    whole = [SHIPPED.bos_token_id, *plain, SHIPPED.eos_token_id]
    assert [token for one in examples for token in one.labels.tolist() if token != IGNORED] == whole[1:]
    assert examples[0].input_ids[0] == whole[0]
    for one, after in zip(examples, examples[1:], strict=False):
        assert one.input_ids[-1] == after.input_ids[0]  # what the first token behind a cut is predicted from
    for one in examples:
        assert 2 <= len(one.input_ids) <= cutoff and one.is_text
        assert (one.labels[1:] == one.input_ids[1:]).all() and one.labels[0] == IGNORED


@needs_shared
def test_texts_begin_with_bos_where_the_tokenizer_has_one():
    for name in ("mistral-v1", "minimind-6400"):
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
        ((example,),) = encode_passages([Passage("Fever. 发烧。 </s> <|im_end|>")], tokenizer, 512)
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert example.input_ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in example.input_ids[1:-1]
        tokenizer.bos_token = None
        ((without,),) = encode_passages([Passage("Fever.")], tokenizer, 512)
        assert tokenizer.decode(without.input_ids[:-1]).strip() == "Fever."


def test_a_book_is_tokenised_in_parts(monkeypatch):
    text = "".join(f"Chapter {number}. 发烧是体温升高。 A fever is a raised temperature.\n" for number in range(60))
    ((whole,),) = encode_passages([Passage(text)], SHIPPED, 100_000)
    monkeypatch.setattr(passages, "PART_CHARACTERS", 200)
    ((parts,),) = encode_passages([Passage(text)], SHIPPED, 100_000)
    assert SHIPPED.decode(parts.input_ids) == SHIPPED.decode(whole.input_ids)
    unbroken = "热" * 1000
    ((parts,),) = encode_passages([Passage(unbroken)], SHIPPED, 100_000)
    assert SHIPPED.decode(parts.input_ids[1:-1]) == unbroken
    assert np.array_equal(whole.labels[1:], whole.input_ids[1:])


REFUSED = [
    ({"text": "A book.", "system": "Be short."}, "`system` beside `text`: a text is learned whole and has no prompt"),
    ({"text": "A book.", "prompt": "Go on:"}, "`prompt` beside `text`"),
    ({"text": "A book.", "tools": [1]}, "`tools` is not used"),
    ({"text": "A book.", "weight": 0}, "`weight` of a row is not used"),
    ({"text": "A book.", "group": 1.5}, "group: expected a text or a whole number, got 1.5"),
    ({"text": " \u200b"}, "text: is empty but for invisible characters"),
    ({"text": 3}, "text: expected a text, got 3"),
    ({"text": None}, "text: expected a text, got null"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_rows_with_a_prompt_beside_the_text_are_refused(row, reason):
    with pytest.raises(ValueError) as error:
        usable(row)
    assert reason in str(error.value)


def test_texts_and_conversations_stand_in_one_file(tmp_path):
    rows = [PAIR, {"text": "A book.", "instruction": None, "url": "x", "group": 7}, {**PAIR, "text": "as a prompt"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = data.read([path], usable=usable)
    assert str(found) == "3 rows read, 3 kept, 0 rejected; 1 of them are texts without a question"
    assert found.kept == [Conversation((("What is gout?", "Crystals in a joint."),))] * 2
    assert found.passages == [Passage("A book.")] and found.passages[0].group == "7"
    assert found.details() == ["keys that are not used (in rows): url (1), text (1)"]
    assert len(data.read([path], usable=usable, max_samples=2).kept) == 1
    encoded = corpus.encode_rows("train", [*found.kept, *found.passages], SHIPPED, 64)
    assert [example.is_text for example in encoded.examples] == [False, False, True]
    assert "1 texts in 1 examples, 0 of them cut and nothing left out" in encoded.told
    with pytest.raises(DataError, match="line 2: .*a text to be learned whole is neither question nor answer"):
        data.read([path])  # who needs questions says so


def test_a_column_may_be_the_text(tmp_path):
    path: Path = tmp_path / "x.csv"
    path.write_text("title,body\nGout,Crystals lie in a joint.\n")
    assert data.read([path], rows_of=readers.reader("text=body"), usable=usable).passages == [
        Passage("Crystals lie in a joint.")
    ]
    with pytest.raises(ValueError, match="expected at least question=COLUMN and answer=COLUMN, or text=COLUMN"):
        readers.reader("text=body,question=title")
