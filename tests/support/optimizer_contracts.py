"""What torch.optim promises of any optimizer, one function a promise: run on torch's optimizers and on ours.

Each does something to a `Bench` and returns what it saw, as numbers, text and dicts of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


@dataclass
class Bench:
    model: nn.Module
    make: Callable[..., Optimizer]  # of parameters or groups, and options
    whole: Callable[[], AbstractContextManager] = nullcontext  # parameters are readable inside
    step_number: int = 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        first, last = self.model[0], self.model[4]
        return [
            {"params": list(first.parameters())},
            {"params": list(self.model[2].parameters()), "lr": 0.01},
            {"params": list(last.parameters()), "weight_decay": 0.0, "betas": (0.8, 0.95)},
        ]

    def backward(self, model: nn.Module | None = None) -> Tensor:
        self.step_number += 1
        generator = torch.Generator().manual_seed(self.step_number)
        rows = torch.randn(6, 4, generator=generator).to(next(self.model.parameters()).dtype)
        loss = (self.model if model is None else model)(rows).square().mean()
        loss.backward()
        return loss

    def learn(self, optimizer: Optimizer, steps: int = 2) -> None:
        for _ in range(steps):
            self.backward()
            optimizer.step()
            optimizer.zero_grad()

    def parameters(self) -> list[Tensor]:
        with self.whole():
            return [parameter.detach().clone() for parameter in self.model.parameters()]


def shown(group: dict[str, Any]) -> dict[str, Any]:
    names = ("lr", "betas", "weight_decay", "initial_lr", "param_names")
    return {name: group[name] for name in names if name in group} | {"params": len(group["params"])}


def steps_of(optimizer: Optimizer) -> list[float]:
    """Of parameters that have been stepped."""
    counts = [float(state.get("step", 0)) for state in optimizer.state.values()]
    return [count for count in counts if count > 0]


# Param groups #


def groups_in_every_form(b: Bench):
    forms = [
        b.make(b.model.parameters(), **OPTIONS),
        b.make((p for p in b.model.parameters()), **OPTIONS),
        b.make([{"params": b.model[0].weight}, {"params": (p for p in b.model[4].parameters())}], **OPTIONS),
        b.make([{"params": []}, *b.groups], **OPTIONS),
        b.make(b.model.named_parameters(), **OPTIONS),
        b.make(iter(b.groups)),
    ]
    return [[shown(group) for group in optimizer.param_groups] for optimizer in forms]


def groups_added_late(b: Bench):
    optimizer = b.make(b.groups[:1], **OPTIONS)
    b.learn(optimizer)
    optimizer.add_param_group({**b.groups[1], "note": "kept"})
    b.learn(optimizer)
    optimizer.add_param_group(b.groups[2])
    b.learn(optimizer)
    return [shown(group) for group in optimizer.param_groups], optimizer.param_groups[1]["note"], steps_of(optimizer)


def refused_groups_leave_the_others(b: Bench):
    optimizer = b.make(b.groups[:2], **OPTIONS)
    said = []
    for group in (b.groups[0], {"params": {b.model[4].weight}}, {"params": [1]}, [b.model[4].weight]):
        try:
            optimizer.add_param_group(group)
        except (TypeError, ValueError) as error:
            said.append(type(error).__name__)
    b.learn(optimizer)
    return said, len(optimizer.param_groups)


def numbers_changed_on_the_way(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    for step in range(3):
        b.learn(optimizer, 1)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
            group["weight_decay"] += 0.05
            group["betas"] = (0.5 + 0.1 * step, 0.9)
    return [shown(group) for group in optimizer.param_groups]


def tensor_learning_rates(b: Bench):
    """Changed in place, 0-dim and of one element."""
    lr = torch.tensor(0.03, dtype=torch.float64)
    optimizer = b.make(b.groups, lr=lr)
    optimizer.param_groups[1]["lr"] = torch.tensor([0.01], dtype=torch.float64)
    for _ in range(3):
        b.learn(optimizer, 1)
        lr.mul_(0.5)
    return [float(group["lr"]) for group in optimizer.param_groups]


def printed(b: Bench):
    text = repr(b.make(b.groups, **OPTIONS))
    return [line for line in text.splitlines() if line.split(":")[0].strip() in ("lr", "weight_decay") or "Par" in line]


# Steps #


def closures(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(torch.is_grad_enabled())
        return b.backward()

    with torch.no_grad():
        losses = [optimizer.step(closure), optimizer.step(closure=closure)]
    return [loss.item() for loss in losses], seen, optimizer.step()


def no_gradients_no_step(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    optimizer.step()
    b.backward(b.model[:3])
    optimizer.step()
    return steps_of(optimizer)


def zeros_are_gradients(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    optimizer.zero_grad(set_to_none=False)
    b.backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    return steps_of(optimizer), [p.grad.norm().item() for p in b.model.parameters()]


def zero_grad_of_its_own(b: Bench):
    optimizer, other = b.make(b.groups[:1], **OPTIONS), b.make(b.groups[1:], **OPTIONS)
    b.backward()
    optimizer.zero_grad()
    seen = [p.grad is None for p in b.model.parameters()]
    b.backward()
    for each in (optimizer, other):
        each.step()
    return seen


def hooks_of_steps(b: Bench):
    optimizer, log = b.make(b.groups, **OPTIONS), []

    def pre(tag):
        return lambda o, args, kwargs: log.append((tag, o is optimizer, len(args), sorted(kwargs)))

    handles = [
        register_optimizer_step_pre_hook(lambda o, *rest: log.append("global pre")),
        register_optimizer_step_post_hook(lambda o, *rest: log.append("global post")),
    ]
    handles.append(optimizer.register_step_pre_hook(pre("pre")))
    handles.append(optimizer.register_step_post_hook(pre("post")))
    handles.append(optimizer.register_step_pre_hook(lambda o, args, kwargs: ((*args, b.backward), kwargs)))
    results = [optimizer.step().item()]
    for handle in handles:
        handle.remove()
    b.backward()
    return results, optimizer.step(), log


def refused_hook(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    optimizer.register_step_pre_hook(lambda *args: 5)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)[-50:]


# State dicts #


def saved(optimizer: Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_dicts_go_on(b: Bench):
    """The optimizer that loads goes on as the one that saved, schedules included."""
    first = b.make(b.groups, **OPTIONS)
    b.learn(first)
    first.param_groups[0]["lr"] = 0.07
    first.param_groups[0]["initial_lr"] = 0.09
    loaded = saved(first)
    second = b.make(b.groups, lr=1.0)
    second.load_state_dict(loaded)
    loaded["param_groups"][0]["lr"] = 100.0
    b.learn(second)
    numbering = [group["params"] for group in loaded["param_groups"]]
    return numbering, sorted(loaded["state"]), [shown(group) for group in second.param_groups], steps_of(second)


def loaded_groups_are_copies(b: Bench):
    lr = torch.tensor(0.02, dtype=torch.float64)
    first, second = b.make(b.groups, lr=lr), b.make(b.groups, lr=1.0)
    second.load_state_dict(first.state_dict())
    lr.fill_(100.0)
    b.learn(second)
    return [float(group["lr"]) for optimizer in (first, second) for group in optimizer.param_groups]


def state_dicts_with_names(b: Bench):
    named, plain = b.make(b.model.named_parameters(), **OPTIONS), b.make(b.model.parameters(), **OPTIONS)
    b.learn(named)
    plain.load_state_dict(saved(named))
    b.learn(plain)
    named.load_state_dict(saved(plain))
    b.learn(named)
    return [shown(group) for optimizer in (plain, named) for group in optimizer.param_groups]


def refused_state_dicts(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    b.learn(optimizer)
    good, said = saved(optimizer), []
    shorter = [{**good["param_groups"][0], "params": [0]}, *good["param_groups"][1:]]
    for wrong in ({**good, "param_groups": good["param_groups"][:2]}, {**good, "param_groups": shorter}):
        try:
            optimizer.load_state_dict(wrong)
        except ValueError as error:
            said.append(type(error).__name__)
    b.learn(optimizer)
    return said


def steps_saved_as_numbers(b: Bench):
    optimizer = b.make(b.groups, **OPTIONS)
    b.learn(optimizer)
    old = saved(optimizer)
    for state in old["state"].values():
        state["step"] = float(state["step"])
    optimizer.load_state_dict(old)
    b.learn(optimizer)
    return steps_of(optimizer)


def hooks_of_state_dicts(b: Bench):
    optimizer, log = b.make(b.groups, **OPTIONS), []
    b.learn(optimizer)
    optimizer.register_state_dict_pre_hook(lambda o: log.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda o: log.append("first pre"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, d: log.append("post"))
    handle = optimizer.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1}, prepend=True)
    with_extra = sorted(optimizer.state_dict())
    handle.remove()

    def other_lr(o, state_dict):
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(other_lr)
    optimizer.register_load_state_dict_post_hook(lambda o: log.append("loaded"))
    optimizer.register_load_state_dict_post_hook(lambda o: log.append("loaded first"), prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    b.learn(optimizer)
    return with_extra, sorted(optimizer.state_dict()), log, [group["lr"] for group in optimizer.param_groups]


CONTRACTS: dict[str, Callable[[Bench], Any]] = {
    contract.__name__: contract
    for contract in (
        groups_in_every_form, groups_added_late, refused_groups_leave_the_others, numbers_changed_on_the_way,
        tensor_learning_rates, printed, closures, no_gradients_no_step, zeros_are_gradients, zero_grad_of_its_own,
        hooks_of_steps, refused_hook, state_dicts_go_on, loaded_groups_are_copies,
        state_dicts_with_names, refused_state_dicts,
        steps_saved_as_numbers, hooks_of_state_dicts,
    )
}  # fmt: skip


# Schedulers #

_S = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": partial(_S.LambdaLR, lr_lambda=[lambda n: 0.9**n, lambda n: 1 / (1 + n), lambda n: 1.0]),
    "MultiplicativeLR": partial(_S.MultiplicativeLR, lr_lambda=lambda n: 0.8),
    "StepLR": partial(_S.StepLR, step_size=2),
    "MultiStepLR": partial(_S.MultiStepLR, milestones=[1, 3]),
    "ConstantLR": partial(_S.ConstantLR, total_iters=2),
    "LinearLR": partial(_S.LinearLR, total_iters=3),
    "ExponentialLR": partial(_S.ExponentialLR, gamma=0.7),
    "PolynomialLR": partial(_S.PolynomialLR, total_iters=4, power=2.0),
    "CosineAnnealingLR": partial(_S.CosineAnnealingLR, T_max=3),
    "CosineAnnealingWarmRestarts": partial(_S.CosineAnnealingWarmRestarts, T_0=2),
    "CyclicLR": partial(_S.CyclicLR, base_lr=0.001, max_lr=0.05, step_size_up=2),  # betas cycle, too
    "OneCycleLR": partial(_S.OneCycleLR, max_lr=0.05, total_steps=7),
    "ReduceLROnPlateau": partial(_S.ReduceLROnPlateau, patience=0, factor=0.3),
    "SequentialLR": lambda o: _S.SequentialLR(o, [_S.ConstantLR(o), _S.ExponentialLR(o, 0.5)], milestones=[2]),
    "ChainedScheduler": lambda o: _S.ChainedScheduler([_S.ConstantLR(o), _S.ExponentialLR(o, 0.5)], optimizer=o),
    "SWALR": partial(SWALR, swa_lr=0.001, anneal_epochs=3),
}


def scheduled(name: str, b: Bench) -> list:
    """Rates, betas and warnings of five steps; in the middle both are saved and loaded."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = b.make(b.groups, **OPTIONS)
        scheduler = SCHEDULERS[name](getattr(optimizer, "steered_by", optimizer))
        seen = []
        for step in range(5):
            b.learn(optimizer, 1)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([(float(group["lr"]), tuple(group["betas"])) for group in optimizer.param_groups])
            if step == 2:
                optimizer.load_state_dict(saved(optimizer))
                scheduler.load_state_dict(scheduler.state_dict())
    return [seen, [str(warning.message)[:60] for warning in said]]


CONTRACTS |= {f"scheduled by {name}": partial(scheduled, name) for name in SCHEDULERS}
