"""Do options that users of other programs type mean the same here, or get the right hint?"""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from zerolite.medqa import names, opening
from zerolite.medqa.arguments import FIELDS, Options, parse
from zerolite.medqa.model import load_tokenizer

BASE = ["--model_name_or_path", "x", "--finetuning_type", "lora"]


def changed(options: Options) -> dict:
    return {name: value for name, value in vars(options).items() if value != FIELDS[name].default}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lr", "3e-4", "--epochs=2"], {"learning_rate": 3e-4, "num_train_epochs": 2.0}),
        (["--batch-size", "2", "--output-dir", "a-b"], {"per_device_train_batch_size": 2, "output_dir": "a-b"}),
        (["--bf16"], {"precision": "bf16"}),
        (["--bf16", "True", "--fp16", "False"], {"precision": "bf16"}),
        (["--fp16=true", "--no-export"], {"precision": "fp16", "export": False}),
        (["--bf16", "false"], {"precision": "fp32"}),
        (["--fp16", "false"], {}),
        (["--optim", "adamw_torch", "--lr_scheduler_type", "constant_with_warmup"], {"lr_scheduler_type": "constant"}),
        (
            ["--max_length", "128", "--no-skip-invalid", "--train-file", "a", "b"],
            {"cutoff_len": 128, "train_file": "ab"},
        ),
        ([*BASE, "--lora_target", "q_proj, v_proj", "o_proj"], {"lora_target": ("q_proj", "v_proj", "o_proj")}),
        ([*BASE, "--lora-target-modules", "all"], {"lora_target": ("all-linear",)}),
        ([*BASE, "--lora_target", r".*[0-3]{1,2}.*q_proj"], {"lora_target": (r".*[0-3]{1,2}.*q_proj",)}),
        (["--resume_from_checkpoint", "absent/folder"], {"resume": "absent/folder"}),
    ],
)
def test_names_and_values_of_others_are_ours(argv, expected):
    known = {name: tuple(value) if name == "train_file" else value for name, value in expected.items()}
    found = changed(parse(argv))
    assert {name: found.get(name) for name in known} == known
    assert found.keys() - known.keys() <= {"model_name_or_path", "finetuning_type"}


def test_a_yaml_file_of_others_is_read_and_one_option_by_two_names_refused(tmp_path):
    file = tmp_path / "run.yaml"
    theirs = {"lr": "1.0e-4", "bf16": True, "fp16": False, "resume_from_checkpoint": None, "optim": "adamw_torch"}
    file.write_text(yaml.safe_dump(theirs))
    assert changed(parse(["--config", str(file)])) == {"learning_rate": 1e-4, "precision": "bf16"}
    for wrong, message in [
        ({"lr": 1, "learning_rate": 2}, "are one option, learning_rate: give it once"),
        ({"bf16": True, "precision": "fp32"}, "do not go together"),
        ({"stage": "sft"}, "'sft' is a kind of training elsewhere, here --stage is ZeRO's, 0 to 3"),
        ({"bf16": "yes"}, "unknown option 'bf16'"),
    ]:
        file.write_text(yaml.safe_dump(wrong))
        with pytest.raises(ValueError, match="run.yaml") as error:
            parse(["--config", str(file)])
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--deepspeed", "ds_z3.json"], "--stage 0, 1, 2 or 3 and --offload cpu say the same"),
        (["--local-rank=0"], "start the script with torchrun"),
        (["--adapter_name_or_path", "a"], "merge it first (--export_merged)"),
        (["--dataset", "medqa"], "--train_file rows.jsonl"),
        (["--overwrite_output_dir"], "a result is never overwritten"),
        (["--eval-strategy", "steps"], "--eval_steps N validates every N optimizer steps"),
        (["--template", "llama3"], "'llama3' is a name of LLaMA-Factory's; the model's own template is used"),
        (["--bf16", "--fp16"], "bf16 and fp16: expected one of them"),
        (["--offload", "cpu", "--offload_budget", " 20 "], "expected a unit, such as 20GiB"),
    ],
)
def test_what_means_nothing_here_has_a_hint(argv, hint):
    with pytest.raises(ValueError) as error:
        parse(argv)
    assert hint in str(error.value) and "did you mean" not in str(error.value)


def test_no_alias_hides_an_option_or_leads_nowhere():
    """What becomes an option of this script later is taken from the tables."""
    known = {field.name for field in dataclasses.fields(Options)}
    assert not (names.ALIASES.keys() | names.HINTS.keys()) & known
    assert set(names.ALIASES.values()) <= known and names.VALUES.keys() | names.WRONG_VALUES.keys() <= known


@pytest.mark.parametrize("option", ["model_name_or_path", "tokenizer_name_or_path"])
def test_a_name_of_a_hub_is_answered_by_its_option_and_how_to_fetch_it(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_tokenizer(parse([f"--{option}", "Qwen/Qwen2.5-0.5B-Instruct"]))
    assert str(error.value).startswith(f"--{option} Qwen/Qwen2.5-0.5B-Instruct: expected a local folder, there is none")
    assert "hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen/Qwen2.5-0.5B-Instruct" in str(error.value)
    (tmp_path / "file.json").write_text(json.dumps({}))
    for name, message in [("file.json", "there is a file"), ("./absent/folder", "there is none"), ("/a/b", "is none")]:
        with pytest.raises(ValueError, match=f"--{option}.*{message}$"):
            load_tokenizer(parse([f"--{option}", name]))
    with pytest.raises(ValueError, match="hf download Qwen/Qwen3-8B"):
        opening.find(opening.Path("Qwen/Qwen3-8B"))
