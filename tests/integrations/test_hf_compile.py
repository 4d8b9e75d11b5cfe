"""Does a trainer that is told to compile train as one that is not, and are its hooks outside of the graphs?"""

from __future__ import annotations

from pathlib import Path

import torch
from models import assert_close
from trainer_runs import train


def compiled(folder: str) -> tuple:
    expected = train("trainer", Path(folder) / "plain", dict(stage=3), max_steps=1, eval_strategy="no")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given = dict(torch_compile_backend="eager", max_steps=1, eval_strategy="no")
    run = train("trainer", Path(folder) / "compiled", dict(stage=3), **given)
    counters = torch._dynamo.utils.counters
    return expected, run, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def test_torch_compile_is_of_units_with_the_hooks_outside(ranks, tmp_path):
    for expected, run, num_graphs, breaks in ranks(2).run(compiled, str(tmp_path)):
        assert run.logs == expected.logs
        assert_close(run.parameters, expected.parameters, 1e-12)
        assert num_graphs > 0 and not breaks
