"""Is a unit that `zerolite.compile` has compiled one graph, compiled once, that computes what plain torch computes?"""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from lora_models import draw
from models import (
    FACTORIES,
    LOSS_SCALE,
    Block,
    Stack,
    assert_close,
    build,
    divide_gradients,
    joint_batch,
    loss_of,
    part,
    whole,
)
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from trial import Result, Trial, reference, train_each

import zerolite

BACKEND = "aot_eager"  # all of torch.compile but the generated code


def compiled(model: nn.Module, stage: int, **options) -> nn.Module:
    return zerolite.compile(sharded(model, stage, **options), backend=BACKEND)


sharded = zerolite.shard


def counted(work, *arguments):
    """(what `work` returns, graphs compiled, breaks and other things that dynamo could not do) from a clean start."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        result = work(*arguments)
    failures = {kind: dict(counters[kind]) for kind in ("graph_break", "unimplemented", "recompile_limit")}
    return result, counters["stats"]["unique_graphs"], {kind: found for kind, found in failures.items() if found}


class Recomputed(Stack):
    """Whose blocks a checkpoint calls again, with their hooks, in backward."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


def train_compiled(factory: type | None, trials: list[tuple[Trial, int]]) -> list[Result]:
    factories = {"stack": factory} if factory else {}
    with mock.patch.object(zerolite, "shard", compiled), mock.patch.dict(FACTORIES, factories):
        return train_each(trials)


STACK = Trial("stack", accumulation=2, max_grad_norm=0.05, reduce=torch.float64)
OFFLOADED = Trial("stack", offload=zerolite.Offload(), max_grad_norm=0.05)
LLAMA = Trial("llama", steps=2, checkpointing="non-reentrant")
CASES = {  # what makes the model, runs, graphs that all of them share; those of stage 3 are others' of stages 0 to 2
    "stages": (None, [*((STACK, stage) for stage in range(4)), (OFFLOADED, 2), (OFFLOADED, 3)], 2),
    "recomputed": (Recomputed, [(STACK, 3)], 1),
    "llama": (None, [(LLAMA, 3)], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_unit_is_one_graph_and_its_run_that_of_plain_torch(ranks, name):
    factory, trials, expected = CASES[name]
    for results, graphs, failures in ranks(2).run(counted, train_compiled, factory, trials):
        assert (graphs, failures) == (expected, {})
        for result, (trial, _) in zip(results, trials, strict=True):
            assert_close(result.parameters, reference(trial, 2).parameters, rtol=1e-11, atol=1e-13)


def lora_steps(model: nn.Module, optimizer, rank: int, world: int) -> dict[str, torch.Tensor]:
    for step in range(2):
        loss_of(model, part(joint_batch("llama", step), rank, world)).backward()
        if not isinstance(optimizer, zerolite.AdamW):
            divide_gradients(model, 2)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value for name, value in whole(model).items() if "lora" in name}


def with_lora() -> nn.Module:
    return draw(zerolite.adapters.add_lora(build("llama"), r=2, dropout=0.0))


def lora_on_rank() -> dict[str, torch.Tensor]:
    model = compiled(with_lora(), stage=3)
    optimizer = zerolite.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return lora_steps(model, optimizer, dist.get_rank(), 2)


def test_lora_over_frozen_weights_at_stage_3_breaks_no_graph(ranks):
    model = with_lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    expected = lora_steps(model, optimizer, 0, 1)
    for result, graphs, failures in ranks(2).run(counted, lora_on_rank):
        assert (graphs, failures) == (2, {})  # the first block's inputs need no gradient, the others' do
        assert_close(result, expected, rtol=1e-11, atol=1e-13)


class Numbered(nn.Linear):
    """As decoder layers that use their `layer_idx`."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__(width, width)
        self.number = number

    def forward(self, x):
        return super().forward(x) * (1 + self.number % 3)


def many_units() -> int:
    model = Stack(blocks=0)
    model.blocks = nn.ModuleList(Numbered(7, number) for number in range(10))
    compiled(model, stage=2)
    before = torch._dynamo.config.recompile_limit
    model(torch.ones(2, 5)).sum().backward()
    return before


def test_units_that_differ_by_a_number_are_all_compiled(ranks):
    """torch compiles one function for at most 8 of them, and runs the others uncompiled."""
    ((_, graphs, failures),) = ranks(1, distributed=False).run(counted, many_units)
    assert (graphs, failures) == (10, {})


def whole_model(trial: Trial, stage: int, how: str) -> dict[str, torch.Tensor]:
    """torch's own ways, after `shard`; gradients are cleared by the wrapper."""
    torch._dynamo.reset()
    model = sharded(build("stack"), stage)
    optimizer = zerolite.AdamW(model.parameters(), lr=trial.lr)
    used = torch.compile(model, backend=BACKEND) if how == "torch.compile" else model
    if how == "model.compile":
        model.compile(backend=BACKEND)
    for step in range(trial.steps):
        loss_of(used, part(joint_batch("stack", step), dist.get_rank(), 2)).backward()
        optimizer.step()
        used.zero_grad()
    with zerolite.full_params(model):
        return whole(model)


@pytest.mark.parametrize(("how", "stage"), [("torch.compile", 1), ("model.compile", 3)])
def test_torchs_own_compile_of_a_sharded_model_is_right(ranks, how, stage):
    trial = Trial("stack")
    for parameters in ranks(2).run(whole_model, trial, stage, how):
        assert_close(parameters, reference(trial, 2).parameters, rtol=1e-11, atol=1e-13)


def copied() -> tuple[bool, bool, bool]:
    """A copy of a compiled model, after the original has changed."""
    model = compiled(build("stack"), stage=2)
    batch = joint_batch("stack", 0)["x"]
    expected = model(batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    still_compiled = "forward" in vars(model.blocks[0]) and "forward" not in vars(twin.blocks[0])
    return torch.equal(twin(batch), expected), not torch.equal(model(batch), expected), still_compiled


def test_a_copy_of_a_compiled_model_computes_with_its_own_parameters(ranks):
    (answers,) = ranks(1, distributed=False).run(copied)
    assert answers == (True, True, True)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(2))
        self.blocks[1].up.weight = self.blocks[0].up.weight

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def refusals() -> list[str]:
    texts = []
    for model in (Stack(), zerolite.shard(Tied(), stage=0), zerolite.shard(nn.Sequential(Block(3)), stage=0)):
        with pytest.raises(ValueError) as caught:
            zerolite.compile(model, backend=BACKEND)
        texts.append(str(caught.value))
        assert not any("forward" in vars(module) for module in model.modules())
    return texts


def test_what_cannot_be_one_graph_is_refused_by_name(ranks):
    ((unsharded, tied, alone),) = ranks(1, distributed=False).run(refusals)
    assert "this Stack is not sharded: call zerolite.shard" in unsharded
    assert "blocks.0.up.weight belongs to blocks.0 and to another unit" in tied
    assert "Sequential has no unit but itself" in alone


def with_cuda_graphs() -> None:
    whole, freed = sharded(Stack(), stage=2), sharded(Stack(), stage=3)
    with mock.patch.object(torch, "compile", lambda forward, **options: forward):
        for options in (
            {"mode": "reduce-overhead"},
            {"mode": "max-autotune"},
            {"options": {"triton.cudagraphs": True}},
        ):
            zerolite.compile(whole, **options)
            with pytest.raises(ValueError, match='records CUDA graphs.*use mode="max-autotune-no-cudagraphs"'):
                zerolite.compile(freed, **options)
        zerolite.compile(freed, mode="max-autotune-no-cudagraphs")


def test_cuda_graphs_are_refused_where_parameters_move(ranks):
    """A graph would read the address that a unit had when it was recorded."""
    ranks(2).run(with_cuda_graphs)


def by_inductor() -> torch.Tensor:
    model = zerolite.compile(sharded(build("stack"), stage=3), fullgraph=True)
    (model(joint_batch("stack", 0)["x"]).square().sum() * LOSS_SCALE).backward()
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    return model(joint_batch("stack", 0)["x"]).detach()


@pytest.mark.slow  # 28 CPU-seconds of torch's inductor and a C++ compiler
def test_generated_code_computes_the_same(ranks):
    model = build("stack")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (model(joint_batch("stack", 0)["x"]).square().sum() * LOSS_SCALE).backward()
    optimizer.step()
    for result, graphs, failures in ranks(2, timeout=280.0).run(counted, by_inductor):
        assert (graphs, failures) == (1, {})
        torch.testing.assert_close(result, model(joint_batch("stack", 0)["x"]).detach(), rtol=1e-11, atol=1e-13)
