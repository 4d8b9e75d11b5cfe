"""Training loops as people write them, on torch's names alone: run unchanged on a plain model, on DDP and on ours.

Each takes a `Setting` and returns numbers that it logged. Gradients scale what AdamW does only through a large eps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from models import Stack, drawn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

OPTIONS = {"lr": 0.05, "eps": 0.1, "weight_decay": 0.1}
STEPS = 3


@dataclass
class Setting:
    model: nn.Module
    forward: nn.Module  # the model, or what wraps it
    optimizer: torch.optim.Optimizer
    rank: int
    world: int
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    whole: Callable[[], AbstractContextManager] = nullcontext  # parameters are readable inside

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        dtype = next(self.model.parameters()).dtype
        rows = torch.randn(4, 5, generator=generator).to(dtype).chunk(self.world)[self.rank]
        return self.forward(rows).square().mean()


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    return drawn(lambda: Stack(blocks=2)).to(dtype)


def clipped(s: Setting, **options) -> list[float]:
    logged = []
    for step in range(STEPS):
        s.optimizer.zero_grad()
        s.loss(step).backward()
        logged.append(clip_grad_norm_(s.model.parameters(), 0.3, **options).item())
        s.optimizer.step()
    return logged


def clipped_one_by_one(s: Setting) -> list[float]:
    return clipped(s, foreach=False)


def clipped_in_part_and_again(s: Setting) -> list[float]:
    """One block, then everything, then more; the gradients stay for the next step, which adds to them."""
    logged = []
    for step in range(STEPS):
        s.loss(step).backward()
        for part, limit in ((s.model.blocks[0], 0.1), (s.model, 0.25), (s.model, 0.5)):
            logged.append(clip_grad_norm_(part.parameters(), limit).item())
        s.optimizer.step()
    return logged


def stepped_twice(s: Setting) -> list[float]:
    """The second step finds the gradient as it was clipped."""
    for step in range(STEPS):
        s.loss(step).backward()
        clip_grad_norm_(s.model.parameters(), 0.2)
        s.optimizer.step()
        s.optimizer.step()
        s.forward.zero_grad(set_to_none=step == 0)
    return []


def norms_logged(s: Setting) -> list[float]:
    logged = []
    for step in range(STEPS):
        s.loss(step).backward()
        gradients = [p.grad for p in s.model.parameters() if p.grad is not None]
        logged += [g.norm().item() for g in gradients]
        logged.append(sum(g.detach().data.norm(2).item() ** 2 for g in gradients) ** 0.5)
        logged.append(get_total_norm(gradients).item())
        logged += [torch.linalg.norm(g).item() for g in gradients[:1]]
        s.optimizer.step()
        for p in s.model.parameters():
            p.grad = None
    return logged


def nano_gpt(s: Setting) -> list[float]:
    """karpathy/nanoGPT's train.py: GradScaler, accumulation, autocast, clipping of unscaled gradients."""
    scaler, logged = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2), []
    for step in range(STEPS):
        for micro in range(2):
            with s.no_sync() if micro == 0 else nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = s.loss(2 * step + micro) / 2
            with s.no_sync() if micro == 0 else nullcontext():
                scaler.scale(loss).backward()
        scaler.unscale_(s.optimizer)
        logged.append(clip_grad_norm_(s.model.parameters(), 0.2).item())
        scaler.step(s.optimizer)
        scaler.update()
        s.optimizer.zero_grad(set_to_none=True)
        logged.append(scaler.get_scale())
    return logged


def min_gpt(s: Setting) -> list[float]:
    """karpathy/minGPT's trainer.py: the model's zero_grad comes first."""
    for step in range(STEPS):
        loss = s.loss(step)
        s.forward.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(s.model.parameters(), 0.3)
        s.optimizer.step()
    return []


def overflow_on_one_rank(s: Setting) -> list[float]:
    """GradScaler alone. The last rank's gradient is Inf in the second step: no rank moves, every scale halves."""
    scaler, logged = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(STEPS):
        factor = float("inf") if step == 1 and s.rank == s.world - 1 else 1.0
        scaler.scale(s.loss(step) * factor).backward()
        scaler.step(s.optimizer)
        scaler.update()
        s.optimizer.zero_grad()
        with s.whole():
            logged += [scaler.get_scale(), sum(p.detach().sum().item() for p in s.model.parameters())]
    return logged


def accumulated(s: Setting) -> list[float]:
    """Every backward reduces; scaled in between, so that the second adds to a scaled gradient."""
    for step in range(STEPS):
        s.loss(2 * step).backward()
        for p in s.model.parameters():
            p.grad *= 0.5
        s.loss(2 * step + 1).backward()
        torch._foreach_div_([p.grad for p in s.model.parameters()], 3.0)
        s.optimizer.step()
        s.forward.zero_grad()
    return []


def accumulated_unreduced(s: Setting) -> list[float]:
    logged = []
    for step in range(STEPS):
        with s.no_sync():
            s.loss(2 * step).backward()
        s.loss(2 * step + 1).backward()
        logged.append(clip_grad_norm_(s.model.parameters(), 0.4).item())
        s.optimizer.step()
        s.optimizer.zero_grad(set_to_none=False)
    return logged


def cleared_by_a_wrapper(s: Setting) -> list[float]:
    wrapper = nn.ModuleDict({"inner": s.model})
    for step in range(STEPS):
        s.loss(step).backward()
        s.optimizer.step()
        wrapper.zero_grad(set_to_none=step != 1)
    return []


def cleared_in_part(s: Setting) -> list[float]:
    """A cleared parameter is not stepped; the others' gradients add up."""
    for step in range(STEPS):
        s.loss(step).backward()
        for p in s.model.blocks[step % 2].parameters():
            p.grad = None
        s.model.last.bias.grad.zero_()
        s.optimizer.step()
    return []


def scaled_by_pipelining(s: Setting) -> list[float]:
    """torch.distributed.pipelining divides what its micro-batches added up."""
    for step in range(STEPS):
        s.optimizer.zero_grad()
        for micro in range(4):
            s.loss(4 * step + micro).backward()
        for p in s.model.parameters():
            if p.grad is not None:
                p.grad.div_(4)
        s.optimizer.step()
    return []


def set_before_backward(s: Setting) -> list[float]:
    """A tensor in `.grad` is what the backward adds to."""
    for step in range(STEPS):
        s.loss(step).backward()
        s.model.first.weight.grad = torch.full_like(s.model.first.weight, 0.1)
        s.loss(step + 1).backward()
        s.optimizer.step()
        s.optimizer.zero_grad()
    return []


def averaged(s: Setting) -> list[float]:
    """An exponential moving average by hand."""
    with s.whole():
        average = [p.detach().clone() for p in s.model.parameters()]
    for step in range(STEPS):
        s.loss(step).backward()
        s.optimizer.step()
        s.optimizer.zero_grad()
        with s.whole(), torch.no_grad():
            for mean, p in zip(average, s.model.parameters(), strict=True):
                mean.lerp_(p, 0.1)
    return [mean.sum().item() for mean in average]


LOOPS = {
    loop.__name__: loop
    for loop in (
        clipped, clipped_one_by_one, clipped_in_part_and_again, stepped_twice, norms_logged, nano_gpt, min_gpt,
        overflow_on_one_rank, accumulated, accumulated_unreduced, cleared_by_a_wrapper, cleared_in_part,
        scaled_by_pipelining, set_before_backward, averaged,
    )
}  # fmt: skip
