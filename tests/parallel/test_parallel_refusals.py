"""Is what cannot work beside tensor and pipeline parallelism refused by name, on every rank?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import llama
from parallel_runs import WIDTH, Case, Llama, parallelize, parts_of
from saved import attempt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import zerolite

PIPELINE, TENSOR = Case("mlp", (2, 2, 1), 1), Case("mlp", (1, 2, 2), 1)


class Meshes:
    """Of four ranks, both shapes."""

    def __init__(self) -> None:
        self.pipeline = init_device_mesh("cpu", PIPELINE.mesh, mesh_dim_names=("pp", "dp", "tp"))
        self.tensor = init_device_mesh("cpu", TENSOR.mesh, mesh_dim_names=("pp", "dp", "tp"))

    def stage(self) -> nn.Module:
        (part,) = parts_of(PIPELINE, self.pipeline)
        return part

    def split(self) -> nn.Module:
        (part,) = parts_of(TENSOR, self.tensor)
        return part

    def shard_stage(self, model: nn.Module, stage: int = 1) -> nn.Module:
        return zerolite.shard(model, stage, mesh=self.pipeline["dp"], norm_over=(self.pipeline["pp"],))

    def shard_split(self, model: nn.Module, stage: int = 1) -> nn.Module:
        return zerolite.shard(model, stage, mesh=self.tensor["dp"])


def forgotten_stages(meshes: Meshes, folder: Path):
    zerolite.shard(meshes.stage(), 1, mesh=meshes.pipeline["dp"])


def forgotten_tensor_dimension(meshes: Meshes, folder: Path):
    zerolite.shard(meshes.stage(), 1, mesh=meshes.tensor["dp"])


def no_mesh_for_dtensors(meshes: Meshes, folder: Path):
    zerolite.shard(meshes.split(), 1)


def data_dimension_twice(meshes: Meshes, folder: Path):
    zerolite.shard(meshes.stage(), 1, mesh=meshes.pipeline["dp"], norm_over=(meshes.pipeline["dp"],))


def one_mesh_for_a_tuple(meshes: Meshes, folder: Path):
    zerolite.shard(meshes.stage(), 1, mesh=meshes.pipeline["dp"], norm_over=meshes.pipeline["pp"])


def other_ranks(meshes: Meshes, folder: Path):
    mine = torch.distributed.get_rank() < 2
    mesh = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])
    zerolite.shard(meshes.stage(), 1, mesh=mesh[1 if mine else 0])


def partial(meshes: Meshes, folder: Path):
    model = meshes.split()
    part = DTensor.from_local(torch.ones(WIDTH), meshes.tensor["tp"], [Partial()])
    model.layers["0"].down.bias = nn.Parameter(part)
    meshes.shard_split(model)


def fsdp2(meshes: Meshes, folder: Path):
    model = meshes.stage()
    fully_shard(model, mesh=meshes.pipeline["dp"])
    meshes.shard_stage(model)


def meta(meshes: Meshes, folder: Path):
    with torch.device("meta"):
        model = Llama()
    parallelize(model, meshes.tensor["tp"], False)
    meshes.shard_split(model)


def split_buffer(meshes: Meshes, folder: Path):
    model = meshes.split()
    layer = model.layers["0"]
    layer.shift = distribute_tensor(layer.shift, meshes.tensor["tp"], [Shard(0)])
    meshes.shard_split(model)


def adapters_of_a_split_model(meshes: Meshes, folder: Path):
    model = llama(hidden=16)
    zerolite.adapters.add_lora(model)
    parallelize_module(model, meshes.tensor["tp"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    meshes.shard_split(model)


def adapters_of_a_stage(meshes: Meshes, folder: Path):
    model = llama()
    zerolite.adapters.add_lora(model)
    meshes.shard_stage(model)


def tied_over_stages(meshes: Meshes, folder: Path):
    model = copy.deepcopy(llama(tied=True))
    if meshes.pipeline["pp"].get_local_rank() == 0:
        model.lm_head = nn.Identity()
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.model.embed_tokens = nn.Identity()
    meshes.shard_stage(model)


def two_stages_of_one_name(meshes: Meshes, folder: Path):
    model = meshes.shard_stage(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    zerolite.save(model, folder / "names")


def unlike_optimizers(meshes: Meshes, folder: Path):
    model = meshes.shard_stage(meshes.stage())
    lr = 1e-2 * (1 + meshes.pipeline["pp"].get_local_rank())
    zerolite.save(model, folder / "optimizers", zerolite.AdamW(model.parameters(), lr=lr))


def export_of_a_stage(meshes: Meshes, folder: Path):
    zerolite.export(meshes.shard_stage(meshes.stage()), folder / "export")


def a_copy(meshes: Meshes, folder: Path):
    copy.deepcopy(meshes.shard_split(meshes.split()))


def a_part_moved(meshes: Meshes, folder: Path):
    model = meshes.shard_split(meshes.split())
    model.layers["0"].up.to(torch.float16)
    model(torch.ones(2, WIDTH, dtype=torch.float64))


def doubled_by_apply(meshes: Meshes, folder: Path):
    meshes.shard_split(meshes.split())._apply(lambda tensor: tensor * 2)


def a_dtensor_in_its_place(meshes: Meshes, folder: Path):
    model = meshes.shard_split(meshes.split())
    weight = model.layers["0"].up.weight
    model.layers["0"].up.weight = nn.Parameter(weight.detach().clone())
    model(torch.ones(2, WIDTH, dtype=torch.float64))


def pretrained(meshes: Meshes, folder: Path):
    source = folder / "pretrained"
    llama(hidden=16).save_pretrained(source)  # which writes on rank 0 alone
    torch.distributed.barrier()
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    zerolite.load_pretrained(
        source, 1, mesh=meshes.tensor["dp"], adapt=lambda m: parallelize_module(m, meshes.tensor["tp"], plan)
    )


REFUSED: dict[Callable, tuple[str, list[str]]] = {
    forgotten_stages: ("ValueError", ["have 2 ranks", "has 4", "norm_over="]),
    forgotten_tensor_dimension: ("ValueError", ["have 2 ranks", "has 4", "ranks of other data in mesh="]),
    no_mesh_for_dtensors: ("ValueError", ["mesh= and the DTensor parameters have the ranks", 'mesh=mesh["dp"]']),
    data_dimension_twice: ("ValueError", ["mesh= and norm_over= have the ranks"]),
    one_mesh_for_a_tuple: ("TypeError", ["norm_over= takes a tuple"]),
    other_ranks: ("ValueError", ["is not one of mesh="]),
    partial: ("ValueError", ["layers.0.down.bias is a DTensor placed as Partial"]),
    fsdp2: ("ValueError", ["have the ranks"]),
    meta: ("ValueError", ["embed.weight is a DTensor on the meta device"]),
    split_buffer: ("ValueError", ["the buffer layers.0.shift is split"]),
    adapters_of_a_split_model: ("ValueError", ["adapters", "beside tensor parallelism"]),
    adapters_of_a_stage: ("ValueError", ["adapters", "beside pipeline parallelism"]),
    tied_over_stages: ("ValueError", ["is tied to", "another pipeline stage"]),
    two_stages_of_one_name: ("CheckpointError", ["two parameters of the pipeline are called 0.weight"]),
    unlike_optimizers: ("CheckpointError", ["optimizers of pipeline stages differ", "0.02"]),
    export_of_a_stage: ("ValueError", ["a stage of a pipeline"]),
    a_copy: ("ZeroliteError", ["a model with DTensor parameters is not copied"]),
    a_part_moved: ("ValueError", ["layers.0.up.weight", "was exchanged", "before zerolite.shard"]),
    doubled_by_apply: ("ValueError", ["values of DTensor parameters"]),
    a_dtensor_in_its_place: ("ValueError", ["layers.0.up.weight was replaced", "a DTensor"]),
    pretrained: ("ValueError", ["load_pretrained does not read into DTensor parameters"]),
}


def refuse_all(folder: Path) -> list[tuple[str, str]]:
    meshes = Meshes()
    return [attempt(lambda refused=refused: refused(meshes, folder)) for refused in REFUSED]


@pytest.fixture(scope="module")
def refusals(ranks, tmp_path_factory) -> list[list[tuple[str, str]]]:
    return ranks(4).run(refuse_all, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.__name__)
def test_what_cannot_work_is_refused_by_name(refusals, refused):
    kind, parts = REFUSED[refused]
    for answers in refusals:
        found, text = answers[list(REFUSED).index(refused)]
        assert found == kind and not [part for part in parts if part not in text], text
