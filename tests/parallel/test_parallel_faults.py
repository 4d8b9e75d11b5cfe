"""Is what happens on one rank of a mesh known to all: Inf, other settings, partial gradients, failures?"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from parallel_runs import CLIP, OPTIONS, WIDTH, Case, parts_of, train, whole
from saved import attempt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zerolite
from zerolite.runtime import abort

STAGES, SPLIT = (2, 1, 2), (1, 2, 2)  # pipeline, data, tensor


def mesh_of(shape: tuple[int, int, int]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp", "tp"))


def skip_on_all(infinite_on: int, name: str) -> tuple[bool, list[str], list[str], bool]:
    """One rank has Inf in its part of a gradient: was the step skipped, which units, what was said, what moved?"""
    case = Case("mlp", STAGES, 3, "1f1b", steps=(0, 1))
    mesh = mesh_of(case.mesh)
    (part,) = parts_of(case, mesh)
    if dist.get_rank() == infinite_on:
        part.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))
    model = zerolite.shard(part, case.stage, mesh=mesh["dp"], norm_over=(mesh["pp"],))
    optimizer = zerolite.AdamW(model.parameters(), **OPTIONS, max_grad_norm=CLIP)
    with zerolite.full_params(model):
        before = [whole(parameter) for parameter in model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(case, mesh, model, [part], optimizer)
    with zerolite.full_params(model):
        moved = any(not torch.equal(old, whole(new)) for old, new in zip(before, model.parameters(), strict=True))
    words = [str(one.message) for one in said if "step skipped" in str(one.message)]
    return optimizer.step_was_skipped, optimizer.skipped_units, words, moved


def skip_each(places: list[tuple[int, str]]) -> list[tuple]:
    return [skip_on_all(*place) for place in places]


def test_inf_on_one_rank_of_one_stage_skips_the_step_of_all(ranks):
    """In a split parameter of the first stage on rank 1, and in a whole one of the last stage on rank 2."""
    for rank, answers in enumerate(ranks(4).run(skip_each, [(1, "layers.0.up.weight"), (2, "layers.2.norm.weight")])):
        for stage, (was_skipped, units, words, moved) in enumerate(answers):
            assert was_skipped and not moved and len(words) == 1
            assert bool(units) == (rank // 2 == stage) == ("another pipeline stage" not in words[0])


def clip_unlike() -> tuple[str, str]:
    mesh = mesh_of(SPLIT)
    (part,) = parts_of(Case("mlp", SPLIT, 1), mesh)
    model = zerolite.shard(part, 1, mesh=mesh["dp"])
    max_grad_norm = 1.0 + mesh["tp"].get_local_rank()
    optimizer = zerolite.AdamW(model.parameters(), max_grad_norm=max_grad_norm)
    model(torch.ones(2, WIDTH, dtype=torch.float64)).sum().backward()
    return attempt(optimizer.step)


def shard_unlike() -> tuple[str, str]:
    mesh = mesh_of(SPLIT)
    (part,) = parts_of(Case("mlp", SPLIT, 1), mesh)
    return attempt(lambda: zerolite.shard(part, 1 + mesh["tp"].get_local_rank(), mesh=mesh["dp"]))


class Gated(nn.Module):
    """A block that is parallel over its sequence, with a norm that the plan has forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def forget_a_norm() -> tuple[str, str]:
    mesh = mesh_of(SPLIT)
    torch.manual_seed(0)
    model = Gated().double()
    plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    parallelize_module(model, mesh["tp"], plan)
    model = zerolite.shard(model, 2, mesh=mesh["dp"])
    optimizer = zerolite.AdamW(model.parameters())
    own = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    model(own).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return attempt(optimizer.step)


def all_unlike() -> list[tuple[str, str]]:
    return [clip_unlike(), shard_unlike(), forget_a_norm()]


def test_ranks_of_tensor_parallelism_are_compared(ranks):
    """Other optimizers, other stages, and gradients of a whole parameter that are each a part of the sum."""
    for clipped, sharded, forgotten in ranks(4).run(all_unlike):
        assert clipped[0] == "ZeroliteError" and "max_grad_norm is 1.0 on" in clipped[1] and "2.0 on" in clipped[1]
        assert sharded[0] == "ZeroliteError" and "stage is 1 on ranks 0, 2 and 2 on ranks 1, 3" in sharded[1]
        assert forgotten[0] == "UserWarning" and "norm.weight" in forgotten[1] and "SequenceParallel" in forgotten[1]


def start_alike_and_hear() -> tuple[dict, str]:
    """Whole and split parameters after sharding, of ranks that drew other values; what a rank hears of another's."""
    mesh = mesh_of(SPLIT)
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    model[1].bias = nn.Parameter(torch.randn(2))
    model = zerolite.shard(model, 1, mesh=mesh["dp"])
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    listener = abort.listener()
    assert listener is not None
    dist.barrier()
    if dist.get_rank() == 3:
        abort.publish("rank 3 has lost its worker")
    listener.join(20)  # it ends the process groups when it has heard, and then itself
    return found, listener.failure.message if listener.failure is not None else ""


def test_all_ranks_start_alike_and_hear_of_a_failure_anywhere(ranks):
    """A sub-mesh is no island: rank 0's values are everybody's, and rank 3's failure is heard by the other groups."""
    of_ranks = ranks(4).run(start_alike_and_hear)
    for found, heard in of_ranks:
        assert heard == "rank 3 has lost its worker"
        assert all(torch.equal(found[name], values) for name, values in of_ranks[0][0].items())


def train_apart() -> float:
    """Ranks 0 and 1 train one model, ranks 2 and 3 another, each on a mesh of their own."""
    half = dist.get_rank() // 2
    mesh = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][half]
    model = zerolite.shard(nn.Linear(3, 1, bias=False), 3, mesh=mesh)
    optimizer = zerolite.AdamW(model.parameters())
    model(torch.full((1, 3), float(half + 1))).sum().backward()
    optimizer.step()
    return optimizer.grad_norm


def test_two_models_train_on_meshes_of_their_own(ranks):
    assert [round(norm / 3**0.5, 6) for norm in ranks(4).run(train_apart)] == [1.0, 1.0, 2.0, 2.0]
