"""Do ranks that were told different things all say so, with both values, before anything is trained?"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import Stack
from saved import attempt, rank
from torch import nn

import zerolite
from zerolite.runtime import collectives


def model_of(width: int = 7, blocks: int = 3, dtype: torch.dtype = torch.float32, changed=lambda model: None):
    torch.manual_seed(0)
    model = Stack(width, blocks).to(dtype)
    changed(model)
    return model


def freeze(model: nn.Module) -> None:
    model.blocks[0].up.weight.requires_grad_(False)


def other_order(model: nn.Module) -> None:
    """As where a program walks a set of names, whose order is each process's own."""
    norm = model.blocks[0]._modules.pop("norm")
    model.blocks[0].norm = norm


def with_buffer(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    return lambda model: model.register_buffer("table", torch.zeros(3, dtype=dtype))


def rename(model: nn.Module) -> None:
    model.other, model.last.bias = nn.Parameter(model.last.bias.detach()), None


BF16 = zerolite.Precision(torch.bfloat16)
FP16 = zerolite.Precision(torch.float16)
SCALED = zerolite.Precision(torch.float16, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))

# What rank 0 shards and with what, what rank 1 does, and what the error says.
Told = tuple[Callable[[], nn.Module], dict]
SHARDS: dict[str, tuple[Told, Told, list[str]]] = {
    "stage": ((model_of, {"stage": 0}), (model_of, {"stage": 1}), ["stage is 0 on rank 0 and 1 on rank 1"]),
    "precision": ((model_of, {}), (model_of, {"precision": BF16}), ["precision is None on rank 0", "bfloat16"]),
    "reduction": (
        (model_of, {"precision": BF16}),
        (model_of, {"precision": zerolite.Precision(torch.bfloat16, torch.bfloat16)}),
        ["reduced in torch.float32 on rank 0 and", "reduced in torch.bfloat16 on rank 1"],
    ),
    "scaler": ((model_of, {"precision": FP16}), (model_of, {"precision": SCALED}), ["scaler is", "8.0"]),
    "offload": ((model_of, {}), (model_of, {"offload": "cpu"}), ["offload is None on rank 0 and Offload("]),
    "states": (
        (model_of, {"offload": zerolite.Offload(states="int8")}),
        (model_of, {"offload": "cpu"}),
        ["states=int8", "states=fp32"],
    ),
    "units": ((model_of, {}), (model_of, {"units": nn.LayerNorm}), ["blocks.0.norm.weight is", "of unit blocks.0,"]),
    "width": ((model_of, {}), (lambda: model_of(9), {}), ["first.weight is (7, 5)", "(9, 5)", "on rank 1"]),
    "depth": ((model_of, {}), (lambda: model_of(blocks=4), {}), ["blocks.3.norm.weight is absent on rank 0 and (7,)"]),
    "dtype": ((model_of, {}), (lambda: model_of(dtype=torch.float64), {}), ["torch.float32", "torch.float64"]),
    "frozen": (
        (model_of, {}),
        (lambda: model_of(changed=freeze), {}),
        ["blocks.0.up.weight is", "trainable on rank 0", "frozen on rank 1"],
    ),
    "names": ((model_of, {}), (lambda: model_of(changed=rename), {}), ["parameter last.bias is", "absent on rank 1"]),
    "order": (
        (model_of, {}),
        (lambda: model_of(changed=other_order), {}),
        ["their order: number ", "is parameter blocks.0.norm.weight on rank 0 and parameter blocks.0."],
    ),
    "buffer": (
        (lambda: model_of(changed=with_buffer(torch.int64)), {}),
        (lambda: model_of(changed=with_buffer(torch.float32)), {}),
        ["buffer table is (3,) torch.int64 on rank 0 and (3,) torch.float32 on rank 1"],
    ),
}


def shard_unlike(stage: int) -> list[tuple[str, str]]:
    said = []
    for first, second, _ in SHARDS.values():
        make, options = (first, second)[rank()]
        said.append(attempt(lambda make=make, options=options: zerolite.shard(make(), **({"stage": stage} | options))))
    return said


@pytest.mark.parametrize("stage", [0, 3])
def test_shard_compares_all_that_collectives_and_numbers_depend_on(ranks, stage):
    """No rank waits, and gloo ends no process over a message of another size."""
    for results in ranks(2).run(shard_unlike, stage):
        for (name, (*_, parts)), (kind, text) in zip(SHARDS.items(), results, strict=True):
            assert kind == "ZeroliteError" and "zerolite.shard" in text, f"{name}: {kind or 'nothing'} {text}"
            assert all(part in text for part in parts), f"{name}: {text}"


def shard_with_another_torch() -> tuple[str, str]:
    version = torch.__version__
    torch.__version__ = "2.11.0+cu130" if rank() == 1 else "2.13.0+cpu"
    try:
        return attempt(lambda: zerolite.shard(model_of(), stage=2))
    finally:
        torch.__version__ = version


def test_ranks_of_another_torch_are_refused_with_both_versions(ranks):
    for kind, text in ranks(2).run(shard_with_another_torch):
        assert kind == "ZeroliteError" and "version of torch is 2.13.0 on rank 0 and 2.11.0 on rank 1" in text


def groups_of(model: nn.Module, **options) -> list[dict]:
    first, *rest = model.parameters()
    return [{"params": [first], **options}, {"params": rest}]


# What makes rank 1's optimizer, where rank 0's is AdamW(lr=1e-3) of two groups, and what the error says.
OPTIMIZERS: dict[str, tuple[Callable, list[str]]] = {
    "class": (lambda m: zerolite.Lion(groups_of(m), lr=1e-3), ["optimizer is AdamW on rank 0 and Lion on rank 1"]),
    "sibling": (lambda m: zerolite.Adam(groups_of(m), lr=1e-3), ["optimizer is AdamW on rank 0 and Adam on rank 1"]),
    "lr": (lambda m: zerolite.AdamW(groups_of(m), lr=2e-3), ["lr of param group 0 is 0.001 on rank 0 and 0.002"]),
    "last bit": (lambda m: zerolite.AdamW(groups_of(m), lr=0.0010000000000000002), ["lr of param group 0 is 0.001"]),
    "one group": (lambda m: zerolite.AdamW(groups_of(m, eps=1e-6), lr=1e-3), ["eps of param group 0 is 1e-08"]),
    "betas": (lambda m: zerolite.AdamW(groups_of(m), lr=1e-3, betas=(0.9, 0.95)), ["betas of param group 1"]),
    "decay": (lambda m: zerolite.AdamW(groups_of(m), lr=1e-3, weight_decay=0.3), ["weight_decay of param group"]),
    "clip": (
        lambda m: zerolite.AdamW(groups_of(m), lr=1e-3, max_grad_norm=1.0),
        ["max_grad_norm is None on rank 0 and 1.0 on rank 1"],
    ),
    "a group less": (lambda m: zerolite.AdamW(m.parameters(), lr=1e-3), ["by group is [1, 21] on rank 0 and [22] on"]),
    "a parameter less": (
        lambda m: zerolite.AdamW([{"params": g["params"][:3]} for g in groups_of(m)], lr=1e-3),
        ["number of parameters by group is [1, 21] on rank 0 and [1, 3] on", "is 1 on rank 0 and absent on rank 1"],
    ),
    "tensor": (lambda m: zerolite.AdamW(groups_of(m), lr=torch.tensor(1e-3)), ["lr of param group 0 is 0.001"]),
}


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 5)).square().sum().backward()


def step_unlike(stage: int, offload: str | None) -> list[tuple[str, str]]:
    """Each optimizer's first step, and whether all parameters are still those of before."""
    said = []
    for make, _ in OPTIMIZERS.values():
        model = zerolite.shard(model_of(), stage=stage, offload=offload)
        with zerolite.full_params(model):
            before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = make(model) if rank() == 1 else zerolite.AdamW(groups_of(model), lr=1e-3)
        backward(model)
        said.append(attempt(optimizer.step))
        with zerolite.full_params(model):
            assert all(map(torch.equal, before, model.parameters()))
    return said


@pytest.mark.parametrize("stage, offload", [(0, None), (2, "cpu"), (3, None)])
def test_the_first_step_compares_optimizers(ranks, stage, offload):
    """Both ranks raise and nothing is stepped, where one model would have been stepped by two rules."""
    for results in ranks(2).run(step_unlike, stage, offload):
        for (name, (_, parts)), (kind, text) in zip(OPTIMIZERS.items(), results, strict=True):
            assert kind == "ZeroliteError" and "ranks differ in the optimizer" in text, f"{name}: {kind} {text}"
            assert all(part in text for part in parts), f"{name}: {text}"


def set_lr(model, optimizer) -> None:
    optimizer.param_groups[1]["lr"] = 0.5


def set_tensor_lr(model, optimizer) -> None:
    optimizer.param_groups[0]["lr"].fill_(0.5)


def add_group(model, optimizer) -> None:
    parameter = optimizer.param_groups[1]["params"].pop()
    optimizer.param_groups.append({**optimizer.param_groups[1], "params": [parameter]})


def change_between_steps(stage: int) -> list[list[tuple[str, str]]]:
    """Three steps a change: alike, after the same change on both ranks, after one on rank 1 alone."""
    said = []
    for change in (set_lr, set_tensor_lr, add_group):
        model = zerolite.shard(model_of(), stage=stage)
        lr = torch.tensor(1e-3) if change is set_tensor_lr else 1e-3
        optimizer = zerolite.AdamW(groups_of(model, lr=lr), lr=1e-3)
        of_change = []
        for step in range(3):
            if step == 1 and change is not set_tensor_lr or step == 2 and rank() == 1:
                change(model, optimizer)
                if step == 1 and change is set_lr:
                    optimizer.param_groups[1]["lr"] = 0.25
            backward(model)
            of_change.append(attempt(optimizer.step))
            optimizer.zero_grad()
        said.append(of_change)
    return said


def test_every_step_compares_what_may_change_between_two(ranks):
    """A rate, a rate in a tensor, groups: the same on both is nothing to say."""
    parts = [
        "lr of param group 1 is 0.25 on rank 0 and 0.5 on rank 1",
        "lr of param group 0 is 0.001",
        "param group of last.weight is 1 on rank 0 and 3 on rank 1",
    ]
    for results in ranks(2).run(change_between_steps, 1):
        for part, (*before, (kind, text)) in zip(parts, results, strict=True):
            assert before == [("", "")] * 2, before
            assert kind == "ZeroliteError" and part in text, text


def clip_unlike() -> list[tuple[str, str]]:
    model = zerolite.shard(model_of(), stage=2)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)
    said = []
    for _ in range(2):
        backward(model)
        said.append(attempt(lambda: optimizer.clip_grad_norm_(1.0 + rank())))
        optimizer.zero_grad()
    return said


def test_clipping_by_hand_to_another_norm_is_named_by_the_next_exchange(ranks):
    """Its own exchange is over when `max_norm` is used: the clip after it tells, without a collective more."""
    for first, (kind, text) in ranks(2).run(clip_unlike):
        assert first == ("", "") and kind == "ZeroliteError"
        assert "max_norm of the last clip_grad_norm_ is 1.0 on rank 0 and 2.0 on rank 1" in text


def more_micro_batches_on_rank_1() -> list[torch.Tensor]:
    model = zerolite.shard(model_of(dtype=torch.float64), stage=2)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        for _ in range(rank()):
            with zerolite.no_sync(model):
                model(torch.full((2, 5), 0.5, dtype=torch.float64)).square().sum().backward()
        model(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return [parameter.detach().clone() for parameter in model.parameters()]


def test_ranks_may_have_other_numbers_of_micro_batches_inside_no_sync(ranks):
    """Each adds up its own, and the mean over ranks is stepped, as in DDP."""
    model = model_of(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        (model(torch.full((2, 5), 0.5, dtype=torch.float64)).square().sum() / 2).backward()
        model(torch.ones(2, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameters in ranks(2).run(more_micro_batches_on_rank_1):
        torch.testing.assert_close(parameters, [p.detach() for p in model.parameters()], rtol=1e-9, atol=1e-12)


# messages


def send_unlike(what: str) -> tuple[str, str]:
    group = collectives.group_of(dist.group.WORLD, torch.device("cpu"))
    numel = 8 * (1 + rank()) if "size" in what else 8
    dtype = torch.float64 if "dtype" in what and rank() else torch.float32
    values = torch.ones(numel, dtype=dtype)
    label = f"gathering {rank()}" if "label" in what else "gathering"

    def send() -> None:
        if what == "broadcast of another size":
            group.broadcast(values)
        elif what == "sum of another size":
            group.all_reduce(values)
        elif what == "scatter of another size":
            group.reduce_scatter(values, torch.empty_like(values[: numel // 2]), 1, label).wait()
        else:
            group.all_gather(values.new_empty(2 * numel), values, label).wait()

    return attempt(send)


MESSAGES = {
    "size": ["gathering, 32 bytes of float32", "gathering, 64 bytes of float32"],
    "dtype": ["gathering, 32 bytes of float32", "gathering, 64 bytes of float64"],
    "dtype of one size": ["32 bytes of float32", "bytes of float64"],
    "label": ["gathering 0, 32 bytes", "gathering 1, 32 bytes"],
    "broadcast of another size": ["broadcasting 32 bytes", "broadcasting 64 bytes"],
    "sum of another size": ["adding up over replicas, 32 bytes", "64 bytes"],
    "scatter of another size": ["gathering, 16 bytes", "32 bytes"],
}


@pytest.mark.parametrize("what", MESSAGES)
def test_messages_that_do_not_match_are_an_error_on_both_ranks(ranks, what):
    """gloo ends the process for a message of another size; here each rank says what both were about to send."""
    for kind, text in ranks(2).run(send_unlike, what):
        assert kind == "ZeroliteError" and all(part in text for part in MESSAGES[what]), text


def wait_twice() -> tuple[list[tuple[str, str]], float]:
    """A unit whose gather has failed is freed on the error's way out, which waits for the gather again."""
    group = collectives.group_of(dist.group.WORLD, torch.device("cpu"))
    pending = group.all_gather(torch.ones(4), torch.ones(2), f"gathering {rank()}")
    said = [attempt(pending.wait)]
    begin = time.monotonic()
    said.append(attempt(pending.wait))
    return said, time.monotonic() - begin


def test_a_collective_that_failed_fails_again_at_once(ranks):
    """gloo would wait for the timeout of its group, since what came was taken the first time."""
    for (first, second), seconds in ranks(2).run(wait_twice):
        assert first == second and first[0] == "ZeroliteError" and seconds < 1.0


def train_unevenly() -> tuple[str, str]:
    """Rank 1's loader has a batch more."""
    model = zerolite.shard(model_of(), stage=1)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)
    backward(model)
    if rank() == 1:
        backward(model)
    return attempt(optimizer.step)


def test_a_batch_more_on_one_rank_is_said_to_be_that(ranks):
    """The collectives of a step and of another backward meet: both ranks name both, and the likely cause."""
    try:
        said = ranks(2).run(train_unevenly)
    except Exception as error:  # the rank with the batch more fails in its backward
        said = [(getattr(error, "kind", ""), getattr(error, "message", ""))]
    for kind, text in said:
        assert kind == "ZeroliteError" and "another number of batches or steps" in text
        assert "the exchange of a few numbers" in text and "reducing the gradients" in text
