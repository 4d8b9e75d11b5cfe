"""Does training beside tensor and pipeline parallelism have the norms and parameters of plain torch on one process?"""

from __future__ import annotations

import pytest
from parallel_runs import SCHEDULES, Case, difference, run_cases

TENSOR, PIPELINE, ALL = (1, 2, 2), (2, 2, 1), (2, 2, 2)

FEW = {
    "tensor": [
        Case("llama", TENSOR, 0),
        Case("llama", TENSOR, 1, sequence=True),
        Case("mlp", TENSOR, 2, rule="Lamb"),
        Case("llama", TENSOR, 3, sequence=True, offload="cpu"),
    ],
    "pipeline": [
        Case("mlp", PIPELINE, 0, "1f1b"),
        Case("llama", PIPELINE, 3, "1f1b", no_sync=True),
        Case("mlp", PIPELINE, 2, "gpipe", offload="cpu"),
        Case("llama", PIPELINE, 1, "interleaved"),
    ],
    "all": [
        Case("llama", ALL, 3, "1f1b", sequence=True),
    ],
}


def check(ranks, cases: list[Case]) -> None:
    world = max(pp * dp * tp for pp, dp, tp in (case.mesh for case in cases))
    of_ranks = ranks(world, timeout=240.0).run(run_cases, cases)
    found = {case: difference(case, [results[i] for results in of_ranks]) for i, case in enumerate(cases)}
    wrong = {case: pair for case, pair in found.items() if not max(pair) < 1e-12}
    assert not wrong


@pytest.mark.parametrize("kind", FEW)
def test_a_mesh_trains_as_one_plain_process(ranks, kind):
    """Clipped AdamW in fp64: every rank's norm and every parameter to 1e-12."""
    check(ranks, FEW[kind])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [TENSOR, PIPELINE, ALL], ids=["tensor", "pipeline", "all"])
@pytest.mark.parametrize("model", ["llama", "mlp"])
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_and_schedule(ranks, stage, model, mesh):
    """The whole grid: stages, schedules, sequence parallelism, one reduction a micro-batch or one a step."""
    check(
        ranks,
        [
            Case(model, mesh, stage, schedule, sequence, no_sync)
            for schedule in (SCHEDULES if mesh[0] > 1 else [""])
            for sequence in ([False, True] if mesh[2] > 1 and model == "llama" else [False])
            for no_sync in (False, True)
        ],
    )
