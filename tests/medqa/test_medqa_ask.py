"""Does `zerolite ask` say what transformers says, of every kind of folder, and name what is wrong with one?"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from medqa_runs import to_flags, write_talker
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_medqa
from zerolite import cli
from zerolite.medqa import generation
from zerolite.medqa.answers import CUT_OFF, NOTICE
from zerolite.medqa.arguments import parse

QUESTIONS = "What helps against a cough?", "感冒了怎么办？", "Is a fever of 38 °C dangerous for a child of three years?"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """PEFT's own file, with a B that changes every answer."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def said_by_transformers(model, tokenizer, messages: list[dict], num_tokens: int = NUM_TOKENS) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    eos = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, eos_token_id=eos, pad_token_id=0)
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text if ids[-1] in eos else text.rstrip("\ufffd") + CUT_OFF


def ask(*arguments) -> int:
    return cli.main(["ask", *map(str, arguments), "--max_new_tokens", str(NUM_TOKENS)])


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_an_answer_is_that_of_transformers_and_peft_and_stdout_holds_nothing_else(kind, base, adapter, capsys):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if kind == "adapter":
        model = PeftModel.from_pretrained(model, adapter)
    for question in QUESTIONS:
        expected = said_by_transformers(
            model, tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        )
        assert ask(base if kind == "base" else adapter, question, "--system", "Be brief.") == 0
        out, err = capsys.readouterr()
        assert out == expected + "\n"
        assert err.count(NOTICE) == 1


def test_the_parts_of_a_streamed_answer_are_the_whole(base):
    """Of ids of every byte, cut inside of characters and words, with white space around."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(" \n 咳嗽。 What,\n\n  é 🙂  a\nb  ", add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids) + 1):
        parts: list[str] = []
        stream = generation.Stream(tokenizer, parts.append)
        stream.put(torch.tensor([[1, 2]]))  # the prompt
        for token in ids[:cut]:
            stream.put(torch.tensor([token]))
        whole = generation.text_of(ids[:cut], tokenizer, [])
        stream.finish(whole)
        assert "".join(parts) == whole
        assert "\ufffd" not in "".join(parts)


def test_a_batch_of_a_file_is_answered_as_one_by_one_and_an_ended_run_goes_on(base, tmp_path, capsys):
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = [
        {"question": QUESTIONS[0]},
        {"instruction": "感冒了", "input": "怎么办？"},
        {
            "messages": [
                {"role": r, "content": c} for r, c in (("system", "Kurz."), ("user", "A?"), ("assistant", "B."))
            ]
        },
        {"instruction": "And?", "history": [["Cough?", "Drink."], ["Fever?", "Rest."]], "output": "a reference"},
        {"question": QUESTIONS[0]},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert ask(base, "--questions", questions, "--answers", answers, "--batch_size", 4) == 0
    written = answers.read_bytes()
    found = [json.loads(line) for line in written.splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for row in found:
        messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        for asked, said in [*row.get("history", []), [row["question"], None]]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        assert row["answer"] == said_by_transformers(model, tokenizer, messages[:-1])
        assert row["notice"] == NOTICE and row["model"] == str(base)
        assert row["template"] == "the model's own"
    assert [row["question"] for row in found] == [QUESTIONS[0], "感冒了\n怎么办？", "A?", "And?", QUESTIONS[0]]
    assert len(found[3]["history"]) == 2 and found[2]["system"] == "Kurz."

    lines = written.splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed in a write
    assert ask(base, "--questions", questions, "--answers", answers) == 0
    assert answers.read_bytes() == written
    assert "3 answers written" in capsys.readouterr().err
    assert ask(base, "--questions", questions, "--answers", answers) == 0
    assert answers.read_bytes() == written
    assert ask(base, "--questions", questions, "--answers", answers, "--temperature", 1) == 2
    assert "temperature was 0.0 and is 1.0" in capsys.readouterr().err
    assert ask(base, "--questions", questions, "--answers", answers, "--template", "alpaca") == 2
    assert "template was" in capsys.readouterr().err
    assert ask(base, "--questions", questions, "--answers", questions) == 2
    assert answers.read_bytes() == written


def test_what_train_medqa_leaves_is_opened_and_its_checkpoint_says_the_same(base, tmp_path, capsys):
    """An output folder of a full run and of an adapter's: model/, adapter/ and checkpoint-N."""
    for method in ("full", "lora"):
        output, seen = tmp_path / method, set()
        options = {"model_name_or_path": base, "finetuning_type": method, "output_dir": output, "max_samples": 2}
        sizes = {"cutoff_len": 64, "max_steps": 2, "save_steps": 2, "learning_rate": 1e-2}
        assert train_medqa.train(train_medqa.prepare(parse(to_flags({**options, **sizes})))) == 0
        capsys.readouterr()
        for folder in (output, output / ("model" if method == "full" else "adapter"), output / "checkpoint-2"):
            assert ask(folder, QUESTIONS[1]) == 0
            seen.add(capsys.readouterr().out)
        assert ask(base, QUESTIONS[1]) == 0
        assert len(seen) == 1 and capsys.readouterr().out not in seen


def test_a_folder_that_cannot_be_opened_is_named_with_what_it_lacks(base, adapter, tmp_path, capsys):
    def copy(name, without=(), source=base):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns(*without))
        return tmp_path / name

    empty, file = tmp_path / "empty", tmp_path / "model.gguf"
    empty.mkdir()
    file.write_bytes(b"GGUF")
    pickled = copy("pickled", ["*.safetensors"])
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    partial = copy("partial", ["*.safetensors"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(partial, state_dict={k: v for k, v in model.state_dict().items() if "norm" not in k})
    orphan = copy("orphan", source=adapter)
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "meta-llama/Gone"}))
    cases = [
        (tmp_path / "gone", "no such folder"),
        (file, "is a file"),
        (empty, "it holds none of these"),
        (copy("untold", ["*token*", "*.jinja"]), "no usable tokenizer"),
        (pickled, "pytorch_model.bin, which are pickles"),
        (partial, "norm.weight"),
        (orphan, "meta-llama/Gone"),
    ]
    for folder, reason in cases:
        assert ask(folder, "Cough?") == 2
        out, err = capsys.readouterr()
        assert reason in err and str(folder) in err and "Traceback" not in err and not out, (folder, err)
    assert ask(orphan, "Cough?", "--base", base) == 0
    told = capsys.readouterr().out
    assert ask(adapter, "Cough?") == 0 and capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"question": ""}', "empty"),
        ('{"question": "a", "tools": ["x"]}', "tools"),
        ('{"text": "a"}', "expected one of"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "roles"),
        ("{", "not JSON"),
        ('{"question": "\\ud800"}', "surrogate"),
    ],
)
def test_a_row_that_is_no_question_is_named_by_its_line(row, reason, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text('{"question": "ok"}\n' + row + "\n")
    assert ask(tmp_path, "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl") == 2
    err = capsys.readouterr().err
    assert "q.jsonl, line 2" in err and reason in err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("q.txt", "感冒了？\n".encode("gb18030"), "q.txt, line 1: not UTF-8"),
        ("q.txt", b"\n \n", "no question"),
        ("q.csv", b"question\nFever?\n", "expected .jsonl"),
        ("a.jsonl", b"", "a.jsonl: no question"),
    ],
)
def test_a_file_that_holds_no_questions_is_named(name, content, reason, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert ask(tmp_path, "--questions", tmp_path / name, "--answers", tmp_path / "answers.jsonl") == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "answers.jsonl").exists()
    (tmp_path / "q.txt").write_text("Fever?\n")
    assert ask(tmp_path, "--questions", tmp_path / "q.txt", "--answers", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err


def test_options_may_stand_between_the_model_and_the_question(base, adapter, capsys):
    assert ask(adapter, QUESTIONS[1], "--base", base) == 0
    told = capsys.readouterr().out
    assert ask(adapter, "--base", base, QUESTIONS[1]) == 0 and capsys.readouterr().out == told
    assert ask("--base", base, adapter, QUESTIONS[1]) == 0 and capsys.readouterr().out == told


def test_ctrl_c_ends_with_130_and_unknown_commands_with_2(base, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and line in told for name, (_, line) in cli.COMMANDS.items())
    assert cli.main(["aks"]) == 2 and "did you mean ask" in capsys.readouterr().err
    assert cli.main(["ask"]) == 2 and cli.main(["ask", str(base)]) == 2
    assert cli.main(["ask", str(base), "Cough?", "--temperature", "-1"]) == 2
    monkeypatch.setattr(generation.Stream, "put", interrupt)
    capsys.readouterr()
    assert ask(base, "Cough?") == 130
    assert "Traceback" not in capsys.readouterr().err
