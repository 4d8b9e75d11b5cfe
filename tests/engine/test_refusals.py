"""Mistakes are refused by name, at once, on every rank."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from models import Stack
from ranks import RankError
from torch import nn


def shard(**options):
    import zerolite

    return zerolite.shard(Stack(), **options)


def mesh(*shape: int):
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=("one", "two", "three")[: len(shape)])


def mesh_of_some():
    shard(stage=1, mesh=dist.DeviceMesh("cpu", [0]))


def mesh_of_three_dimensions():
    shard(stage=1, mesh=mesh(2, 1, 1))


def mesh_of_numbers():
    shard(stage=1, mesh=(2,))


def shard_twice():
    import zerolite

    zerolite.shard(shard(stage=1), stage=2)


def shard_a_part_again():
    import zerolite

    zerolite.shard(shard(stage=1).blocks[0], stage=1)


def shard_a_whole_with_sharded_part():
    import zerolite

    model = Stack()
    zerolite.shard(model.blocks[0], stage=1)
    zerolite.shard(model, stage=1)


def shard_a_list():
    import zerolite

    zerolite.shard([nn.Linear(2, 2)], stage=1)


def optimizer_of_unsharded():
    import zerolite

    zerolite.AdamW(Stack().parameters(), lr=1e-3)


def optimizer_of_a_foreign_parameter():
    import zerolite

    zerolite.AdamW([*shard(stage=2).parameters(), nn.Parameter(torch.ones(2))], lr=1e-3)


def optimizer_of_nothing():
    import zerolite

    zerolite.AdamW([], lr=1e-3)


def optimizer_of_two_models():
    import zerolite

    zerolite.AdamW([*shard(stage=2).parameters(), *shard(stage=2).parameters()], lr=1e-3)


def a_parameter_in_two_groups():
    import zerolite

    model = shard(stage=2)
    zerolite.AdamW([{"params": [model.first.weight]}, {"params": [model.first.weight]}], lr=1e-3)


def optimizer(rule: str = "AdamW", **options):
    import zerolite

    getattr(zerolite, rule)(shard(stage=2).parameters(), **options)


def state_of_another_model():
    import zerolite

    small = zerolite.AdamW(shard(stage=2).parameters(), lr=1e-3)
    large = zerolite.AdamW(zerolite.shard(Stack(width=9), stage=2).parameters(), lr=1e-3)
    small.load_state_dict(large.state_dict())


def torchs_optimizer():
    model = shard(stage=3)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 5)).sum().backward()
    adam.step()


def unsharded(name: str):
    import zerolite

    with getattr(zerolite, name)(Stack()):
        pass


def precision(*arguments):
    import zerolite

    zerolite.Precision(*arguments)


MISTAKES = {
    "stage 4": (shard, {"stage": 4}, "ValueError", "stage.*4"),
    "stage -1": (shard, {"stage": -1}, "ValueError", "stage.*-1"),
    "stage '2'": (shard, {"stage": "2"}, "(Value|Type)Error", "stage.*'2'"),
    "stage True": (shard, {"stage": True}, "(Value|Type)Error", "stage.*True"),
    "stage 2.5": (shard, {"stage": 2.5}, "(Value|Type)Error", "stage.*2.5"),
    "offload": (shard, {"stage": 2, "offload": "gpu"}, "ValueError", "offload.*cpu.*'gpu'"),
    "a dtype as precision": (shard, {"stage": 2, "precision": torch.bfloat16}, "TypeError", "[Pp]recision"),
    "units that match nothing": (shard, {"stage": 2, "units": [nn.Conv1d]}, "ValueError", "units.*Conv1d"),
    "units that are names": (shard, {"stage": 2, "units": ["Block"]}, "TypeError", "units.*Block"),
    "a mesh of some ranks": (mesh_of_some, {}, "ValueError", "mesh"),
    "a mesh of three dimensions": (mesh_of_three_dimensions, {}, "ValueError", "mesh"),
    "a mesh that is a tuple": (mesh_of_numbers, {}, "TypeError", "mesh"),
    "sharded twice": (shard_twice, {}, "ValueError", "shard"),
    "a part sharded again": (shard_a_part_again, {}, "ValueError", "shard"),
    "a whole with a sharded part": (shard_a_whole_with_sharded_part, {}, "ValueError", "shard"),
    "a list as model": (shard_a_list, {}, "TypeError", "Module"),
    "an optimizer before shard": (optimizer_of_unsharded, {}, "ValueError", "shard"),
    "an optimizer with a foreign parameter": (optimizer_of_a_foreign_parameter, {}, "ValueError", "shard"),
    "an optimizer of nothing": (optimizer_of_nothing, {}, "ValueError", "empty|no param"),
    "an optimizer of two models": (optimizer_of_two_models, {}, "ValueError", "two|one"),
    "a parameter in two groups": (a_parameter_in_two_groups, {}, "ValueError", "group"),
    "a learning rate below 0": (optimizer, {"lr": -1.0}, "ValueError", "lr|learning rate"),
    "betas beyond 1": (optimizer, {"lr": 1e-3, "betas": (0.9, 1.5)}, "ValueError", "beta"),
    "eps below 0": (optimizer, {"lr": 1e-3, "eps": -1.0}, "ValueError", "eps"),
    "weight decay below 0": (optimizer, {"lr": 1e-3, "weight_decay": -0.1}, "ValueError", "weight_decay"),
    "max_grad_norm below 0": (optimizer, {"lr": 1e-3, "max_grad_norm": -1.0}, "ValueError", "max_grad_norm"),
    "Lion betas": (optimizer, {"rule": "Lion", "betas": (-0.1, 0.9)}, "ValueError", "beta"),
    "Lamb eps": (optimizer, {"rule": "Lamb", "eps": -0.1}, "ValueError", "eps"),
    "the state of another model": (state_of_another_model, {}, "ValueError", "state|size"),
    "no_sync before shard": (unsharded, {"name": "no_sync"}, "ValueError", "shard"),
    "full_params before shard": (unsharded, {"name": "full_params"}, "ValueError", "shard"),
}


def attempt(name: str) -> None:
    function, options, _, _ = MISTAKES[name]
    function(**options)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_by_name(ranks, name):
    _, _, kind, words = MISTAKES[name]
    with pytest.raises(RankError) as caught:
        ranks(2, timeout=20).run(attempt, name)
    assert re.fullmatch(kind, caught.value.kind), caught.value
    assert re.search(words, caught.value.message), caught.value.message
    assert len(caught.value.message) > 25, "say what was expected, what came and what to do"


@pytest.mark.parametrize(
    "arguments, kind",
    [
        ((torch.int8,), TypeError),
        (("bf16",), TypeError),
        ((torch.bfloat16, "fp32"), TypeError),
        ((torch.float16, torch.float32, 1024.0), TypeError),
        ((torch.bfloat16, torch.float32, torch.amp.GradScaler("cpu")), ValueError),
    ],
    ids=lambda value: re.sub(r" object at 0x\w+", "", str(value)),
)
def test_precision_refuses_what_it_cannot_do(arguments, kind):
    with pytest.raises(kind):
        precision(*arguments)
