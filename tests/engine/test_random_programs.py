"""Any order of backwards, no_sync, steps, zeroing, evaluation and dropped forwards ends where plain torch ends."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import data, squared
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import Stack, assert_close, drawn, whole

WORLD = 2
Script = list[tuple]


class Skipping(Stack):
    def forward(self, x, skip):
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            if index != skip:
                x = block(x)
        return self.last(x)


def on_rank(script: Script, stage: int, clip: float | None):
    import zerolite

    model = zerolite.shard(drawn(Skipping).double(), stage=stage)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=clip)
    norms = []
    for number, (verb, *options) in enumerate(script):
        x, y = data(dist.get_rank(), number)
        match verb:
            case "backward":
                quiet, skip, forwards = options
                with zerolite.no_sync(model, enabled=quiet):
                    sum(squared(model(x, (skip + turn) % 5), y) for turn in range(forwards)).backward()
            case "step":
                optimizer.step()
                norms.append(optimizer.grad_norm)
            case "zero":
                optimizer.zero_grad(set_to_none=options[0])
            case "evaluate":
                with torch.no_grad():
                    model(x, 4)
            case "forget":
                model(x, options[0])
            case "gather":
                with zerolite.full_params(model):
                    pass
    with zerolite.full_params(model):
        return whole(model), norms


def reference(script: Script, clip: float | None):
    model = drawn(Skipping).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    norms = []
    for number, (verb, *options) in enumerate(script):
        match verb:
            case "backward":
                _, skip, forwards = options
                for rank in range(WORLD):
                    x, y = data(rank, number)
                    (sum(squared(model(x, (skip + turn) % 5), y) for turn in range(forwards)) / WORLD).backward()
            case "step":
                kept = {value: value.grad.clone() for value in model.parameters() if value.grad is not None}
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
                optimizer.step()
                for value, gradient in kept.items():  # the optimizer clips what it uses, not what is kept
                    value.grad.copy_(gradient)
            case "zero":
                optimizer.zero_grad(set_to_none=options[0])
    return whole(model), norms


skips = st.integers(0, 4)  # 3 and 4 skip nothing
verbs = st.one_of(
    st.tuples(st.just("backward"), st.booleans(), skips, st.integers(1, 2)),
    st.tuples(st.just("backward"), st.booleans(), skips, st.just(1)),
    st.just(("step",)),
    st.tuples(st.just("zero"), st.booleans()),
    st.just(("evaluate",)),
    st.tuples(st.just("forget"), skips),
    st.just(("gather",)),
)


@pytest.mark.parametrize("clip", [None, 5.0])
def test_any_script_equals_plain_torch(ranks, clip):
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # a hang is slow to shrink
        suppress_health_check=list(HealthCheck),
    )
    @given(script=st.lists(verbs, min_size=6, max_size=14), stage=st.integers(0, 3))
    def check(script, stage):
        script = [*script, ("step",)]
        expected, expected_norms = reference(script, clip)
        for parameters, norms in ranks(WORLD).run(on_rank, script, stage, clip):
            assert_close(parameters, expected, rtol=1e-8)
            assert norms == pytest.approx(expected_norms, rel=1e-9)

    check()
