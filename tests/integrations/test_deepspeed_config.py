"""Is every key of a DeepSpeed configuration used, not needed, or refused by name?"""

from __future__ import annotations

import copy
import json

import pytest
import torch

import zerolite
from zerolite.integrations.deepspeed_config import read

ZERO_3 = {  # of transformers' documentation, with a linear warm-up
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": {
            **dict.fromkeys(["warmup_min_lr", "warmup_max_lr", "warmup_num_steps"], "auto"), "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
        "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(
        ["gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"],
        "auto",
    ),
    "steps_per_print": 2000, "wall_clock_breakdown": False,
}  # fmt: skip


def with_value(config: dict, key: str, value) -> dict:
    config = copy.deepcopy(config)
    node = config
    *sections, name = key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    return config


def keys_of(config: dict, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, value in config.items():
        keys |= keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name}
    return keys


def test_a_file_of_auto_values_is_the_arguments_of_shard(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO_3), encoding="utf-8")
    found = read(path)
    assert found.stage == 3 and found.offload == zerolite.Offload(parameters=True) and found.optimizer == "AdamW"
    assert found.precisions["bf16"] == zerolite.Precision(torch.bfloat16, torch.bfloat16)
    scaler = found.precisions["fp16"].scaler
    assert scaler.get_scale() == 65536 and scaler.get_growth_interval() == 1000
    assert found.training == {"lr_scheduler_type": "constant_with_warmup"}
    assert read(str(path)).keys == found.keys == read(ZERO_3).keys


def test_every_key_has_a_word(tmp_path):
    words = read(ZERO_3).keys
    assert words.keys() == keys_of(ZERO_3)
    assert all(word.startswith(("used: ", "not needed: ", "TrainingArguments: ")) for word in words.values())
    assert words["optimizer.params.lr"] == 'TrainingArguments: learning_rate ("auto")'


def test_values_are_told_for_comparison():
    config = {
        "gradient_clipping": 0.3, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 5, "total_num_steps": 50, "warmup_type": "linear"},
        },
    }  # fmt: skip
    found = read(config)
    assert found.optimizer == "Lion" and found.betas == (0.9, 0.95) and found.stage == 0 and found.offload is None
    assert found.training == {
        "max_grad_norm": 0.3, "train_batch_size": 8, "per_device_train_batch_size": 2, "bf16": True,
        "learning_rate": 1e-4, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "lr_scheduler_type": "linear", "warmup_steps": 5, "max_steps": 50,
    }  # fmt: skip
    assert read({}).training == {"max_grad_norm": 1.0}, "DeepSpeed's default since June 2026"


@pytest.mark.parametrize(
    ("params", "name"), [({}, "AdamW"), ({"adam_w_mode": True}, "AdamW"), ({"adam_w_mode": False}, "Adam")]
)
def test_adam_means_adamw_unless_told_otherwise(params, name):
    assert read({"optimizer": {"type": "Adam", "params": params}}).optimizer == name


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}, None),
        ({"offload_optimizer": {"device": "cpu", "ratio": 1.0}}, zerolite.Offload()),
        ({"cpu_offload": True}, zerolite.Offload()),
        ({"offload_optimizer": {"device": "none", "ratio": 0.5}}, None),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}, zerolite.Offload(path="/nvme")),
    ],
)
def test_offload_is_where_the_states_go(config, expected):
    assert read({"zero_optimization": {"stage": 2, **config}}).offload == expected


def test_gradients_are_reduced_as_deepspeed_does():
    assert read({"communication_data_type": "fp32"}).precisions["bf16"].reduce == torch.float32
    assert read({"data_types": {"grad_accum_dtype": "fp32"}}).precisions["bf16"].reduce == torch.float32
    assert read({}).precisions["fp16"].reduce == torch.float16


def test_16_bit_moments_are_those_of_the_host():
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "bf16": {"bf16_optimizer_states": True}}
    assert read(config).offload == zerolite.Offload(states="bf16")
    with pytest.raises(ValueError, match="bf16_optimizer_states=true"):
        read({"bf16": {"bf16_optimizer_states": True}})


REFUSED = [
    ("zero_optimization.zero_quantized_weights", True), ("zero_optimization.zero_hpz_partition_size", 8),
    ("zero_optimization.mics_shard_size", 4), ("zero_optimization.offload_param.device", "nvme"),
    ("zero_optimization.offload_optimizer.ratio", 0.5), ("zero_optimization.offload_optimizer.device", "nvme"),
    ("zero_optimization.zenflow.topk_ratio", 0.1), ("zero_optimization.a_new_key", 1), ("fp16.loss_scale", 128),
    ("fp16.min_loss_scale", 2), ("optimizer.type", "OneBitAdam"), ("scheduler.type", "OneCycle"),
    ("scheduler.params.warmup_type", "log"), ("scheduler.params.warmup_min_lr", 1e-6), ("amp.enabled", True),
    ("communication_data_type", "int8"), ("sparse_gradients", True), ("elasticity.enabled", True),
    ("torch_autocast.enabled", True), ("optimizer.params.max_grad_norm", 1.0), ("gradient_predivide_factor", 2.0),
    ("tensorboard.enabled", True), ("a_new_section.with_a_key", 3), ("optimizer.params.freeze_step", 10),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as error:
        read(with_value(ZERO_3, key, value))
    assert str(error.value).count("\n") == 1, "and nothing else is"


def test_all_refusals_come_at_once_and_what_is_off_is_none():
    with pytest.raises(ValueError) as error:
        read({"sparse_gradients": True, "amp": {"enabled": True}})
    assert "sparse_gradients=true" in str(error.value) and "amp.enabled=true" in str(error.value)
    off = {
        "amp": {"enabled": False, "opt_level": "O1"}, "sparse_gradients": False, "tensorboard": {"enabled": False},
        "zero_optimization": {"zero_quantized_weights": False, "mics_shard_size": -1, "zero_hpz_partition_size": 1},
    }  # fmt: skip
    assert read(off).keys.keys() == keys_of(off)


def test_parameters_leave_with_their_states_at_stage_3():
    with pytest.raises(ValueError, match="set offload_optimizer.device, too"):
        read({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    with pytest.raises(ValueError, match='at "stage": 3'):
        read({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}, "cpu_offload": True}})


def test_a_warm_up_without_a_type_is_a_logarithm_and_refused():
    with pytest.raises(ValueError, match=r'lr_scheduler_type="linear"'):
        read({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}}})


def test_what_is_no_configuration_is_named(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{'stage': 2}", encoding="utf-8")
    with pytest.raises(ValueError, match="ds.json is no JSON"):
        read(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="is a JSON object, got list"):
        read(path)
