"""Is a unit gathered by every way in: backward not by its output, parameters not by its forward, on late ranks too?"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from case_runs import plain_case, train_case
from delays import late_device
from entry_cases import ENTRY_CASES
from models import Stack, assert_close, drawn
from ranks import RankError

import zerolite

STREAMED = zerolite.Offload(parameters=True)


def run_cases(stages: tuple[int, ...], offload: zerolite.Offload | None):
    """Every case, with gathers that arrive late: {(name, stage): parameters, norms}."""
    with late_device(seed=3, seconds=0.002):
        return {(name, stage): train_case(name, stage, offload) for stage in stages for name in ENTRY_CASES}


@pytest.mark.parametrize("world, stages, offload", [(2, (1, 3), None), (1, (3,), STREAMED)], ids=["ranks", "streamed"])
def test_every_way_into_a_unit_trains_as_plain_torch(ranks, world, stages, offload):
    for results in ranks(world).run(run_cases, stages, offload):
        for (name, stage), (actual, actual_norms) in results.items():
            parameters, norms = plain_case(name, world)
            assert actual_norms == pytest.approx(norms, rel=1e-9), (name, stage)
            assert_close(actual, parameters)


def streamed(model: torch.nn.Module) -> torch.nn.Module:
    return zerolite.shard(drawn(lambda: model).double(), stage=3, offload=STREAMED)


X = torch.ones(4, 5, dtype=torch.float64)


def modified_after_it_was_saved():
    class Model(Stack):
        def forward(self, x):
            x = torch.exp(self.first(x))
            out = self.last(x)
            x.mul_(2)
            return out

    streamed(Model())(X).sum().backward()


def transform_of_torch_func():
    model = streamed(Stack())
    torch.func.grad(lambda x: model(x).sum())(X)


def read_before_its_unit_was_left():
    class Model(Stack):
        def forward(self, x):
            weight = self.blocks[0].up.weight
            return super().forward(x) + (super().forward(x) @ weight[:3, :3]).detach() * weight.sum().exp()

    model = streamed(Model())
    model(X).sum().backward()


@pytest.mark.parametrize(
    "use, message",
    [
        (modified_after_it_was_saved, "modified by an inplace operation"),
        (transform_of_torch_func, "root.*torch.func.*stage=2"),
        (read_before_its_unit_was_left, "blocks.0.*while it is sharded"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(ranks, use, message):
    """torch's own check of versions is not lost, either."""
    with pytest.raises(RankError, match=message):
        ranks(1).run(use)


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    ids: torch.Tensor


def dtypes_inside():
    class Model(Stack):
        def forward(self, batch):
            seen.append((batch.x.dtype, batch.ids.dtype))
            return super().forward(batch.x)

    seen = []
    model = zerolite.shard(Model(), stage=0, precision=zerolite.Precision(torch.bfloat16))
    batch = Batch(torch.ones(2, 5), torch.arange(2))
    model(batch).sum().backward()
    return seen, batch.x.dtype


def test_precision_casts_inside_dataclasses_and_leaves_the_users_own_alone(ranks):
    assert ranks(1).run(dtypes_inside) == [([(torch.bfloat16, torch.int64)], torch.float32)]
