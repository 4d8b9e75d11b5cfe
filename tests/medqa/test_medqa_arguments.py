"""Options: the command line over the file over the defaults, and one clear error for every mistake."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

import zerolite
from zerolite.medqa.arguments import FINETUNING_TYPES, Options, parse
from zerolite.medqa.tuning import lora_targets


def test_defaults_command_line_and_file(tmp_path):
    assert parse([]) == Options()
    config = tmp_path / "run.yaml"
    config.write_text("stage: 3\nlearning_rate: 3e-4\ntrain_file: [a.jsonl, b.jsonl]\nexport: false\nmax_steps: null\n")
    options = parse(["--config", str(config), "--stage", "1", "--skip_invalid", "--num_train_epochs", "0.5"])
    assert options.stage == 1 and options.learning_rate == 3e-4 and options.train_file == ("a.jsonl", "b.jsonl")
    assert options.export is False and options.max_steps is None and options.skip_invalid is True
    assert options.num_train_epochs == 0.5
    assert parse(["--config", str(config), "--export"]).export is True


def test_defaults_that_depend_on_start_and_device():
    """A rate that is right from scratch would wipe out a pretrained model."""
    scratch, pretrained = parse([]).resolved("cpu"), parse(["--model_name_or_path", "folder"]).resolved("cuda")
    assert (scratch.learning_rate, scratch.num_train_epochs, scratch.precision) == (1e-3, 8.0, "fp32")
    assert (pretrained.learning_rate, pretrained.num_train_epochs, pretrained.precision) == (2e-5, 3.0, "bf16")
    given = ["--learning_rate", "0.1", "--num_train_epochs", "1", "--precision", "fp16", "--weight_decay", "0.2"]
    given += ["--offload", "none", "--no-offload_parameters", "--no-gradient_checkpointing"]
    assert parse(given).resolved("cpu") == parse(given)


def test_each_way_to_tune_has_a_rate_of_its_own():
    """And adapters do not decay, unless they are told to."""
    base = ["--model_name_or_path", "folder", "--finetuning_type"]
    rates = {kind: parse([*base, kind]).resolved("cpu") for kind in FINETUNING_TYPES}
    assert rates["full"].weight_decay == 0.1 and rates["lora"].weight_decay == 0.0
    assert len({options.learning_rate for options in rates.values()}) >= 4
    assert rates["full"].learning_rate < rates["lora"].learning_rate < rates["prefix"].learning_rate
    decaying = parse([*base, "lora", "--weight_decay", "0.3", "--lora_target", "all-linear"])
    assert decaying.resolved("cpu").weight_decay == 0.3 and decaying.lora_target == ("all-linear",)
    assert lora_targets(("all-linear",)) == "all-linear" and lora_targets(("q_proj",)) == ("q_proj",)
    assert lora_targets((r".*\.0\..*q_proj",)) == r".*\.0\..*q_proj" and lora_targets(("q", "v.x")) == ("q", "v.x")


def test_offloading_is_switched_on_and_off(tmp_path):
    assert parse([]).placement() is None
    argv = ["--offload", "cpu", "--offload_budget", "20GiB", "--offload_workers", "2", "--offload_states", "int8"]
    assert parse(argv).placement() == zerolite.Offload(budget="20GiB", workers=2, states="int8")
    (tmp_path / "run.yaml").write_text(parse(argv).to_yaml())
    config = ["--config", str(tmp_path / "run.yaml")]
    assert parse(config) == parse(argv) and parse([*config, "--offload", "none"]) == Options(offload="none")
    with pytest.raises(ValueError, match="--offload_workers is part of offloading"):
        parse([*config, "--offload", "none", "--offload_workers", "2"])


def test_saved_options_come_back(tmp_path):
    options = dataclasses.replace(Options(), train_file=("x.jsonl",), precision="bf16", output_dir="医学")
    (tmp_path / "options.yaml").write_text(options.to_yaml(), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "options.yaml")]) == options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "4"], "--stage: expected one of 0, 1, 2, 3, got '4'"),
        (["--stage", "two"], "--stage: expected a whole number, got 'two'"),
        (["--stage"], "--stage: expected one argument"),
        (["--precision", "fp8"], "--precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        (["--learning_rte", "1"], "unknown option '--learning_rte': did you mean --learning_rate"),
        (["--lrate=1"], "unknown option '--lrate=1'"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number > 0, got 'nan'"),
        (["--learning_rate", "0"], "--learning_rate: expected a number > 0"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio: expected a number <= 1"),
        (["--max_grad_norm", "inf"], "--max_grad_norm: expected a finite number"),
        (["--per_device_train_batch_size", "0"], "expected a whole number >= 1, got '0'"),
        (["--cutoff_len", "8"], "expected a whole number >= 16"),
        (["--output_dir", ""], "--output_dir: expected a text, got ''"),
        (["--config", "absent.yaml"], "--config absent.yaml: cannot be read as YAML"),
        (["stray"], "unknown option 'stray'"),
        (["--offload", "disk"], "--offload: expected one of none, cpu, got 'disk'"),
        (["--offload_budget", "20GiB"], "--offload_budget is part of offloading, which is off: add --offload cpu"),
        (
            ["--offload", "cpu", "--offload_budget", "all"],
            '--offload_budget: a number of bytes is an int or such as "20',
        ),
        (["--offload", "cpu", "--offload_workers", "0"], "--offload_workers: expected a whole number >= 1, got '0'"),
        (["--offload", "cpu", "--offload_states", "int4"], "--offload_states: expected one of fp32, bf16, int8, got"),
        (
            ["--offload", "cpu", "--offload_path", "/absent"],
            "--offload_path /absent: expected a folder on a local drive",
        ),
        (
            ["--offload", "cpu", "--offload_parameters"],
            "--offload_parameters: expected --stage 3, which shards parameters",
        ),
        (["--lora_rank", "4"], "--lora_rank is part of --finetuning_type lora, got full"),
        (["--export_merged"], "--export_merged is part of --finetuning_type lora, got full"),
        (
            ["--model_name_or_path", "x", "--finetuning_type", "prefix", "--use_dora"],
            "--use_dora is part of --finetuning_type lora, got prefix",
        ),
        (
            ["--model_name_or_path", "x", "--finetuning_type", "lora", "--num_virtual_tokens", "9"],
            "--num_virtual_tokens is part of --finetuning_type a prompt method, got lora",
        ),
        (["--finetuning_type", "lora"], "--finetuning_type lora adapts a pretrained model: name its folder"),
        (
            ["--model_name_or_path", "x", "--finetuning_type", "prompt", "--prompt_init", "text"],
            "--prompt_init text and --prompt_init_text go together",
        ),
        (
            ["--model_name_or_path", "x", "--finetuning_type", "lora", "--lora_dropout", "1"],
            "--lora_dropout: expected a number below 1, got 1.0",
        ),
        (["--finetuning_type", "qlora"], "--finetuning_type: expected one of full, lora, prompt"),
        (
            ["--offload", "cpu", "--stage", "3", "--offload_parameters", "--offload_budget", "1GB"],
            "--offload_parameters and --offload_budget: expected one of them",
        ),
    ],
)
def test_command_line_errors(argv, message):
    with pytest.raises(ValueError) as error:
        parse(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stge: 2", "unknown option 'stge': did you mean stage"),
        ("stage: 7", "stage: expected one of 0, 1, 2, 3, got 7"),
        ("stage: true", "stage: expected a whole number, got True"),
        ("seed: null", "seed: expected a whole number, got None"),
        ("max_steps: 1.5", "max_steps: expected a whole number, got 1.5"),
        ("export: 1", "export: expected true or false, got 1"),
        ("train_file: []", "train_file: expected at least one value"),
        ("train_file: [1]", "train_file: expected a text, got 1"),
        ("- stage", "expected `name: value` lines, got list"),
        ("stage: [", "cannot be read as YAML"),
    ],
)
def test_config_file_errors(tmp_path, content, message):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(ValueError) as error:
        parse(["--config", str(config)])
    assert message in str(error.value) and str(config) in str(error.value)


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(Options))
    assert list(yaml.safe_load(Options().to_yaml())) == [field.name for field in dataclasses.fields(Options)]
