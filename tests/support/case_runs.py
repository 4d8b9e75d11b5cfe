"""A case of cases.py carried out: by zerolite on a rank, and by plain torch on one process."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import torch.distributed as dist
from cases import CASES, Case
from entry_cases import ENTRY_CASES
from models import divide_gradients, drawn, whole
from peer_cases import PEER_CASES, PeerCase
from unsaved_cases import UNSAVED_CASES

import zerolite

ALL = CASES | ENTRY_CASES | UNSAVED_CASES | PEER_CASES
LR, WEIGHT_DECAY = 1e-2, 0.1


def zero_grad(case: Case, model, optimizer) -> None:
    match type(case).__name__:
        case "NoZeroGrad":
            pass
        case "ZeroGradToZeros":
            optimizer.zero_grad(set_to_none=False)
        case "ZeroGradOfTheModel":
            model.zero_grad()
        case _:
            optimizer.zero_grad()


def train_case(name: str, stage: int, offload: zerolite.Offload | None = None):
    """On a rank: parameters and norms."""
    case = ALL[name]()
    model = drawn(case.build).double()
    case.prepare(model)
    precision = zerolite.Precision(torch.float64, torch.float64)
    model = zerolite.shard(model, stage=stage, precision=precision, offload=offload)
    if isinstance(case, PeerCase):
        with zerolite.full_params(model, writeback=True) if stage == 3 else nullcontext():
            case.after(model)
    optimizer = zerolite.AdamW(case.groups(model), lr=LR, weight_decay=WEIGHT_DECAY)
    norms = []
    for step in range(case.steps):
        case.step(model, dist.get_rank(), step, lambda: zerolite.no_sync(model))
        optimizer.step()
        norms.append(optimizer.grad_norm)
        zero_grad(case, model, optimizer)
    with zerolite.full_params(model):
        return whole(model), norms


@cache
def plain_case(name: str, world: int):
    """The same on one process with plain torch, with the mean of the gradients of so many ranks."""
    case = ALL[name]()
    model = drawn(case.build).double()
    case.prepare(model)
    if isinstance(case, PeerCase):
        case.after(model)
    optimizer = torch.optim.AdamW(case.groups(model), lr=LR, weight_decay=WEIGHT_DECAY)
    norms, kept = [], {}
    for step in range(case.steps):
        for rank in range(world):
            case.step(model, rank, step, nullcontext)
        divide_gradients(model, world)
        for parameter, gradient in kept.items():
            parameter.grad += gradient
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.nn.utils.clip_grad_norm_(given, float("inf")).item())
        optimizer.step()
        if name == "NoZeroGrad":
            kept = {parameter: parameter.grad for parameter in given}
            optimizer.zero_grad()
        else:
            zero_grad(case, model, optimizer)
    return whole(model), norms
