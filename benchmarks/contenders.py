"""One model, one stream of data, and every way to train it data-parallel: what the benchmarks of steps compare.

`CONTENDERS[mode].build(model, precision)` prepares a LLaMA and returns its `Training`: forward, backward, step.
`OFFLOADERS[mode].build(model, how)` does the same for those that keep something in host memory, and for what they are
compared with.
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
# with a vocabulary of 32,000: 1.1e9, 3.4e9, 6.7e9 and 13.0e9 parameters
LARGE = {
    "1b": (2048, 19, 5504, 16),
    "3b": (3200, 26, 8640, 32),
    "7b": (4096, 32, 11008, 32),
    "13b": (5120, 40, 13824, 40),
}
VOCABULARY, LARGE_VOCABULARY, SEQUENCE, MICRO_BATCH = 8000, 32000, 128, 2
ADAMW = {"lr": 3e-4, "weight_decay": 0.01}
BUCKET = 6_553_600  # elements: 25 MiB in fp32, DDP's default, given to DeepSpeed too


def config_of(size: str, sequence: int = SEQUENCE, layers: int | None = None):
    from transformers import LlamaConfig

    hidden, own_layers, intermediate, heads = (SIZES | LARGE)[size]
    return LlamaConfig(
        vocab_size=VOCABULARY if size in SIZES else LARGE_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers or own_layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        max_position_embeddings=sequence,
        use_cache=False,
    )


def build_model(size: str, sequence: int = SEQUENCE, layers: int | None = None, on: str | None = None):
    """The same LLaMA for everyone; `on` the CPU, and then on the device, or all the time `on` one that is named.

    On the meta device it has no values: who shards it draws them, other ones.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(on or "cpu"):
        model = LlamaForCausalLM(config_of(size, sequence, layers))
    return model if on else model.to(DEVICE.type)


def batches(steps: int, rank: int, world: int, joint: int, sequence: int = SEQUENCE) -> torch.Tensor:
    """(steps, joint / world, sequence) token ids of this rank; rare and frequent words, so that the loss can fall."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / (torch.arange(VOCABULARY) + 2.0)
    tokens = torch.multinomial(weights, steps * joint * sequence, replacement=True, generator=generator)
    return tokens.view(steps, joint, sequence).chunk(world, dim=1)[rank].to(DEVICE.type)


@dataclass
class Training:
    """A prepared model and its three verbs; zero_grad belongs to the step."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]
    optimizer: object = None


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


# --- with and without offload ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """What all offloaders are asked for alike."""

    precision: str
    accumulation: int  # micro-batches a step; each is reduced, and goes to the host, by itself
    clip: float | None  # global norm
    micro_batch: int
    workers: int | None  # of zerolite
    threads: int | None  # of each of them


def accumulating_loop(model, optimizer, how: How, clip: Callable[[], None] = lambda: None) -> Training:
    plain = plain_loop(model, optimizer)

    def step():
        clip()
        plain.step()

    return Training(plain.forward, lambda loss: (loss / how.accumulation).backward(), step, optimizer)


def zerolite_offload(model, how: How, stage: int, **offload):
    import zerolite

    low = zerolite.Precision(param=torch.bfloat16, reduce=torch.bfloat16) if how.precision == "bf16" else None
    placed = zerolite.Offload(workers=how.workers, threads=how.threads, **offload) if offload else None
    model = zerolite.shard(model, stage=stage, precision=low, offload=placed).train()
    return accumulating_loop(model, zerolite.AdamW(model.parameters(), max_grad_norm=how.clip, **ADAMW), how)


def deepspeed_offload(model, how: How, stage: int, is_offloaded: bool):
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": DEVICE.type == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": how.micro_batch,
        "gradient_accumulation_steps": how.accumulation,
        "gradient_clipping": how.clip or 0.0,
        "bf16": {"enabled": how.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    optimizer = (
        DeepSpeedCPUAdam(model.parameters(), **ADAMW)
        if is_offloaded
        else torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(loss):
        engine.backward(loss)
        if not engine.is_gradient_accumulation_boundary():
            engine.step()  # only counts

    return Training(lambda ids: engine(input_ids=ids, labels=ids).loss, backward, engine.step)


def fsdp2_offload(model, how: How, is_offloaded: bool):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    low = how.precision == "bf16"
    policy = {
        "mesh": dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda") if is_offloaded else OffloadPolicy(),
    }
    for block in model.model.layers:
        fully_shard(block, **policy)
    fully_shard(model, **policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def clip():
        if how.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip)

    return accumulating_loop(model, optimizer, how, clip)


def torchao_offload(model, how: How):
    """bf16 is bf16 throughout: parameters, gradients and states, and no fp32 master."""
    from torchao.optim import CPUOffloadOptimizer

    model = model.to(torch.bfloat16) if how.precision == "bf16" else model
    offload_gradients = how.accumulation == 1  # it takes no accumulation with gradients on the host
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=offload_gradients, fused=True, **ADAMW
    )
    return accumulating_loop(model, optimizer, how)


def torchao_refuses(how: How, ranks: int) -> str | None:
    if DEVICE.type != "cuda":
        return "offloads from CUDA and XPU devices only"
    if ranks > 1:
        return "one process only"
    return "clips no gradients" if how.clip is not None else None


@dataclass(frozen=True)
class Offloader:
    build: Callable[[torch.nn.Module, How], Training]
    base: str | None  # the mode of the same library that offloads nothing
    library: str
    refuses: Callable[[How, int], str | None] = lambda how, ranks: None  # why it cannot run so, in words

    @property
    def builds_on_meta(self) -> bool:
        """Whether a model that fits no device is given values piece by piece; else it starts whole on the device."""
        return self.library == "zerolite"


OFFLOADERS = {
    "zerolite": Offloader(partial(zerolite_offload, stage=2), None, "zerolite"),
    **{
        f"zerolite_{name}": Offloader(partial(zerolite_offload, **offload), "zerolite", "zerolite")
        for name, offload in {
            "offload": {"stage": 2, "states": "fp32"},
            "bf16": {"stage": 2, "states": "bf16"},
            "int8": {"stage": 2, "states": "int8"},
            "parameters": {"stage": 3, "parameters": True},
        }.items()
    },
    "deepspeed2": Offloader(partial(deepspeed_offload, stage=2, is_offloaded=False), None, "deepspeed"),
    "deepspeed2_offload": Offloader(partial(deepspeed_offload, stage=2, is_offloaded=True), "deepspeed2", "deepspeed"),
    "deepspeed3_offload": Offloader(partial(deepspeed_offload, stage=3, is_offloaded=True), "deepspeed2", "deepspeed"),
    "fsdp2": Offloader(partial(fsdp2_offload, is_offloaded=False), None, "torch"),
    "fsdp2_offload": Offloader(partial(fsdp2_offload, is_offloaded=True), "fsdp2", "torch"),
    "torchao_offload": Offloader(torchao_offload, "zerolite", "torchao", torchao_refuses),
}
