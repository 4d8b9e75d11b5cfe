"""`zerolite migrate`: are the written lines right, and is every key of DeepSpeed, Accelerate and FSDP told?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from models import build, joint_batch
from torch import nn

import zerolite
from zerolite import cli
from zerolite.commands.migrate import read as recipe_of
from zerolite.foreign.configuration import IDLE, NONE, UNKNOWN, USED
from zerolite.foreign.keys import KNOWN, NO_COUNTERPART, NOT_NEEDED

# The examples of DeepSpeed's configuration page (docs/_pages/config-json.md, 0.19), as one file with other numbers.
DOCUMENTED = {
    "train_batch_size": 48,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 4,
    "steps_per_print": 10,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "betas": [0.7, 0.99], "eps": 0.05, "weight_decay": 0.3}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-3, "warmup_num_steps": 5, "warmup_type": "linear"},
    },
    "gradient_clipping": 0.5,
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4, "fast_init": False},
        "ignore_unused_parameters": True,
        "round_robin_gradients": False,
    },
    "wall_clock_breakdown": False,
    "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "bert"},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "output_file": None},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
}
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
FSDP = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_machines": 2,
    "num_processes": 16,
    "machine_rank": 1,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29501,
    "fsdp_config": {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_backward_prefetch": "BACKWARD_PRE",
        "fsdp_offload_params": True,
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_activation_checkpointing": True,
    },
}


def migrated(tmp_path, capsys, content, name="config.json"):
    """(exit status, what --json prints) of a file with this content."""
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    status = cli.main(["migrate", str(path), "--json"])
    return status, json.loads(capsys.readouterr().out)


def told(result) -> dict[str, tuple[str, str]]:
    return {key["name"]: (key["status"], key["told"]) for key in result["keys"]}


def trained(lines: list[str], model: nn.Module, batches: list) -> nn.Module:
    """The model after the written loop has run on these batches, as a user would paste it."""
    code = "\n".join(line for line in lines if not line.startswith("loader ="))
    exec(compile(code, "migrated", "exec"), {"model": model, "loader": batches})
    return model


class Regression(nn.Module):
    """A model whose forward returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("stack", torch.float32)

    def forward(self, x, y):
        return SimpleNamespace(loss=(self.inner(x) - y).square().mean())


def by_hand(model: nn.Module, batches: list, rule: type, accumulation: int, max_norm: float) -> nn.Module:
    """What DeepSpeed documents, in plain torch: the rule, loss over steps, clipping, five steps of warm-up."""
    options = dict(lr=2e-3, betas=(0.7, 0.99), eps=0.05, weight_decay=0.3)
    optimizer = rule(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    for i, batch in enumerate(batches):
        (model(**batch).loss / accumulation).backward()
        if (i + 1) % accumulation == 0:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("max_norm", [0.5, 2.5])
def test_the_written_loop_trains_as_the_documented_configuration(tmp_path, capsys, max_norm):
    """Run as it stands: DeepSpeed's "Adam" with decay is torch's AdamW, not its Adam; so are clip and accumulation.

    Norms are about 2.1 where the loss is divided by the steps, as it must be: one limit clips and one does not. A large
    eps makes the scale of gradients visible.
    """
    status, result = migrated(tmp_path, capsys, {**DOCUMENTED, "gradient_clipping": max_norm})
    batches = [joint_batch("stack", step, torch.float32) for step in range(12)]
    model = trained(result["lines"], Regression(), batches)
    with zerolite.full_params(model):
        found = [parameter.clone() for parameter in model.parameters()]
    expected = list(by_hand(Regression(), batches, torch.optim.AdamW, 4, max_norm).parameters())
    other = list(by_hand(Regression(), batches, torch.optim.Adam, 4, max_norm).parameters())
    assert all(torch.allclose(one, two, rtol=1e-5, atol=1e-6) for one, two in zip(found, expected, strict=True))
    assert not all(torch.allclose(one, two, rtol=1e-5, atol=1e-6) for one, two in zip(found, other, strict=True))
    assert status == 0 and result["command"] == "torchrun --standalone --nproc-per-node 4 train.py"
    assert {key["status"] for key in result["keys"]} == {USED, IDLE} and 'offload="cpu"' in result["zero"]


def test_auto_is_what_transformers_fills_in(tmp_path, capsys):
    """Each "auto" is an expression on TrainingArguments, and all lines are Python."""
    status, result = migrated(tmp_path, capsys, HUGGING_FACE)
    text = "\n".join(result["lines"])
    compile(text, "lines", "exec")
    for name in ("learning_rate", "adam_beta1", "adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16"):
        assert f"args.{name}" in text, name
    assert "gradient_accumulation_steps" in text and "Offload(parameters=True)" in text and "stage=3" in text
    assert "GradScaler(init_scale=2.0**16, growth_interval=1000)" in text and status == 1
    assert told(result)["fp16.hysteresis"][0] == NONE and told(result)["optimizer.params.lr"][0] == USED


@pytest.mark.parametrize(
    "change, holds, lacks",
    [
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "zerolite.Adam(", "AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "weight_decay=0.0", "weight_decay=0.01"),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "eps": 1e-8}}}, "betas=(0.9, 0.999)", "eps="),
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4, "freeze_step": 4}}}, "zerolite.AdamW(", "OneBit"),
        ({"bf16": {"enabled": True}}, "Precision(torch.bfloat16, reduce=torch.bfloat16)", "float32"),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, "reduce=torch.float32", "reduce=torch.bf"),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, "GradScaler(init_scale=2.0**8", "bfloat16"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage=2", "Offload"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "Offload(parameters=True)", "cpu"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'offload="cpu"', "parameters=True"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "init_device_mesh", "Offload"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch.autocast", "Precision"),
        ({"gradient_clipping": 0}, "zerolite.shard", "max_grad_norm"),
        ({"optimizer": {"type": "Lamb", "params": {"lr": 1e-4, "max_grad_norm": 0.7}}}, "max_grad_norm=0.7", "AdamW"),
        ({"zero_optimization": True}, "stage=1", "offload"),
        ({"activation_checkpointing": {"partition_activations": False, "profile": False}}, "stage=0", "offload"),
        ({"zero_optimization": {"stage": 1}}, "max_grad_norm=1.0", "offload"),
    ],
)
def test_one_key_changes_the_lines(tmp_path, capsys, change, holds, lacks):
    _, result = migrated(tmp_path, capsys, {"train_micro_batch_size_per_gpu": 1, **change})
    text = "\n".join(result["lines"])
    compile(text, "lines", "exec")
    assert holds in text and lacks not in text, text
    assert all(key["status"] != UNKNOWN for key in result["keys"])


def test_what_has_no_counterpart_is_named_and_the_status_says_so(tmp_path, capsys):
    """Also keys that nobody knows, with the key that may be meant; a switch that is off needs no counterpart."""
    content = {
        "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": False},
        "sparse_attention": {"mode": "fixed"},
        "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
        "gradient_cliping": 1.0,
        "optimizer": {"params": {"lr": 1e-3}},  # of no type
        "zzz": 1,
    }
    status, result = migrated(tmp_path, capsys, content)
    found = told(result)
    assert status == 1 and found["zero_optimization.zero_quantized_weights"][0] == NONE
    assert found["zero_optimization.zero_quantized_gradients"][0] == IDLE and found["sparse_attention.mode"][0] == NONE
    assert found["curriculum_learning.curriculum_type"] == (IDLE, "it is off")
    assert found["optimizer.params.lr"] == (NONE, "nothing reads it here")
    assert found["gradient_cliping"] == (UNKNOWN, "is gradient_clipping meant?") and found["zzz"][0] == UNKNOWN


def test_an_fsdp_configuration(tmp_path, capsys):
    status, result = migrated(tmp_path, capsys, FSDP)
    text = "\n".join(result["lines"])
    assert status == 0 and "stage=3" in text and "Offload(parameters=True)" in text
    assert (
        "model.gradient_checkpointing_enable()" in text and "Precision(torch.bfloat16, reduce=torch.bfloat16)" in text
    )
    where = "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29501 --nproc-per-node 8"
    assert result["command"] == f"torchrun {where} train.py"


@pytest.mark.parametrize(
    "section, stage, is_hybrid",
    [
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, 2, False),
        ({"fsdp_sharding_strategy": 3}, 0, False),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD"}, 3, True),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2"}, 2, True),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": True}, 3, False),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, 2, False),
        ({"fsdp_version": 1, "fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, 2, False),
    ],
)
def test_a_strategy_of_fsdp_is_a_stage(tmp_path, capsys, section, stage, is_hybrid):
    _, result = migrated(tmp_path, capsys, section)
    assert f"stage={stage}" in result["zero"] and ("init_device_mesh" in result["zero"]) is is_hybrid
    assert all(key["status"] != UNKNOWN for key in result["keys"])


@pytest.mark.parametrize(
    "kind, mixed, holds, lacks",
    [
        ("MULTI_GPU", "bf16", 'torch.autocast("cuda", torch.bfloat16)', "Precision"),
        ("MULTI_GPU", "fp16", "zerolite.Precision(torch.float16)", "autocast"),
        ("FSDP", "fp16", "zerolite.Precision(torch.float16, reduce=torch.float16)", "autocast"),
        ("NO", "no", "stage=0", "torch."),
    ],
)
def test_mixed_precision_of_accelerate(tmp_path, capsys, kind, mixed, holds, lacks):
    """Under DDP Accelerate keeps parameters and casts inside; fp16 always has a loss scale."""
    _, result = migrated(tmp_path, capsys, {"distributed_type": kind, "mixed_precision": mixed, "num_processes": 2})
    text = "\n".join(result["lines"])
    assert holds in text and lacks not in text, text
    assert told(result)["mixed_precision"][0] == (USED if mixed != "no" else IDLE)


def test_replicas_of_a_parallelism_configuration_are_a_mesh(tmp_path, capsys):
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 4, "tp_size": 1, "cp_size": 1}
    section = {f"parallelism_config_{name}": size for name, size in sizes.items()}
    content = {**FSDP, "parallelism_config": section, "fsdp_config": {"fsdp_version": 2}}
    status, result = migrated(tmp_path, capsys, content)
    assert status == 0 and 'init_device_mesh("cuda", (2, 4))' in result["zero"]
    section["parallelism_config_tp_size"] = 2
    status, result = migrated(tmp_path, capsys, content)
    assert status == 1 and told(result)["parallelism_config.parallelism_config_tp_size"][0] == NONE


def test_an_accelerate_file_of_deepspeed_and_one_that_names_a_deepspeed_file(tmp_path, capsys):
    section = {
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "none",
        "gradient_clipping": 0.7,
    }
    common = {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "num_processes": 4}
    _, result = migrated(tmp_path, capsys, {**common, "deepspeed_config": section})
    text = "\n".join(result["lines"])
    assert "stage=3" in text and 'offload="cpu"' in text and "max_grad_norm=0.7" in text and "torch.bfloat16" in text
    (tmp_path / "ds.json").write_text(json.dumps(DOCUMENTED))
    named = {**common, "mixed_precision": "no", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    _, result = migrated(tmp_path, capsys, named)
    assert told(result)["ds.json: optimizer.type"] == (USED, 'zerolite.AdamW: its "Adam" is AdamW')


def test_every_key_that_accelerate_knows_is_known():
    """A key that a new release adds is an entry of the table that is missing."""
    sections = ("fp8_config", "deepspeed_config", "fsdp_config", "parallelism_config", "megatron_lm_config")
    sections += ("mpirun_config", "dynamo_config")
    names = {field.name for field in dataclasses.fields(ClusterConfig)} - set(sections)
    names |= {f"{section}.*" for section in ("fp8_config", "parallelism_config", "megatron_lm_config", "mpirun_config")}
    assert not names - KNOWN
    plugin = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    plugin = {name.removeprefix("fsdp_").replace("transformer_cls_names", "transformer_layer_cls") for name in plugin}
    plugin -= {"state_dict_config", "optim_state_dict_config", "param_init_fn"}  # objects, which no file holds
    assert not {f"fsdp_config.{name}" for name in plugin} - KNOWN
    assert not NOT_NEEDED.keys() & NO_COUNTERPART.keys()


def test_yaml_numbers_duplicates_and_files_that_are_none(tmp_path, capsys):
    """5e8 is a number, as DeepSpeed means it; what cannot be read is one line with the file and the reason."""
    _, result = migrated(tmp_path, capsys, "optimizer:\n  type: Adam\n  params: {lr: 1e-4}\n", "ds.yaml")
    assert any("lr=0.0001" in line for line in result["lines"])
    for content, part in [
        ("a: 1\na: 2\n", "stands twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stands twice"),
        ('{"zero_optimization": {"stage": 7}}', "expected 0, 1, 2 or 3, got 7"),
        ('{"gradient_clipping": "much"}', "gradient_clipping: expected a number, got 'much'"),
        ('{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}', "no multiple"),
        ('{"name": "x"}', "expected a DeepSpeed configuration, an accelerate config or an FSDP section"),
        ("[1, 2]", "got no mapping"),
        ("{{{", "cannot be read as JSON or YAML"),
        ("distributed_type: MEGATRON_LM\n", "expected DEEPSPEED, FSDP"),
        ("", "got nothing"),
        ("&a [" * 900, "cannot be read"),
    ]:
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        status = cli.main(["migrate", str(path)])
        err = capsys.readouterr().err
        assert status == 2 and part in err and str(path) in err and err.count("\n") == 1, (content, err)


ODD = [None, True, 0, -1, 2.5, "x", "auto", [], {}, [1], {"a": 1}, '"); print("', float("nan"), 10**30]


def places(content: dict, above: tuple = ()) -> Iterator[tuple]:
    for name, value in content.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


@pytest.mark.parametrize("content", [DOCUMENTED, HUGGING_FACE, FSDP], ids=["documented", "auto", "fsdp"])
def test_any_value_in_any_place_is_told_or_refused(content):
    """No traceback, and lines that are Python, whatever stands where; every key has a status."""
    num_told = 0
    for *above, last in places(content):
        for value in ODD:
            changed = json.loads(json.dumps(content))
            inner = changed
            for name in above:
                inner = inner[name]
            inner[last] = value
            try:
                recipe, keys = recipe_of(changed, Path("odd.json"))
            except ValueError:
                continue
            compile("\n".join([*recipe.lines(), f"zero = {recipe.integration()}"]), "lines", "exec")
            assert 'print("' not in recipe.command().replace("'\"); print(\"'", "") and all(key.status for key in keys)
            num_told += 1
    assert num_told > 100
