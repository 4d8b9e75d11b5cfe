"""Does what foreign code does to parameters after `shard` count as in plain torch, or is it refused by name?"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
import torch
from models import Stack
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters
from zerolite_kernels import cpu

import zerolite

needs_kernels = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")

EDIT_STEP, STEPS = 1, 3


def stack(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return Stack(blocks=2).to(dtype)


def rank_batch(step: int, rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64).to(dtype)


# Ways to double every parameter #


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(2)


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def by_vector(model: nn.Module) -> None:
    parameters = list(model.parameters())
    vector_to_parameters(2 * parameters_to_vector(parameters).detach(), parameters)


def by_assignment(model: nn.Module) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


def by_new_objects(model: nn.Module) -> None:
    list(model.parameters())  # with offload the model has what was stepped fetched, its modules have not
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(2 * parameter.detach()))


def by_apply(model: nn.Module) -> None:
    model._apply(lambda tensor: 2 * tensor)


WAYS: list[Callable[[nn.Module], None]] = [
    in_place,
    through_data,
    by_data,
    by_vector,
    by_assignment,
    by_new_objects,
    by_apply,
]


def train_and_double(stage: int, dtype: torch.dtype = torch.float64, offload=None) -> dict[str, list[torch.Tensor]]:
    """The parameters after a run whose parameters were doubled in the middle, each way."""
    rank = torch.distributed.get_rank()
    results = {}
    for way in WAYS:
        model = zerolite.shard(stack(dtype), stage=stage, offload=offload)
        optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            if step == EDIT_STEP:
                with zerolite.full_params(model, writeback=True) if stage == 3 else contextlib.nullcontext():
                    way(model)
                model.to("cpu:0")  # as trainers do: new memory with the same values
            model(rank_batch(step, rank, dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with zerolite.full_params(model):
            results[way.__name__] = [parameter.detach().clone() for parameter in model.parameters()]
    return results


def expected_of(world: int) -> list[torch.Tensor]:
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        if step == EDIT_STEP:
            in_place(model)
        for rank in range(world):
            (model(rank_batch(step, rank)).square().mean() / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("world", [1, 2])
def test_doubled_parameters_train_on_as_in_plain_torch(ranks, world):
    """Written, given as data, as one vector, by a state dict, as new objects: forward and step go on from there."""
    expected = expected_of(world)
    for stage in range(4) if world == 2 else (1, 3):
        for results in ranks(world).run(train_and_double, stage):
            for way, found in results.items():
                for value, truth in zip(found, expected, strict=True):
                    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12, msg=f"{way} at stage {stage}")


@needs_kernels
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_no_bit_of_them(ranks, stage):
    plain = ranks(2).run(train_and_double, stage, torch.float32)
    offloaded = ranks(2).run(train_and_double, stage, torch.float32, "cpu")
    for results, truth in zip(offloaded, plain, strict=True):
        for way, found in results.items():
            assert all(map(torch.equal, found, truth[way])), way


def fill_with_a_master(stage: int, through_data: bool, offload=None) -> bool:
    model = zerolite.shard(stack(), stage=stage, precision=zerolite.Precision(), offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for _ in range(2):  # a read that writes nothing, and one that does, behind a step
        model(torch.ones(2, 5)).float().square().mean().backward()
        model.first.weight.data.norm()
        optimizer.step()
        optimizer.zero_grad()
    next(model.parameters())  # with offload the model has what was stepped fetched
    with torch.no_grad():
        (model.first.weight.data if through_data else model.first.weight).fill_(0.5)
    model(torch.ones(2, 5)).float().square().mean().backward()
    optimizer.step()
    next(model.parameters())
    return bool((model.first.weight == 0.5).all())


@pytest.mark.parametrize("through_data", [False, True])
def test_what_is_written_into_16_bits_reaches_the_master(ranks, through_data):
    """As weights are clipped: `p.data.clamp_()`."""
    for stage in range(3):
        assert all(ranks(2).run(fill_with_a_master, stage, through_data))
    assert all(ranks(2).run(fill_with_a_master, 2, through_data, "cpu"))


# What is refused #


def cast(model):
    model.half()


def cast_a_part(model):
    model.blocks[0].float()


def give_other_shape(model):
    model.last.weight.data = torch.ones(4, 7, dtype=torch.float64)


def replace_the_head(model):
    model.last = nn.Linear(7, 3).double()


def grow(model):
    model.last.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.float64))


def add_a_layer(model):
    model.extra = nn.Linear(2, 2)


def tie(model):
    model.blocks[0].up.weight = model.blocks[1].up.weight


def unfreeze(model):
    model.blocks[1].norm.weight.requires_grad_(True)


def double_nan(model):
    model.last.weight = nn.Parameter(2 * model.last.weight.detach())


def prune_nan(model):
    prune.l1_unstructured(model.blocks[0].up, "weight", amount=0.5)


def write_one_element(model):
    with torch.no_grad():
        model.scale.fill_(3.0)


REFUSALS = {
    cast: ("blocks|first|last", range(4)),
    cast_a_part: ("blocks.0.norm.weight", range(4)),
    give_other_shape: ("last.weight.*shape", range(4)),
    replace_the_head: ("last.weight", range(4)),
    grow: (r"last.weight.*\(5, 7\)", range(4)),
    add_a_layer: ("extra.weight", range(4)),
    tie: ("blocks.0.up.weight was tied", range(4)),
    unfreeze: ("blocks.1.norm.weight was frozen", range(4)),
    double_nan: ("last.weight.*full_params", [3]),
    prune_nan: ("blocks.0.up.weight.*full_params", [3]),
    write_one_element: ("scale.*full_params", [3]),
}


def refusals(stage: int) -> dict[str, str]:
    """What is said about each mistake, by a forward and by a step, before anything is trained."""
    said = {}
    for mistake, (_, stages) in REFUSALS.items():
        for place in ("forward", "step") if stage in stages else ():
            model = stack()
            model.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
            model.blocks[1].norm.weight.requires_grad_(False)
            zerolite.shard(model, stage=stage)
            optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
            model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
            try:
                mistake(model)
                if place == "step":
                    optimizer.step()
                else:
                    model(torch.ones(2, 5, dtype=torch.float64))
                said[f"{mistake.__name__} {place}"] = "nothing"
            except ValueError as error:
                said[f"{mistake.__name__} {place}"] = str(error)
    return said


@pytest.mark.parametrize("stage", range(4))
def test_what_cannot_be_stored_is_refused_by_name(ranks, stage):
    patterns = {mistake.__name__: pattern for mistake, (pattern, _) in REFUSALS.items()}
    for said in ranks(2).run(refusals, stage):
        assert said
        for what, text in said.items():
            assert re.search(patterns[what.split()[0]], text), f"{what}: {text}"


class Averaging(nn.Module):
    """A codebook that moves in forward, with or without a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.codebook = nn.Parameter(torch.ones(64, 4), requires_grad=False)  # each rank has a part of it

    through_data = False

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        with torch.no_grad():
            (self.codebook.data if self.through_data else self.codebook).mul_(0.5)
        return x + self.codebook.sum(0)


def average(stage: int, offload=None, through_data: bool = False) -> str:
    model = zerolite.shard(Averaging(), stage=stage, offload=offload)
    model.through_data = through_data
    try:
        with torch.no_grad():
            model(torch.ones(1, 4))
            model(torch.ones(1, 4))
    except ValueError as error:
        return str(error)
    with zerolite.full_params(model):
        return str(model.codebook.unique().tolist())


def test_a_codebook_written_in_forward_moves_or_is_refused(ranks):
    for stage, text in ((0, r"\[0.25\]"), (2, r"\[0.25\]"), (3, "codebook: written in place while gathered")):
        for said in ranks(2).run(average, stage):
            assert re.match(text, said)
    assert ranks(1).run(average, 3) == ["[0.25]"]
    said = ranks(2).run(average, 3, None, True)
    assert all(re.match("codebook: written in place while gathered", one) for one in said), said


@needs_kernels
def test_a_codebook_that_is_streamed_to_one_rank_moves(ranks):
    """Its gathered copy is freed after each forward; no other rank has a part of it."""
    assert ranks(1).run(average, 3, zerolite.Offload(parameters=True)) == ["[0.25]"]


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def surgery_inside(stage: int) -> tuple[int, bool, list[str]]:
    model = zerolite.shard(stack(), stage=stage)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    with zerolite.full_params(model, writeback=True):
        prune.l1_unstructured(model.blocks[0].up, "weight", amount=0.5)
        parametrize.register_parametrization(model.blocks[1].up, "weight", Double())
    with zerolite.full_params(model):
        before = model.blocks[0].up.weight_orig.detach().clone()
    model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="drops .*last.bias") if stage == 3 else contextlib.nullcontext():
        with zerolite.full_params(model), torch.no_grad():
            moved = not torch.equal(before, model.blocks[0].up.weight_orig)
            model.last.bias.zero_()
    return int(model.blocks[0].up.weight_mask.sum()), moved, [name for name, _ in model.named_parameters()]


def test_pruning_and_parametrization_inside_full_params_train_on(ranks):
    """The sharded parameter stands under another name; what is written without writeback at stage 3 warns."""
    results = [result for stage in (1, 3) for result in ranks(2).run(surgery_inside, stage)]
    assert all(result == results[0] for result in results)
    num_kept, moved, names = results[0]
    assert num_kept == 53 and moved and "blocks.1.up.parametrizations.weight.original" in names


def freeze_between(stage: int) -> bool:
    model = zerolite.shard(stack(), stage=stage)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    with zerolite.full_params(model):
        before = model.last.weight.detach().clone()
    model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    model.last.weight.requires_grad_(False)
    optimizer.step()
    with zerolite.full_params(model):
        return not torch.equal(before, model.last.weight)


def test_a_parameter_frozen_between_backward_and_step_is_stepped_as_in_torch(ranks):
    for stage in (0, 3):
        assert all(ranks(2).run(freeze_between, stage))
