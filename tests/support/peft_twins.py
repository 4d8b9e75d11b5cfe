"""Tiny decoders of each family, and PEFT's model and ours with the same virtual tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from models import VOCAB, drawn
from torch import Tensor, nn

TOKENS = 5  # virtual ones

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SPECIAL,
}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**GROUPED))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=10))


def _glm() -> nn.Module:
    from transformers import GlmConfig, GlmForCausalLM

    return GlmForCausalLM(GlmConfig(**GROUPED, head_dim=8))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4, n_positions=64, **dropout, **SPECIAL)
    )


FAMILIES = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "glm": _glm, "gpt2": _gpt2}

KINDS = {
    "prompt": ("prompt", None),
    "p-tuning": ("p-tuning", "mlp"),
    "p-tuning-lstm": ("p-tuning", "lstm"),
    "prefix": ("prefix", None),
    "prefix-mlp": ("prefix", "mlp"),
    "p-tuning-v2": ("p-tuning-v2", None),
}

# Encoders and families do not meet: all kinds for the two that differ most, the kinds that enter differently for all.
CASES = [
    (family, case)
    for family in FAMILIES
    for case in KINDS
    if family in ("llama", "gpt2") or case in ("prompt", "p-tuning", "prefix")
]


def base(family: str, attention: str = "sdpa") -> nn.Module:
    model = drawn(FAMILIES[family]).eval()
    model.set_attn_implementation(attention)
    return model


def ours(model: nn.Module, case: str, **options) -> nn.Module:
    """A copy of the model with virtual tokens whose values are away from zero."""
    from zerolite.adapters.prompts import add_prompt

    kind, encoder = KINDS[case]
    if encoder is not None:
        options = {"encoder": encoder, "encoder_hidden": 9, **options}
    adapted = add_prompt(copy.deepcopy(model), kind, TOKENS, init="random", **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.prompts.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return adapted


def peft_twin(model: nn.Module, adapted: nn.Module, case: str) -> nn.Module:
    """PEFT's model of a copy of the base, with the parameters of ours."""
    import peft

    kind, encoder = KINDS[case]
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
    if kind == "prompt":
        config = peft.PromptTuningConfig(**common)
    elif kind == "p-tuning":
        config = peft.PromptEncoderConfig(
            **common, encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=9
        )
    else:
        projection = {} if encoder is None else {"prefix_projection": True, "encoder_hidden_size": 9}
        config = peft.PrefixTuningConfig(**common, **projection)
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for theirs, mine in pairs(twin, adapted):
            assert theirs.shape == mine.shape
            theirs.copy_(mine)
    return twin


def pairs(twin: nn.Module, adapted: nn.Module, name: str = "default") -> Iterator[tuple[Tensor, Tensor]]:
    """PEFT's parameter and ours that mean the same."""
    encoder, tokens = twin.prompt_encoder["default"], adapted.prompts[name]
    yield encoder.embedding.weight, tokens.embedding
    mine = dict(tokens.encoder.named_parameters())
    head = "head." if hasattr(encoder, "lstm_head") else ""
    for key, theirs in encoder.named_parameters():
        if key != "embedding.weight":
            part, _, rest = key.partition(".")
            yield theirs, mine.pop({"transform": "", "lstm_head": "lstm.", "mlp_head": head}[part] + rest)
    assert not mine, f"parameters of ours that PEFT has not: {list(mine)}"


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the left, with labels; none for a row's first token.

    Padding in front of that one would predict it.
    """
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        attention_mask[row, :row] = 0
    input_ids = input_ids * attention_mask
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.where(attention_mask.cumsum(dim=1) > 1, input_ids, -100),
    }


def moved_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding behind them, where PEFT's counting of positions leaves it out."""
    padding = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    return {key: torch.stack([r.roll(-n) for r, n in zip(v, padding, strict=True)]) for key, v in inputs.items()}


def of_tokens(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """The logits of virtual and real tokens, row after row: (tokens, vocabulary)."""
    num_virtual = logits.shape[1] - attention_mask.shape[1]
    return logits[nn.functional.pad(attention_mask, (num_virtual, 0), value=1).bool()]


def right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.flip(1) for key, value in inputs.items()}


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
