"""What the memory benchmark compares: zerolite's stages, offload and LoRA, and its peers, each with its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from contenders import (
    ADAMW,
    MICRO_BATCH,
    How,
    Training,
    ddp,
    deepspeed_offload,
    fsdp2_offload,
    plain_loop,
    torchao_offload,
    torchao_refuses,
)

LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ("q_proj", "k_proj", "v_proj")}
OFFLOADS = {"none": None, "optimizer": {}, "parameters": {"parameters": True}}  # arguments of zerolite.Offload


def how_of(precision: str) -> How:
    return How(precision, accumulation=1, clip=None, micro_batch=MICRO_BATCH, workers=None, threads=None)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def precision_of(name: str):
    """zerolite's: parameters and reduction in bf16 over fp32 masters, or fp32 throughout."""
    import zerolite

    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    return zerolite.Precision(param=dtype, reduce=dtype)


def placement_of(offload: str):
    import zerolite

    return None if OFFLOADS[offload] is None else zerolite.Offload(**OFFLOADS[offload])


def add_lora(model: torch.nn.Module) -> None:
    import zerolite

    zerolite.adapters.add_lora(model, **LORA)


def zerolite_training(model, precision: str, stage: int, offload: str, is_lora: bool) -> Training:
    import zerolite

    if is_lora:
        add_lora(model)
    model = zerolite.shard(model, stage=stage, offload=placement_of(offload), precision=precision_of(precision)).train()
    optimizer = zerolite.AdamW(trainable(model), **ADAMW)
    training = plain_loop(model, optimizer)
    training.optimizer = optimizer
    return training


def fsdp2(model, precision: str, is_offloaded: bool) -> Training:
    return fsdp2_offload(model, how_of(precision), is_offloaded)


def deepspeed(model, precision: str, stage: int, is_offloaded: bool) -> Training:
    return deepspeed_offload(model, how_of(precision), stage, is_offloaded)


def peft(model, precision: str) -> Training:
    """DDP over PEFT's LoRA, the frozen base in bf16 or fp32, the adapter in fp32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=list(LORA["targets"])
    )
    model = get_peft_model(model.to(torch.bfloat16) if precision == "bf16" else model, config)
    model = torch.nn.parallel.DistributedDataParallel(model)
    return plain_loop(model, torch.optim.AdamW(trainable(model), fused=True, **ADAMW))


def torchao_8bit(model, precision: str) -> Training:
    """DDP with moments of 8 bits; bf16 is bf16 throughout, with stochastic rounding, and no fp32 master."""
    from torchao.optim import AdamW8bit

    low = precision == "bf16"
    model = torch.nn.parallel.DistributedDataParallel(model.to(torch.bfloat16) if low else model)
    training = plain_loop(model, AdamW8bit(model.parameters(), bf16_stochastic_round=low, **ADAMW))
    step = training.step

    def eager_step():
        with torch.compiler.set_stance("force_eager"):  # compiled code cannot be counted
            step()

    training.step = eager_step
    return training


def torchao_offloaded(model, precision: str) -> Training:
    return torchao_offload(model, how_of(precision))


FP32, BF16, MASTERED = (4, 4, 8), (2, 2, 4), (2, 2, 12)  # bytes a parameter: weight, gradient, optimizer states


@dataclass(frozen=True)
class Configuration:
    """One way to train; `stage` is the ZeRO stage whose formula it has."""

    build: Callable[[torch.nn.Module, str], Training]
    library: str
    stage: int = 0
    offload: str = "none"
    is_lora: bool = False
    bf16: tuple[int, int, int] = MASTERED  # bytes of one trainable parameter with precision "bf16"
    fp32: tuple[int, int, int] = FP32
    refuses: Callable[[int], str | None] = lambda ranks: None  # why it cannot run on so many ranks, in words

    @property
    def is_planned(self) -> bool:
        """Whether `zerolite.plan` tells what it takes."""
        return self.library == "zerolite"

    @property
    def builds_on_meta(self) -> bool:
        """Whether a model that fits no device is given values piece by piece."""
        return self.library == "zerolite" and not self.is_lora

    def formula(self, precision: str, ranks: int, num_frozen: int, num_trainable: int) -> dict[str, float]:
        """Bytes a rank of model states on the device and on the host: 16 a trainable parameter, divided by stage."""
        weight, gradient, states = self.bf16 if precision == "bf16" else self.fp32
        shards = [ranks if self.stage >= stage else 1 for stage in (3, 2, 1)]
        weights = (num_frozen * (2 if precision == "bf16" else 4) + num_trainable * weight) / shards[0]
        stepped = num_trainable * (gradient / shards[1] + states / shards[2])
        host = {"none": 0.0, "optimizer": stepped, "parameters": weights + stepped}[self.offload]
        return {"device": weights + stepped - host, "host": host}


def zerolite_configurations() -> dict[str, Configuration]:
    found = {}
    for is_lora in (False, True):
        for stage in range(4):
            for offload in OFFLOADS:
                if offload == "parameters" and stage < 3:
                    continue  # zerolite.shard refuses it: whole parameters are not streamed
                name = f"zerolite{stage}" + (f"-{offload}" if offload != "none" else "") + "-lora" * is_lora
                build = partial(zerolite_training, stage=stage, offload=offload, is_lora=is_lora)
                found[name] = Configuration(build, "zerolite", stage, offload, is_lora)
    return found


def deepspeed_configurations() -> dict[str, Configuration]:
    found = {}
    for stage in (1, 2, 3):
        for is_offloaded in (False, True):
            build = partial(deepspeed, stage=stage, is_offloaded=is_offloaded)
            offload = "optimizer" if is_offloaded else "none"
            found[f"deepspeed{stage}" + "-offload" * is_offloaded] = Configuration(build, "deepspeed", stage, offload)
    return found


def torchao_offload_refuses(ranks: int) -> str | None:
    return torchao_refuses(how_of("bf16"), ranks)


CONFIGURATIONS = {
    "ddp": Configuration(ddp, "torch", bf16=FP32),  # autocast over fp32 weights
    **zerolite_configurations(),
    "fsdp2": Configuration(partial(fsdp2, is_offloaded=False), "torch", 3, bf16=FP32),
    "fsdp2-offload": Configuration(partial(fsdp2, is_offloaded=True), "torch", 3, "parameters", bf16=FP32),
    **deepspeed_configurations(),
    "peft-lora": Configuration(peft, "peft", is_lora=True, bf16=FP32),
    "torchao-8bit": Configuration(torchao_8bit, "torchao", bf16=(2, 2, 2), fp32=(4, 4, 2)),
    "torchao-offload": Configuration(
        torchao_offloaded, "torchao", offload="optimizer", bf16=BF16, refuses=torchao_offload_refuses
    ),
}
