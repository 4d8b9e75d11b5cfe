"""Does every key of a row that carries meaning reach the model, or is the row refused by that key's name?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from zerolite import DataError
from zerolite.medqa import data
from zerolite.medqa.arguments import CORPUS
from zerolite.medqa.prompts import IGNORED, encode
from zerolite.medqa.rows import Conversation, conversation

PAIR = {"instruction": "What is gout?", "output": "Crystals in a joint."}
PLAIN = Conversation((("What is gout?", "Crystals in a joint."),))
USER = {"role": "user", "content": "What is gout?"}
BOT = {"role": "assistant", "content": "Crystals in a joint."}
WRONG = {"role": "assistant", "content": "四十片 forty tablets."}


def chat(*messages: dict, **more: object) -> dict:
    return {"messages": list(messages), **more}


def test_history_and_system_are_part_of_the_conversation():
    history = [["什么是发烧？", "体温升高。"], ["And a cough?", "A reflex."]]
    found = conversation({**PAIR, "history": history, "system": " You are a pharmacist. "})
    assert found == Conversation((*map(tuple, history), *PLAIN.turns), "You are a pharmacist.")
    assert conversation(chat(USER, BOT, system="Be short.")) == Conversation(PLAIN.turns, "Be short.")
    said = {"role": "system", "content": "Be short."}
    assert conversation(chat(said, USER, BOT, system="Be short.")) == Conversation(PLAIN.turns, "Be short.")


@pytest.mark.parametrize("nothing", [None, "", " \n", math.nan, [], {}, "\u200b", "\ufeff\u2060"])
def test_what_says_nothing_is_absent(nothing):
    absent = dict.fromkeys(("input", "history", "system", "messages", "tools", "reasoning_content", "weight"), nothing)
    assert conversation({**PAIR, **absent}) == PLAIN
    joined = dict.fromkeys(("instruction", "input", "output", "history", "system", "tools"), nothing)
    empty = {"role": "system", "content": nothing}
    assert conversation({**chat(empty, USER, {**BOT, "tool_calls": nothing}), **joined}) == PLAIN


@pytest.mark.parametrize(
    ("switch", "value"), [("weight", 0), ("weight", 0.0), ("train", False), ("trainable", 0), ("loss", False)]
)
def test_an_answer_without_weight_has_no_loss_and_all_else_has(switch, value):
    """In every position, also where the row is cut; the other answers keep the labels that they have without it."""
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    rows = [chat(USER, {**WRONG, switch: value}, USER, BOT), chat(USER, WRONG, USER, BOT)]
    (silent, full), _ = encode([conversation(row) for row in rows], tokenizer, 512)
    assert silent.input_ids.tolist() == full.input_ids.tolist()
    learned = [tokenizer.decode(e.input_ids[e.labels != IGNORED]) for e in (silent, full)]
    assert learned[0] == BOT["content"] + tokenizer.eos_token
    assert learned[1] == WRONG["content"] + tokenizer.eos_token + learned[0]
    (short,), shortened = encode([conversation(rows[0])], tokenizer, len(full.input_ids) - 3)
    assert shortened == 1 and "forty" not in tokenizer.decode(short.input_ids[short.labels != IGNORED])
    assert short.num_labels > 0


def test_nothing_is_kept_behind_the_last_answer_with_loss():
    found = conversation(chat(USER, BOT, USER, {**WRONG, "weight": 0}))
    assert found == PLAIN
    middle = conversation(chat(USER, BOT, USER, {**WRONG, "weight": 0}, USER, {**BOT, "weight": 1}))
    assert middle.trained == (True, False, True)


REFUSED = [
    ({**PAIR, "tools": [{"name": "drug_lookup"}]}, "`tools` is not used"),
    ({**PAIR, "reasoning": "Calcium binds."}, "`reasoning` is not used"),
    ({**PAIR, "images": ["x.png"]}, "`images` is not used"),
    ({**PAIR, "context": "An abstract."}, "`context` is not used"),
    ({**PAIR, "weight": 0}, "`weight` of a row is not used"),
    ({**PAIR, "train": False}, "`train` of a row is not used"),
    ({**PAIR, "history": "earlier"}, "history: expected a list"),
    ({**PAIR, "history": [["only a question"]]}, "history 0: expected [question, answer]"),
    ({**PAIR, "history": [["q", ""]]}, "history 0: answer: is empty"),
    ({**PAIR, "system": 3}, "system: expected a text, got 3"),
    (chat(USER, {**BOT, "tool_calls": [{"id": 1}]}), "message 1: `tool_calls` is not used"),
    (chat(USER, {**BOT, "reasoning_content": "想一想"}), "message 1: `reasoning_content` is not used"),
    (chat({**USER, "name": "Ann"}, BOT), "message 0: `name` is not used"),
    (chat({**USER, "train": True}, BOT), "message 0: `train` asks for loss on a user message"),
    (chat({**USER, "weight": 2}, BOT), "message 0: `weight`: expected 0 or 1"),
    (chat(USER, {**BOT, "weight": 0.5}), "message 1: `weight`: expected 0 or 1"),
    (chat(USER, {**BOT, "train": "no"}), "message 1: `train`: expected 0 or 1"),
    (chat(USER, {**BOT, "weight": 1, "train": False}), "message 1: `weight` and `train` contradict"),
    (chat(USER, {**BOT, "weight": 0}), "no answer of the row has loss"),
    (chat(USER, BOT, instruction="Be short."), "has both `messages` and `instruction`"),
    (chat({"role": "system", "content": "a"}, USER, BOT, system="b"), "both a `system` and a system message"),
    ({"instruction": " <user>: 你好 <bot>: 你好", "output": "a"}, "expected <user>: and <bot>: in turn"),
    ({"instruction": "<user>: 你好 <bot>:  <user>: 什么", "output": "a"}, "instruction: <bot>: is empty"),
    ({"text": "A book."}, "a text to be learned whole is neither question nor answer"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs of preferences are not learned from"),
    ({"query": "q", "response": "a"}, "--columns question=query,answer=response says what they are"),
    ({"conversations": []}, "ShareGPT"),
    ({"instruction": None, "output": None}, "instruction: expected a text, got null"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_what_is_not_used_is_refused_by_name(row, reason):
    with pytest.raises(ValueError) as error:
        conversation(row)
    assert reason in str(error.value)


INVISIBLE = ["\u200b", "\ufeff", "\u2060", "\u00ad", "\u3164", "\ufffd" * 3, "\x01\x02", "\u3000", "\u00a0", "\u0301"]


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_text_without_a_visible_character_is_empty(text):
    with pytest.raises(ValueError, match="output: is empty"):
        conversation({**PAIR, "output": text})
    assert conversation({**PAIR, "output": f"{text}是"}).turns[0][1].endswith("是")


@pytest.mark.parametrize("text", ["🙂", "٣", "é", "한", "℃", "1", "\ue000", "e\u0301"], ids=ascii)
def test_texts_of_one_visible_character_are_kept(text):
    assert conversation({**PAIR, "output": text}).turns[0][1] == text


def test_a_dialogue_in_one_string_is_turns():
    row = {
        "instruction": " <user>: 你好，什么是肝癌？ <bot>: 一种肿瘤。 <user>: 怎么治？",
        "input": "",
        "output": "请看医生。",
    }
    assert conversation(row).turns == (("你好，什么是肝癌？", "一种肿瘤。"), ("怎么治？", "请看医生。"))
    assert conversation({**row, "instruction": "What does <user>: mean?"}).turns[0][0] == "What does <user>: mean?"


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_key_twice_is_an_error_in_both_file_layouts(tmp_path):
    twice = '{"instruction": "a", "output": "b", "output": "see above"}'
    deep = '{"messages": [{"role": "user", "role": "user", "content": "a"}]}'
    for bad in (twice, deep):
        for lines in ([json.dumps(PAIR), bad], ["[" + json.dumps(PAIR) + ",", bad + ",", json.dumps(PAIR) + "]"]):
            path = written(tmp_path / "rows", *lines)
            with pytest.raises(DataError, match=r"rows, line 2: has the key \"\w+\" twice"):
                data.read([path])
            assert [reject.line for reject in data.read([path], skip_invalid=True).rejected] == [2]


def test_the_summary_tells_rows_of_each_file_and_unused_keys(tmp_path):
    first = written(tmp_path / "a", json.dumps({**PAIR, "id": 1, "topic": "gout"}), json.dumps({**PAIR, "topic": ""}))
    second = written(tmp_path / "b", json.dumps({}), json.dumps(chat(USER, {**BOT, "rating": 5})))
    found = data.read([first, second], skip_invalid=True)
    assert found.details() == [
        f"{first}: 2 kept, 0 rejected",
        f"{second}: 1 kept, 1 rejected",
        "keys that are not used (in rows): topic (2), messages: rating (1)",
    ]
    assert data.read([written(tmp_path / "c", json.dumps({**PAIR, "id": 1}))]).details() == []


def test_an_empty_file_beside_a_good_one_is_told(tmp_path):
    good = written(tmp_path / "good", json.dumps(PAIR))
    for content in ("", "\n \n", "[]"):
        with pytest.raises(DataError, match="none.jsonl: no usable row: the file holds none"):
            data.read([good, written(tmp_path / "none.jsonl", content)], skip_invalid=True)
