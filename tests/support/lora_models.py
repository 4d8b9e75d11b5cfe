"""Tiny models of the families that adapters are compared with PEFT on, and PEFT's twin of an adapted model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from models import HIDDEN, VOCAB, drawn, gpt2, llama
from torch import Tensor, nn

SUFFIXES = {"lora_A": "lora_A.{}.weight", "lora_B": "lora_B.{}.weight", "magnitude": "lora_magnitude_vector.{}.weight"}
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **_sizes()))


def glm() -> nn.Module:
    from transformers import GlmConfig, GlmForCausalLM

    special = {"pad_token_id": 0, "eos_token_id": 2, "attention_bias": True}
    return GlmForCausalLM(GlmConfig(num_key_value_heads=1, head_dim=8, **_sizes(), **special))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes()))


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }


FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "qwen2": qwen2, "glm": glm, "gpt2": gpt2, "neox": neox}
TARGETS = {"gpt2": ["c_attn"], "neox": ["query_key_value"]}  # what the default means there


def targets_of(family: str) -> list[str]:
    return TARGETS.get(family, ["q_proj", "k_proj", "v_proj"])


@functools.cache
def _base(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return drawn(FAMILIES[family]).to(dtype).state_dict()


def base(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = FAMILIES[family]().to(dtype)
    model.load_state_dict(_base(family, dtype))
    return model.eval()


def adapted(family: str, dtype: torch.dtype = torch.float64, seed: int = 1, **options) -> nn.Module:
    """A model with an adapter whose values are all drawn: nothing is zero by chance."""
    from zerolite.adapters.lora import add_lora

    options = {"r": 4, "alpha": 6, "dropout": 0.0, **options}
    model = base(family, dtype)
    torch.manual_seed(seed)
    add_lora(model, **options)
    draw(model, options.get("name", "default"), seed)
    return model


@torch.no_grad()
def draw(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    """B away from zero, and magnitudes away from the norms."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model._zerolite_adapters.by_name[name].parameters.items():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if key.endswith("magnitude"):
            parameter.mul_(1 + 0.2 * noise.tanh())
        else:
            parameter.add_(0.2 * noise)
    return model


def peft_name(parameter_name: str, name: str = "default") -> str:
    layer, _, kind = parameter_name.partition(f".lora.{name}.")
    return f"base_model.model.{layer}.{SUFFIXES[kind].format(name)}"


def peft_twin(family: str, model: nn.Module, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """PEFT's model with the same base and the same values of the default adapter; in training as `model` is."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "target_modules": targets_of(family), **options}
    twin = get_peft_model(
        base(family, dtype), LoraConfig(task_type="CAUSAL_LM", **options), autocast_adapter_dtype=False
    )
    theirs = dict(twin.named_parameters())
    ours = model._zerolite_adapters.by_name["default"].parameters
    assert sum(p.requires_grad for p in theirs.values()) == len(ours)
    with torch.no_grad():
        for key, parameter in ours.items():
            theirs[peft_name(key)].copy_(parameter)
    return twin.train(model.training)


def token_ids() -> Tensor:
    return torch.arange(3, 27).view(2, 12)


def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of everything that trains; every one must be there."""
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def weigh(logits: Tensor) -> Tensor:
    """A loss that every logit matters to, differently."""
    generator = torch.Generator().manual_seed(5)
    return (logits * torch.empty(logits.shape, dtype=logits.dtype).normal_(generator=generator)).sum()


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in fp64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
