"""Tiny deterministic models, joint batches cut by rank, and how results are compared.

Transformers keeps norms and softmaxes in fp32 even in a float64 model, so those gradients round relative to the
loss's scale. Hence the loss here is a sum over tokens times a power of two, whatever the world size, and a reference
divides its gradients by the world size afterwards: the pieces in fp32 are then the same bits in both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from zerolite.shards.layout import BucketLayout, pack
from zerolite.shards.units import plan_units

VOCAB, HIDDEN, ROWS, LENGTH = 64, 16, 12, 8  # 12 rows: 1, 2, 3 and 4 ranks cut them evenly
LOSS_SCALE = 2.0**-4

Batch = dict[str, Tensor]


def llama(tied: bool = False, layers: int = 2, hidden: int = HIDDEN, **options) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=2 * hidden + 5,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
    )


def gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=64, **dropout, **special)
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            max_position_embeddings=64,
            experts_implementation="eager",
        )
    )


def qwen_moe() -> nn.Module:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=24,
            moe_intermediate_size=10,
            shared_expert_intermediate_size=14,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            experts_implementation="eager",
        )
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks between two linear layers: float64 throughout."""

    def __init__(self, width: int = 7, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "t5": t5,
    "mixtral": mixtral,
    "qwen-moe": qwen_moe,
    "stack": Stack,
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The model with every parameter drawn anew, away from zero: there a relative error means something."""
    return drawn(FACTORIES[name], seed).to(dtype)


def drawn(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = factory()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            noise = noise + 0.3 * noise.sign()
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model


def joint_batch(name: str, step: int, dtype: torch.dtype = torch.float64) -> Batch:
    """The rows of all ranks together, the same for a step whatever the world size."""
    generator = torch.Generator().manual_seed(1000 + step)
    if name == "stack":
        shape = {"x": 5, "y": 3}
        return {key: torch.randn(ROWS, size, generator=generator).to(dtype) for key, size in shape.items()}
    batch = {"input_ids": torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)}
    if name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    return batch


def part(batch: Batch, rank: int, world: int) -> Batch:
    return {name: rows.chunk(world)[rank] for name, rows in batch.items()}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    if "x" in batch:
        return F.mse_loss(at_least_fp32(model(batch["x"])), at_least_fp32(batch["y"]), reduction="sum") * LOSS_SCALE
    logits = at_least_fp32(model(**batch, use_cache=False).logits)
    tokens = batch.get("decoder_input_ids", batch["input_ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") * LOSS_SCALE


def at_least_fp32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by name; a tied one once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def divide_gradients(model: nn.Module, world: int) -> None:
    """Summed gradients of `world` ranks to their mean, as DDP has it."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= world


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9, atol: float = 0.0) -> None:
    """Element by element, |actual - expected| <= rtol |expected| + atol."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = {
        name: f"{(actual[name] != value).sum().item()} of {value.numel()}"
        for name, value in expected.items()
        if not torch.equal(actual[name], value)
    }
    assert not different, f"elements that differ: {different}"


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bits, and dtypes as well."""
    assert_same_bits(actual, expected)
    dtypes = {name: (actual[name].dtype, value.dtype) for name, value in expected.items()}
    assert all(mine == other for mine, other in dtypes.values()), dtypes


def layouts_of(model: nn.Module, world: int, bucket_numel: int) -> list[BucketLayout]:
    """The buckets that a model without sharing or freezing is packed into."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return [
        layout
        for plan in plan_units(model, None, lambda parameter: None)
        for group in plan.groups
        for layout in pack([(name, shapes[name]) for name in group.names], world, bucket_numel)
    ]
