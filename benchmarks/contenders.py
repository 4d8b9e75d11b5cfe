"""One model, one stream of data, and every way to train it data-parallel: what the benchmarks of steps compare.

`CONTENDERS[mode].build(model, precision)` prepares a LLaMA and returns its `Training`: forward, backward, step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from harness import DEVICE

# hidden, layers, intermediate, heads: 33,497,600 and 142,889,984 parameters with a vocabulary of 8,000, untied
SIZES = {"tiny": (64, 2, 176, 4), "s": (512, 8, 1376, 8), "m": (1024, 10, 2752, 16)}
VOCABULARY, SEQUENCE, MICRO_BATCH = 8000, 128, 2
ADAMW = {"lr": 3e-4, "weight_decay": 0.01}
BUCKET = 6_553_600  # elements: 25 MiB in fp32, DDP's default, given to DeepSpeed too


def build_model(size: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, intermediate, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(DEVICE.type)


def batches(steps: int, rank: int, world: int, joint: int) -> torch.Tensor:
    """(steps, joint / world, SEQUENCE) token ids of this rank; rare and frequent words, so that the loss can fall."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / (torch.arange(VOCABULARY) + 2.0)
    tokens = torch.multinomial(weights, steps * joint * SEQUENCE, replacement=True, generator=generator)
    return tokens.view(steps, joint, SEQUENCE).chunk(world, dim=1)[rank].to(DEVICE.type)


@dataclass
class Training:
    """A prepared model and its three verbs; zero_grad belongs to the step."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]


def plain_loop(model, optimizer, precision: str = "fp32") -> Training:
    """The loop everyone writes; with bf16, autocast over fp32 weights."""

    def forward(ids):
        with torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            return model(input_ids=ids, labels=ids).loss

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return Training(forward, torch.Tensor.backward, step)


def single(model, precision):
    return plain_loop(model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW), precision)


def ddp(model, precision):
    return single(torch.nn.parallel.DistributedDataParallel(model), precision)


def zero_redundancy(model, precision):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True, **ADAMW
    )
    return plain_loop(model, optimizer, precision)


def fsdp2(model, precision, reshard):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    return single(model, "fp32")


def deepspeed(model, precision, stage):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    }
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Training(lambda ids: engine(input_ids=ids, labels=ids).loss, engine.backward, engine.step)


def zerolite(model, precision, stage):
    import zerolite

    low = zerolite.Precision(param=torch.bfloat16, reduce=torch.bfloat16) if precision == "bf16" else None
    model = zerolite.shard(model, stage=stage, precision=low)
    return plain_loop(model, zerolite.AdamW(model.parameters(), **ADAMW))


@dataclass(frozen=True)
class Contender:
    build: Callable[..., Training]
    stage: int
    library: str = "torch"

    def ideal_bytes(self, precision: str, world: int) -> float:
        """Model-state bytes per parameter and rank at the end of backward: parameters, gradients, optimizer states."""
        low = precision == "bf16" and self.library != "torch"
        parameters, gradients, states = (2, 2, 12) if low else (4, 4, 8)
        shards = [world if self.stage >= stage else 1 for stage in (3, 2, 1)]
        return parameters / shards[0] + gradients / shards[1] + states / shards[2]


CONTENDERS = {
    "ddp": Contender(ddp, 0),
    "zero_redundancy": Contender(zero_redundancy, 1),
    "fsdp2": Contender(partial(fsdp2, reshard=True), 3),
    "fsdp2_keep": Contender(partial(fsdp2, reshard=False), 3),
    **{f"deepspeed{k}": Contender(partial(deepspeed, stage=k), k, "deepspeed") for k in (1, 2, 3)},
    **{f"zerolite{k}": Contender(partial(zerolite, stage=k), k, "zerolite") for k in (0, 1, 2, 3)},
}
REFERENCE = Contender(single, 0)
