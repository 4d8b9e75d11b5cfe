"""Does the desk behind the pages give each page its own answer, one at a time, and go on after a stop and an error?"""

from __future__ import annotations

import threading

import pytest
import torch
from limits import load
from medqa_runs import write_talker
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerolite.medqa import desk, generation, opening
from zerolite.medqa.answers import CUT_OFF
from zerolite.medqa.data import Conversation

SETTINGS = generation.Settings(max_new_tokens=12)
ENGLISH, CHINESE = "What helps against a cough?", "感冒了应该怎么办？"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two of PEFT's own, each of which changes every answer; the second lies in a run's result."""
    folder, found = tmp_path_factory.mktemp("adapters"), []
    for number, path in enumerate((folder / "one", folder / "run" / "adapter")):
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(path)
        found.append(path)
    return [found[0], found[1].parent]


@pytest.fixture
def asked(base):
    made = desk.Desk(opening.open_variants(base, []), SETTINGS)
    yield made
    made.close()


def said_by_transformers(model, folder, *texts: str, system: str = "") -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text if ids[-1] in ends else text.rstrip("\ufffd") + CUT_OFF


@pytest.mark.parametrize("question", [ENGLISH, CHINESE])
def test_an_answer_grows_to_that_of_transformers_and_is_history_then(question, base, asked):
    model, dialogue = AutoModelForCausalLM.from_pretrained(base), desk.Dialogue()
    said = list(asked.answer("page", dialogue, None, "Be brief.", question))
    texts = [one.text for one in said]
    assert len(texts) > 3 and texts[0] == "" and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert texts[-1] == said_by_transformers(model, base, question, system="Be brief.")
    assert said[-1].prompt.loss == "" and said[-1].limit == 12 and not said[-1].error
    first = texts[-1].removesuffix(CUT_OFF)
    *_, last = asked.answer("page", dialogue, None, "Be brief.", "And?")
    assert last.text == said_by_transformers(model, base, question, first, "And?", system="Be brief.")
    assert not last.is_new_dialogue and len(dialogue.turns) == 2
    *_, last = asked.answer("page", dialogue, None, "", "And?")
    assert last.text == said_by_transformers(model, base, "And?") and last.is_new_dialogue


def test_each_adapter_answers_as_pefts_and_none_as_the_base(base, adapters):
    variants = opening.open_variants(base, adapters)
    assert list(variants) == [*adapters, None]
    folders = {str(adapters[0]): adapters[0], str(adapters[1]): adapters[1] / "adapter", None: None}
    made, dialogue, said = desk.Desk(variants, SETTINGS), desk.Dialogue(), {}
    for chosen in [*folders, *folders]:
        model = AutoModelForCausalLM.from_pretrained(base)
        if folders[chosen]:
            model = PeftModel.from_pretrained(model, folders[chosen])
        *_, last = made.answer("page", dialogue, chosen, "", CHINESE)
        assert last.text == said_by_transformers(model, base, CHINESE)
        said[chosen] = last.text
    made.close()
    assert len(set(said.values())) == 3
    (first, *_) = opening.open_variants(adapters[0], adapters[1:]).values()  # MODEL may be an adapter itself
    assert first.opened.folder == adapters[0]


def test_an_adapter_that_is_none_of_the_base_is_named(base, adapters, tmp_path):
    other = write_talker(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(other), LoraConfig(target_modules=["q_proj"], r=4))
    model.save_pretrained(tmp_path / "wide")
    weights = tmp_path / "wide" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: torch.cat([value, value]) if "lora_B" in key else value for key, value in tensors.items()}, weights)
    for folder, reason in (
        (tmp_path / "gone", "no such folder"),
        (base, "no adapter_config.json"),
        (tmp_path / "wide", "lora_B"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            opening.open_variants(base, [adapters[0], folder])
        assert str(folder) in str(caught.value)


def test_a_stop_keeps_what_was_said_and_the_next_answer_is_right(base, asked):
    dialogue, answer = desk.Dialogue(), None
    for said in (answer := asked.answer("page", dialogue, None, "", ENGLISH)):
        if said.text:
            asked.stop("page")
    whole = said_by_transformers(AutoModelForCausalLM.from_pretrained(base), base, ENGLISH)
    assert said.is_stopped and whole.startswith(said.text) and said.text != whole
    assert dialogue.turns == [(ENGLISH, said.text)] and list(answer) == []
    *_, last = asked.answer("page", desk.Dialogue(), None, "", ENGLISH)
    assert last.text == whole


class Gate:
    """Holds every generation before it begins, and counts how many run at once."""

    def __init__(self, monkeypatch):
        self.open, self.num_inside, self.most, self.num = threading.Event(), 0, 0, 0
        replies = desk.replies

        def counted(*arguments):
            self.num_inside += 1
            self.num, self.most = self.num + 1, max(self.most, self.num_inside)
            try:
                assert self.open.wait(60 * load())
                return replies(*arguments)
            finally:
                self.num_inside -= 1

        monkeypatch.setattr(desk, "replies", counted)


def test_pages_are_answered_one_at_a_time_and_a_waiting_one_may_stop(base, asked, monkeypatch):
    gate, model = Gate(monkeypatch), AutoModelForCausalLM.from_pretrained(base)
    answers = [asked.answer(str(page), desk.Dialogue(), None, "", f"{page}: {CHINESE}") for page in range(4)]
    assert [next(answer).num_before for answer in answers] == [0, 1, 2, 3]
    asked.stop("1")
    (stopped,) = answers[1]  # though the answer before it has not ended
    assert stopped.is_stopped and stopped.text == ""
    answers[2].close()  # the page was closed
    gate.open.set()
    for page in (0, 3):
        *_, last = answers[page]
        assert last.text == said_by_transformers(model, base, f"{page}: {CHINESE}")
    assert gate.num == 2 and gate.most == 1 and not asked.running


def test_a_closed_page_ends_its_generation(base, asked, monkeypatch):
    ids: list[int] = []
    put = desk.StoppableStream.put
    monkeypatch.setattr(desk.StoppableStream, "put", lambda stream, value: (put(stream, value), ids.append(1)))
    answer = asked.answer("page", desk.Dialogue(), None, "", ENGLISH)
    for said in answer:
        if said.text:
            break
    answer.close()
    *_, last = asked.answer("other", desk.Dialogue(), None, "", ENGLISH)
    assert last.text and len(ids) < 2 * 13  # the second took 13: the prompt and 12 tokens


def test_an_error_is_said_and_the_page_goes_on(base, asked, monkeypatch, capsys):
    dialogue = desk.Dialogue()
    with monkeypatch.context() as patch:
        patch.setattr(desk, "replies", lambda *_: 1 / 0)
        *_, last = asked.answer("page", dialogue, None, "", ENGLISH)
        assert last.error.startswith("ZeroDivisionError") and "Traceback" in capsys.readouterr().err
    *_, last = asked.answer("page", dialogue, None, "", "\ud800")
    assert "surrogate" in last.error and "Traceback" not in capsys.readouterr().err
    *_, last = asked.answer("page", dialogue, None, "", ENGLISH)
    assert last.text and not last.error and [question for question, _ in dialogue.turns] == [ENGLISH]


def test_what_has_no_room_is_told(base, asked):
    dialogue = desk.Dialogue(turns=[("0 " + "cough and fever " * 12, "Drink."), ("Pain?", "Rest.")])
    *_, last = asked.answer("page", dialogue, None, "", "1 " + "cough and fever " * 66)
    assert last.prompt.num_turns_lost >= 1 and len(dialogue.turns) == 3 - last.prompt.num_turns_lost


def test_conversations_of_the_desk_are_those_of_ask(base, asked):
    found = generation.reply(opening.open_model(base), Conversation(((CHINESE, ""),)), SETTINGS)
    *_, last = asked.answer("page", desk.Dialogue(), None, "", f"  {CHINESE}\n")
    assert last.text == found.text
