"""Does `zerolite chat` ask with the whole dialogue, as the model's template renders it, and say what it forgot?"""

from __future__ import annotations

import io
import sys

import pytest
from medqa_runs import write_talker
from transformers import AutoTokenizer

from zerolite import cli
from zerolite.medqa import chat, generation, opening
from zerolite.medqa.answers import CUT_OFF, NOTICE
from zerolite.medqa.data import Conversation
from zerolite.medqa.prompts import prompt_of

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("base"))


def piped(monkeypatch, text: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding=encoding))


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The ids of every prompt that a model was given."""
    seen = []

    def recording(opened, conversations, *rest):
        found = replies(opened, conversations, *rest)
        seen.extend(one.prompt.ids for one in found)
        return found

    replies = generation.replies
    monkeypatch.setattr(generation, "replies", recording)
    return seen


def talk(base, *arguments) -> int:
    return cli.main(["chat", str(base), "--max_new_tokens", str(NUM_TOKENS), *arguments])


def test_a_question_is_asked_behind_all_that_was_said_since_the_reset(base, monkeypatch, capsys, prompts):
    piped(
        monkeypatch,
        "A cough?\n\n感冒了？\n/reset\nA fever?\n/system 请简短回答。\n/nothing\nPain?\n/quit\nNo.\n".encode(),
    )
    assert talk(base, "--system", "Be brief.") == 0
    out, err = capsys.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(base)

    def expected(system, *texts):
        roles = ["user", "assistant"] * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        messages.insert(0, {"role": "system", "content": system})
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    opened = opening.open_model(base)
    first = generation.reply(
        opened, Conversation((("A cough?", ""),), "Be brief."), generation.Settings(max_new_tokens=NUM_TOKENS)
    )
    assert out.startswith(first.text + "\n")
    assert prompts[:4] == [
        expected("Be brief.", "A cough?"),
        expected("Be brief.", "A cough?", first.text.removesuffix(CUT_OFF), "感冒了？"),
        expected("Be brief.", "A fever?"),
        expected("请简短回答。", "Pain?"),
    ]
    assert err.count(NOTICE) == 1 and "there is no /nothing" in err and "请简短回答。" in err


def test_history_without_room_loses_its_oldest_turns_and_says_so(base, monkeypatch, capsys, prompts):
    lines = [f"{number} " + "cough and fever " * 12 for number in range(6)]
    piped(monkeypatch, "\n".join(lines).encode())
    assert talk(base, "--system", "Be brief.") == 0
    err = capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(base)
    last = tokenizer.decode(prompts[5])
    forgotten = [line.partition("it: ")[2] for line in err.splitlines() if line.startswith("forgotten")]
    assert len(forgotten) > 1 and set(forgotten) == {"the oldest turn"}  # each is forgotten once
    assert len(prompts) == 6 and all(len(ids) <= 256 - NUM_TOKENS for ids in prompts)
    assert "5 cough" in last and "4 cough" in last and "0 cough" not in last and "Be brief." in last


@pytest.mark.parametrize("encoding", ["ascii", "gb18030"])
def test_no_encoding_of_a_terminal_ends_a_dialogue(encoding, base, monkeypatch, prompts):
    """UTF-8 at a terminal of ASCII is read as such; what a terminal cannot show is replaced."""
    sent = "感冒了？\n".encode("utf-8" if encoding == "ascii" else encoding) + b"\xff\xff broken\nfever?\n"
    piped(monkeypatch, sent, encoding)
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert talk(base) == 0
    assert len(prompts) == 3
    assert "感冒了？" in AutoTokenizer.from_pretrained(base).decode(prompts[0])


def test_ctrl_c_ends_an_answer_on_a_terminal_and_a_dialogue_in_a_pipe(base, monkeypatch, capsys):
    opened = opening.open_model(base)
    dialogue = chat.Dialogue(opened, generation.Settings(max_new_tokens=NUM_TOKENS))
    put, num_puts = generation.Stream.put, [0]

    def interrupted(stream, value):
        num_puts[0] += 1
        if num_puts[0] == 6:
            raise KeyboardInterrupt
        put(stream, value)

    monkeypatch.setattr(generation.Stream, "put", interrupted)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    dialogue.ask("A cough?")
    out, err = capsys.readouterr()
    assert "stopped" in err and dialogue.turns == [("A cough?", out.removesuffix("\n"))] and out.strip()
    num_puts[0] = 0
    piped(monkeypatch, b"A cough?\nA fever?\n")
    assert talk(base) == 130


def test_the_prompt_of_a_dialogue_is_the_templates(base):
    """Of transformers' own rendering, and what has no room is told."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = ("Cough?", "Drink."), ("发烧了", "多休息。"), ("And <|end|> now?", "")
    whole = prompt_of(Conversation(turns[:2]), tokenizer, 512)
    messages = [
        {"role": role, "content": text}
        for turn in turns[:2]
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    expected = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole.ids == expected and whole.loss == ""
    shorter = prompt_of(Conversation(turns, "Be brief."), tokenizer, len(expected) - 8)
    assert shorter.num_turns_lost >= 1 and len(shorter.ids) <= len(expected) - 8
    assert shorter.ids.count(tokenizer.eos_token_id) == 2 - shorter.num_turns_lost  # of answers, never of a question
