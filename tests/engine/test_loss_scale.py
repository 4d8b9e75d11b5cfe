"""fp16 gradients that overflow for ever: an error with scale, steps and units, and training goes on after it."""

from __future__ import annotations

import pytest
import torch

import zerolite
from zerolite import ZeroliteError


@pytest.mark.parametrize(("start", "num_halved"), [(2.0**4, 4), (3.0, 2), (0.5, 0)])
def test_an_overflow_at_the_lowest_scale_is_an_error_on_which_training_can_go_on(start, num_halved):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    zerolite.shard(model, stage=2, precision=zerolite.Precision(torch.float16, scaler=scaler))
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-3)

    def step(factor: float) -> None:
        (model(torch.ones(2, 4)).square().mean() * factor).backward()
        optimizer.step()  # which drops the gradients where it raises
        optimizer.zero_grad()

    num_skipped = 0
    with pytest.raises(ZeroliteError) as failure:
        for _ in range(100):
            step(float("inf"))
            num_skipped += optimizer.step_was_skipped
    lowest = min(start, 1.0)
    assert num_skipped == num_halved
    assert f"lowest loss scale, {lowest}, after {num_skipped + 1} skipped" in str(failure.value)
    assert optimizer.skipped_units and all(unit in str(failure.value) for unit in optimizer.skipped_units)
    step(1.0)
    assert not optimizer.step_was_skipped and optimizer.skipped_units == [] and optimizer.grad_norm > 0
