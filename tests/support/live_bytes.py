"""What a real step allocates on the CPU: the peak of live storages in each phase, and what a rank sends.

`counted_run` trains a small model for two steps as a script would and reads the second: storages are counted as torch
makes and frees them, those that the engine resizes included. A plan is compared with it; so is a tracker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from mutants import replaced
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import zerolite
from zerolite.memory.live_storages import LiveStorages, resizes_through

VOCAB, HIDDEN, LAYERS, ROWS, LENGTH = 256, 64, 5, 4, 32


def llama() -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 150, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def gpt2() -> nn.Module:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "vocab_size": VOCAB, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))


def t5() -> nn.Module:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 130, "num_layers": LAYERS, "num_heads": 4, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 90, "num_hidden_layers": 3, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, experts_implementation="eager"))


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "t5": t5, "mixtral": mixtral}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OFFLOADS = {"none": None, "optimizer": zerolite.Offload(), "parameters": zerolite.Offload(parameters=True)}


class Case(NamedTuple):
    """One training run; names of the tables above, so that it travels."""

    model: str = "llama"
    stage: int = 0
    offload: str = "none"
    dtype: str = "fp32"
    checkpointing: bool = False
    lora: bool = False
    budget: int | None = None
    accumulation: int = 1
    no_sync: bool = False  # but in the last micro-batch
    optimizer: str = "AdamW"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return MODELS[self.model]()

    def adapt(self, model: nn.Module) -> None:
        if self.lora:
            targets = {"gpt2": ["c_attn"], "t5": ["q", "v"]}.get(self.model, ["q_proj", "k_proj", "v_proj"])
            zerolite.adapters.add_lora(model, r=4, dropout=0.0, targets=targets)

    @property
    def precision(self) -> zerolite.Precision:
        return zerolite.Precision(DTYPES[self.dtype], torch.float32)

    @property
    def placement(self) -> zerolite.Offload | None:
        return OFFLOADS[self.offload] if self.budget is None else zerolite.Offload(budget=self.budget)


class Counted(NamedTuple):
    """Of one rank. Bytes."""

    usage: zerolite.Usage  # at the end of backward
    peaks: dict[str, int]  # by phase
    sent: dict[str, int]  # by the collective, to other ranks


class LiveBytes(LiveStorages):
    """`LiveStorages` that sees `resize_` of storages, as the engine frees and fills what it gathers."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[LiveBytes]:
        def resize(own, storage, nbytes):
            own(storage, nbytes)
            self.resized(storage)

        with resizes_through(resize), self:
            yield self


def counted_run(case: Case) -> Counted:
    """Two steps of `case` on this rank; what the second one took. Collective."""
    from zerolite.runtime.collectives import ExchangeGroup

    sent = {"reduce": 0, "gather": 0}
    reduce_scatter, all_gather = ExchangeGroup.reduce_scatter, ExchangeGroup.all_gather

    def counted_reduce(group, full, out, divisor, label):
        sent["reduce"] += full.nbytes - full.nbytes // group.size
        return reduce_scatter(group, full, out, divisor, label)

    def counted_gather(group, full, shard, label):
        sent["gather"] += full.nbytes - shard.nbytes if full.dtype != torch.float64 else 0  # fp64: grad stats
        return all_gather(group, full, shard, label)

    live = LiveBytes()
    with (
        replaced(ExchangeGroup, "reduce_scatter", counted_reduce),
        replaced(ExchangeGroup, "all_gather", counted_gather),
        live.watching(),
    ):
        model = case.build().train()
        case.adapt(model)
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = zerolite.shard(model, stage=case.stage, offload=case.placement, precision=case.precision)
        optimizer = getattr(zerolite, case.optimizer)((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))
        for _ in range(2):
            live.take_peak()
            sent.update(reduce=0, gather=0)
            peaks = dict.fromkeys(("forward", "backward", "step"), 0)
            for index in range(case.accumulation):
                with zerolite.no_sync(model, enabled=case.no_sync and index + 1 < case.accumulation):
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                    peaks["forward"] = max(peaks["forward"], live.take_peak())
                    loss.backward()
                del loss
                peaks["backward"] = max(peaks["backward"], live.take_peak())
            usage = zerolite.measure(model, optimizer)
            optimizer.step()
            peaks["step"] = live.take_peak()
            optimizer.zero_grad()
        result = Counted(usage, peaks, dict(sent))
        for parameter in model.parameters():
            parameter.detach()  # workers are done
    return result
