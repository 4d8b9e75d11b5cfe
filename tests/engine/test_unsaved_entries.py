"""Does backward find a unit gathered where autograd has saved none of its parameters, on late ranks too?"""

from __future__ import annotations

import pytest
from case_runs import plain_case, train_case
from delays import late_device
from models import assert_close
from unsaved_cases import UNSAVED_CASES

import zerolite


def run_cases(offload: zerolite.Offload | None):
    with late_device(seed=5, seconds=0.002):
        return {name: train_case(name, 3, offload) for name in UNSAVED_CASES}


@pytest.mark.parametrize("world, offload", [(2, None), (1, zerolite.Offload(parameters=True))], ids=["ranks", "alone"])
def test_what_autograd_has_not_saved_is_read_from_gathered_units(ranks, world, offload):
    """Functions that keep parameters themselves, recomputation, transforms, hooks; and losses that read none."""
    for results in ranks(world).run(run_cases, offload):
        for name, (actual, actual_norms) in results.items():
            parameters, norms = plain_case(name, world)
            assert actual_norms == pytest.approx(norms, rel=1e-9), name
            assert_close(actual, parameters)
