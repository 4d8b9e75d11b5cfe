"""What does `p.grad` of a sharded parameter refuse, and does it cost memory or keep anything alive?"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from hand_loops import OPTIONS, build
from models import whole
from saved import attempt
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import zerolite

REFUSED = {
    "add": lambda p: p.grad + 1,
    "`add_`": lambda p: p.grad.add_(p.detach()),
    "clone": lambda p: p.grad.clone(),
    "numpy": lambda p: p.grad.numpy(),
    "data_ptr": lambda p: p.grad.data_ptr(),
    "isnan|ne": lambda p: p.grad.isnan().any(),
    "norm\\(ord=1": lambda p: p.grad.norm(1),
    "norm\\(ord=inf": lambda p: clip_grad_norm_([p], 1.0, norm_type=float("inf")),
    "norm\\(ord=2, dim=": lambda p: p.grad.norm(dim=0),
    "mul_ by a tensor": lambda p: p.grad.mul_(torch.ones(5)),
    "clamp_": lambda p: clip_grad_value_([p], 1.0),
    "stack": lambda p: torch.stack([p.grad, p.grad]),
    "add_": lambda p: torch.zeros_like(p, requires_grad=False).add_(p.grad),
    "`item`": lambda p: p.grad.item(),
    "`__float__`": lambda p: float(p.grad),
    "`__bool__`": lambda p: 1 if p.grad else 0,
    "`__index__`": lambda p: range(p.grad),
    "format '.3f'": lambda p: f"{p.grad:.3f}",
    "tolist": lambda p: p.grad.tolist(),
    "data = ": lambda p: setattr(p.grad, "data", torch.zeros_like(p)),
    "is_pinned|__dlpack__": lambda p: torch.from_dlpack(p.grad),
    "pickle|__reduce_ex__": lambda p: pickle.dumps(p.grad),
    "deepcopy": lambda p: copy.deepcopy(p.grad),
}


def answers(stage: int):
    model = zerolite.shard(build(), stage=stage)
    parameter = model.first.weight
    assert parameter.grad is None
    model(torch.ones(2, 5).double()).sum().backward()
    first = parameter.grad
    assert first.shape == parameter.shape and first.dtype == torch.float64 and first.device == parameter.device
    assert first.untyped_storage().nbytes() == 0 and first.grad_fn is None and not first.requires_grad
    assert "first.weight" in repr(first) and "(7, 5)" in repr(first)
    said = {name: attempt(lambda call=call: call(parameter)) for name, call in REFUSED.items()}
    model(torch.ones(2, 5).double()).sum().backward()
    assert parameter.grad is first, "one handle a parameter"
    parameter.grad = None
    assert parameter.grad is None
    parameter.grad = torch.zeros(7, 5).double()
    said["set to a tensor"] = attempt(zerolite.AdamW(model.parameters(), lr=0.1).step)
    return said


@pytest.mark.parametrize("stage", [0, 3])
def test_everything_else_is_refused_with_the_parameters_name(ranks, stage):
    (said,) = ranks(1).run(answers, stage)
    for name, (kind, text) in said.items():
        assert kind == "ZeroliteError" and "first.weight" in text and re.search(name, text), (name, kind, text)


def model_is_freed(stage: int) -> bool:
    model = zerolite.shard(build(), stage=stage)
    model(torch.ones(2, 5).double()).sum().backward()
    engine, kept = weakref.ref(model._zerolite), model.first.weight.grad
    del model
    gc.collect()
    return engine() is None and attempt(kept.norm)[0] == "ZeroliteError"


def test_a_handle_keeps_no_model_alive(ranks):
    assert ranks(1).run(model_is_freed, 2) == [True]


def loss_on_parameters(stage: int) -> list[torch.Tensor]:
    """A backward that reaches parameters with handles before it reaches the engine."""
    results = []
    for is_ours in (False, True):
        model = build()
        if is_ours:
            zerolite.shard(model, stage=stage)
        make: type = zerolite.AdamW if is_ours else torch.optim.AdamW
        optimizer = make(model.parameters(), **OPTIONS)
        for _ in range(2):
            model(torch.ones(2, 5).double()).square().sum().backward()
            for _ in range(2):
                sum(p.square().sum() for p in model.parameters()).backward()
            optimizer.step()
        results.append(torch.cat([value.flatten() for value in whole(model).values()]))
    return results


def test_a_penalty_on_parameters_adds_to_the_gradient(ranks):
    ((expected, found),) = ranks(1).run(loss_on_parameters, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def scaled_otherwise() -> tuple[str, str]:
    model = zerolite.shard(build(), stage=2)
    model(torch.ones(2, 5).double()).sum().backward()
    if dist.get_rank() == 1:
        model.first.weight.grad.mul_(0.5)
    return attempt(zerolite.AdamW(model.parameters(), lr=0.1).step)


def test_ranks_that_scale_by_other_factors_all_say_so(ranks):
    for kind, text in ranks(2).run(scaled_otherwise):
        assert kind == "ZeroliteError" and "scaled gradients by other factors" in text


def norm_after_grad_scaler() -> tuple[float, float]:
    """`optimizer.grad_norm` of a plain step, and of one whose gradients GradScaler has unscaled."""
    norms = []
    for is_scaled in (False, True):
        model = zerolite.shard(build(), stage=2)
        optimizer = zerolite.AdamW(model.parameters(), **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=is_scaled)
        scaler.scale(model(torch.ones(2, 5).double()).square().sum()).backward()
        scaler.step(optimizer)
        norms.append(optimizer.grad_norm)
    return norms[0], norms[1]


def test_grad_norm_is_of_unscaled_gradients(ranks):
    for plain, unscaled in ranks(2).run(norm_after_grad_scaler):
        assert unscaled == pytest.approx(plain, rel=1e-12)


def clipped_by_hand_and_by_the_optimizer(by_torch: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A second clip sees the clipped norm: with the same bound it changes nothing."""
    results = []
    for is_clipped in (False, True):
        model = zerolite.shard(build(), stage=2)
        optimizer = zerolite.AdamW(model.parameters(), **OPTIONS, max_grad_norm=0.1)
        for _ in range(2):
            model(torch.ones(2, 5).double()).square().sum().backward()
            if is_clipped and by_torch:
                clip_grad_norm_(model.parameters(), 0.1)
            elif is_clipped:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append((torch.cat([value.flatten() for value in whole(model).values()]), optimizer.grad_norm))
    (once, norm), (twice, norm_of_clipped) = results
    assert norm_of_clipped == pytest.approx(norm, rel=1e-5) and norm > 1, "before every clip"
    return once, twice, norm


@pytest.mark.parametrize("by_torch", [False, True])
def test_a_clip_by_hand_and_max_grad_norm_do_not_multiply(ranks, by_torch):
    for once, twice, _ in ranks(2).run(clipped_by_hand_and_by_the_optimizer, by_torch):
        torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-7)  # clip factors carry 1e-6 in their denominator
