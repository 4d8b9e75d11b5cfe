"""Does what the suites of FSDP2 and DeepSpeed ask of a sharded model train as in plain torch?"""

from __future__ import annotations

import pytest
from case_runs import plain_case, train_case
from models import assert_close
from peer_cases import PEER_CASES

import zerolite

STREAMED = zerolite.Offload(parameters=True)


def run_cases(stages: dict[str, tuple[int, ...]], offload: zerolite.Offload | None) -> dict:
    results: dict = {}
    for name, chosen in stages.items():
        for stage in chosen:
            try:
                results[name, stage] = train_case(name, stage, offload)
            except Exception as error:
                raise AssertionError(f"{name} at stage {stage}: {type(error).__name__}: {error}") from error
    return results


@pytest.mark.parametrize("world, offload", [(2, None), (1, STREAMED)], ids=["ranks", "streamed"])
def test_they_train_as_in_plain_torch(ranks, world, offload):
    stages = {name: case.stages if offload is None else (3,) for name, case in PEER_CASES.items()}
    stages = {name: chosen for name, chosen in stages.items() if offload is None or 3 in PEER_CASES[name].stages}
    for results in ranks(world).run(run_cases, stages, offload):
        assert results
        for (name, stage), (actual, actual_norms) in results.items():
            parameters, norms = plain_case(name, world)
            assert actual_norms == pytest.approx(norms, rel=1e-9), (name, stage)
            try:
                assert_close(actual, parameters)
            except AssertionError as error:
                raise AssertionError(f"{name} at stage {stage}: {error}") from None
