"""Is a copy of a sharded model, or of its state, a plain one or refused by name? Never one that shares the engine."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from models import Stack
from torch import nn
from torch.optim.swa_utils import AveragedModel
from zerolite_kernels import cpu

import zerolite

X = torch.ones(2, 5)


def trained(stage: int, offload=None):
    torch.manual_seed(1)
    model = zerolite.shard(Stack(blocks=2).float(), stage=stage, offload=offload)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    model(X).square().mean().backward()
    optimizer.step()
    return model, optimizer


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": saved_and_loaded,
}


def copied(stage: int, offload=None) -> bool:
    """Copies give the model's answers, train by torch, and leave the model's gradients alone."""
    model, optimizer = trained(stage, offload)
    for name, copy_of in COPIES.items():
        with zerolite.full_params(model):
            twin = copy_of(model)
            truth = {name: value.clone() for name, value in model.state_dict().items()}
        for key, value in twin.state_dict().items():
            assert torch.equal(value, truth[key]), (name, key)
        model(X).square().mean().backward()
        adam = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        twin(X).square().mean().backward()
        assert twin.first.weight.grad is not None
        twin.zero_grad()
        adam.step()
        twin.half()
        optimizer.step()
        assert optimizer.grad_norm > 0, name
        optimizer.zero_grad()
    return True


OFFLOADS = [None, pytest.param("cpu", marks=pytest.mark.skipif(cpu.path() is None, reason="no host kernels"))]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_copies_are_plain_models(ranks, offload):
    for stage in (1, 3):
        assert all(ranks(2).run(copied, stage, offload))


REFUSED = {
    "copy": lambda model, optimizer: copy.deepcopy(model),
    "average": lambda model, optimizer: AveragedModel(model),
    "pickle": lambda model, optimizer: pickle.dumps(model),
    "parameter": lambda model, optimizer: pickle.dumps(model.first.weight),
    "part": lambda model, optimizer: model.blocks.state_dict(),
    "load": lambda model, optimizer: model.last.load_state_dict({}),
    "block": lambda model, optimizer: copy.deepcopy(model.blocks[0]),
    "optimizer": lambda model, optimizer: copy.deepcopy(optimizer),
    "ddp": lambda model, optimizer: nn.parallel.DistributedDataParallel(model),
}


def refused() -> dict[str, str]:
    model, optimizer = trained(3)
    said = {}
    for name, act in REFUSED.items():
        with pytest.raises(zerolite.ZeroliteError) as caught:
            act(model, optimizer)
        said[name] = str(caught.value)
    return said


def test_at_stage_3_copies_are_refused_with_the_way(ranks):
    for said in ranks(2).run(refused):
        for name in ("copy", "average", "pickle", "parameter", "part", "load"):
            assert "weight" in said[name] and "full_params" in said[name]
        assert "copied" in said["block"] and "state_dict" in said["optimizer"] and "DistributedData" in said["ddp"]


def part_of(stage: int, offload) -> dict[str, torch.Tensor]:
    model, _ = trained(stage, offload)
    return {name: value.clone() for name, value in model.blocks.state_dict().items()}


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
def test_a_part_right_after_a_step_with_offload_has_its_values(ranks):
    for stage in (0, 2):
        plain, offloaded = ranks(2).run(part_of, stage, None)[0], ranks(2).run(part_of, stage, "cpu")
        for part in offloaded:
            assert all(torch.equal(part[name], value) for name, value in plain.items())


class Odd(nn.Module):
    def __init__(self, *parameters: nn.Parameter):
        super().__init__()
        self.values = nn.ParameterList(parameters)


MEMORY = torch.ones(8)
ODD = {
    "values.0 is complex": (torch.ones(2, dtype=torch.complex64),),
    "values.0 and values.1 .* same memory": (MEMORY, MEMORY),
    "values.1 and values.0 .* same memory": (MEMORY[2:], MEMORY[:4]),
}


@pytest.mark.parametrize("text", ODD)
def test_what_cannot_be_sharded_is_refused_at_shard(ranks, text):
    model = Odd(*map(nn.Parameter, ODD[text]))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        zerolite.shard(model, stage=1)
    assert re.search(text, str(caught.value))
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}


DTYPES = [torch.int16, torch.uint16, torch.uint32, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def bytes_of(stage: int, offload=None, precision=None) -> list[list[int]]:
    rank = torch.distributed.get_rank()
    raw = [torch.arange(24, dtype=torch.uint8) + 40 * rank for _ in DTYPES]
    values = [
        ((r % 2).view(dtype) if dtype is torch.bool else r.view(dtype)) for r, dtype in zip(raw, DTYPES, strict=True)
    ]
    frozen = [nn.Parameter(value.clone(), requires_grad=False) for value in values]
    model = Odd(nn.Parameter(torch.ones(4)), *frozen)
    model.register_buffer("table", torch.arange(6, dtype=torch.int16).view(2, 3).t() + rank)
    zerolite.shard(model, stage=stage, offload=offload, precision=precision)
    with zerolite.full_params(model):
        found = [parameter.detach().view(torch.uint8).tolist() for parameter in list(model.parameters())[1:]]
    return [*found, model.table.flatten().tolist()]


def test_frozen_parameters_of_any_dtype_keep_rank_0s_bytes(ranks):
    """float8 ones also under a `Precision`: their values mean something with a scale."""
    for stage, offload, precision in ((0, None, None), (3, None, zerolite.Precision())):
        for found in ranks(2).run(bytes_of, stage, offload, precision):
            for values, dtype in zip(found, DTYPES, strict=False):
                assert values == [n % 2 if dtype is torch.bool else n for n in range(24)], dtype
            assert found[-1] == [0, 3, 1, 4, 2, 5]
