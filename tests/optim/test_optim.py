"""On given gradients, at every stage: Adam as torch's, Lion and LAMB as their papers', norm and clipping as torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import assert_close, assert_same_bits, whole
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
STEPS = 10


class Given(nn.Module):
    """Linear in its parameters: gradients as given, but `tied` counts twice, `zero` starts at 0, `idle` gets none."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"matrix": (7, 5), "tied": (3, 4), "bias": (11,), "one": (1,), "zero": (5,), "idle": (4,)}
        for name, shape in shapes.items():
            sign = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
            value = sign * (0.5 + torch.rand(shape, generator=generator))
            self.register_parameter(name, nn.Parameter((value * (name != "zero")).to(dtype)))
        self.again = nn.Module()
        self.again.tied = self.tied

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        own = sum((getattr(self, name) * gradient).sum() for name, gradient in gradients.items())
        return own + (self.again.tied * gradients["tied"]).sum()


def given(step: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    shapes = {"matrix": (7, 5), "tied": (3, 4), "bias": (11,), "one": (1,), "zero": (5,)}
    size = 10.0 ** (step % 3 - 1)
    return {name: (size * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def mean(step: int, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradient that the step sees, tied part twice."""
    parts = [given(step, rank, dtype) for rank in range(world)]
    return {name: (2 if name == "tied" else 1) * sum(part[name] for part in parts) / world for name in parts[0]}


def run(
    rule: str, options: dict, stage: int, dtype: torch.dtype, clip: float | None = None, by_hand: float | None = None
):
    import zerolite

    model = zerolite.shard(Given(dtype), stage=stage, precision=zerolite.Precision(dtype, dtype))
    clipping = {} if clip is None else {"max_grad_norm": clip}
    optimizer = getattr(zerolite, rule)(model.parameters(), **options, **clipping)
    norms = []
    for step in range(STEPS):
        model(given(step, dist.get_rank(), dtype)).backward()
        if by_hand is not None:
            norms.append(float(optimizer.clip_grad_norm_(by_hand)))
        optimizer.step()
        if by_hand is None:
            norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return whole(model), norms


def plain(step_rule: Callable[[int, dict[str, Tensor]], None], model: Given, world: int, dtype: torch.dtype, clip=None):
    """`step_rule(step, gradients)` for every step, on clipped gradients if asked; the parameters and the norms."""
    norms = []
    for step in range(STEPS):
        for name, gradient in mean(step, world, dtype).items():
            getattr(model, name).grad = gradient
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
        step_rule(step, {name: value for name, value in model.named_parameters() if value.grad is not None})
    return whole(model), norms


def plain_torch(rule: str, options: dict, world: int, dtype: torch.dtype, clip=None):
    model = Given(dtype)
    optimizer = getattr(torch.optim, rule)(model.parameters(), **options)
    return plain(lambda step, parameters: optimizer.step(), model, world, dtype, clip)


@pytest.mark.each
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "rule, options",
    [
        ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
        ("AdamW", {"lr": 3e-3, "betas": (0.7, 0.95), "eps": 1e-4, "weight_decay": 0.0}),
        ("AdamW", {}),
        ("Adam", {"lr": 1e-2}),
        ("Adam", {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.1}),
    ],
    ids=["adamw", "adamw-betas", "adamw-defaults", "adam", "adam-l2"],
)
def test_adam_equals_torch(ranks, rule, options, stage):
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        expected, _ = plain_torch(rule, options, 2, dtype)
        for result, _ in ranks(2).run(run, rule, options, stage, dtype):
            # `zero` starts at 0, so near it an absolute error of one rounding of a step is allowed
            assert_close(result, expected, rtol, atol=rtol * 1e-1)


@torch.no_grad()
def lion(options: dict, world: int):
    """Chen et al. 2023, algorithm 2."""
    lr, (beta1, beta2), decay = options["lr"], options["betas"], options["weight_decay"]
    momentum = {}

    def rule(step, parameters):
        for name, value in parameters.items():
            m = momentum.get(name, torch.zeros_like(value))
            direction = torch.sign(beta1 * m + (1 - beta1) * value.grad)
            value -= lr * (direction + decay * value)
            momentum[name] = beta2 * m + (1 - beta2) * value.grad

    return plain(rule, Given(torch.float64), world, torch.float64)


@torch.no_grad()
def lamb(options: dict, world: int):
    """You et al. 2020, algorithm 2, the scaling function being the identity; a norm of 0 means a ratio of 1."""
    lr, (beta1, beta2), eps, decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
    state = {}

    def rule(step, parameters):
        for name, value in parameters.items():
            m, v = state.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
            m = beta1 * m + (1 - beta1) * value.grad
            v = beta2 * v + (1 - beta2) * value.grad**2
            state[name] = m, v
            ratio = (m / (1 - beta1 ** (step + 1))) / ((v / (1 - beta2 ** (step + 1))).sqrt() + eps)
            update = ratio + decay * value
            numerator, denominator = value.norm(), update.norm()
            trust = numerator / denominator if numerator > 0 and denominator > 0 else 1.0
            value -= lr * trust * update

    return plain(rule, Given(torch.float64), world, torch.float64)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_equals_its_paper(ranks, world, decay, stage):
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": decay}
    expected, _ = lion(options, world)
    for result, _ in ranks(world).run(run, "Lion", options, stage, torch.float64):
        assert_close(result, expected, 1e-12, 1e-14)
    (single, _), *_ = ranks(world).run(run, "Lion", options, stage, torch.float32)
    assert_close({name: value.double() for name, value in single.items()}, expected, 1e-6, 1e-7)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_equals_its_paper_parameter_by_parameter(ranks, world, decay, stage):
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": decay}
    expected, _ = lamb(options, world)
    for result, _ in ranks(world).run(run, "Lamb", options, stage, torch.float64):
        assert_close(result, expected, 1e-10, 1e-13)


@pytest.mark.parametrize("rule", ["AdamW", "Adam", "Lion", "Lamb"])
def test_defaults_are_the_ones_in_the_signature(ranks, rule):
    defaults = {
        "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
        "Adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        "Lion": {"betas": (0.9, 0.99)},
        "Lamb": {"betas": (0.9, 0.999), "eps": 1e-6},
    }[rule]
    (group,) = ranks(1).run(first_group, rule)
    assert {name: group[name] for name in defaults} == defaults


def first_group(rule: str) -> dict:
    import zerolite

    optimizer = getattr(zerolite, rule)(zerolite.shard(Given(torch.float32), stage=1).parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


@pytest.mark.parametrize("rule", ["AdamW", "Lion", "Lamb"])
@pytest.mark.parametrize("how", ["max_grad_norm", "by_hand"])
def test_clipping_equals_torch_and_changes_no_bit_between_stages(ranks, how, rule):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    where = {"max_grad_norm": (2.0, None), "by_hand": (None, 2.0)}[how]
    single = [ranks(2).run(run, rule, options, stage, torch.float32, *where) for stage in STAGES]
    for results in single:
        for result, norms in results:
            assert_same_bits(result, single[0][0][0])
            assert norms == single[0][0][1]
    if rule == "AdamW":
        expected, expected_norms = plain_torch("AdamW", options, 2, torch.float64, clip=2.0)
        assert min(expected_norms) < 2.0 < max(expected_norms)
        for result, norms in ranks(2).run(run, "AdamW", options, 3, torch.float64, *where):
            assert_close(result, expected, 1e-12, 1e-12)
            assert norms == pytest.approx(expected_norms, rel=1e-12)
            assert all(type(norm) is float for norm in norms)


def accumulated_norm(stage: int, quiet: bool):
    import zerolite

    dtype = torch.float64
    model = zerolite.shard(Given(dtype), stage=stage, precision=zerolite.Precision(dtype, dtype))
    optimizer = zerolite.AdamW([model.matrix, model.tied], lr=0.0, max_grad_norm=1e9)
    for step in range(3):
        with zerolite.no_sync(model, enabled=quiet and step < 2):
            model(given(step, dist.get_rank(), dtype)).backward()
    optimizer.step()
    return optimizer.grad_norm


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_is_that_of_the_accumulated_mean_of_the_optimizers_own_parameters(ranks, stage, quiet):
    totals = [sum(mean(step, 2, torch.float64)[name] for step in range(3)) for name in ("matrix", "tied")]
    expected = sum(total.square().sum() for total in totals).sqrt().item()
    for norm in ranks(2).run(accumulated_norm, stage, quiet):
        assert norm == pytest.approx(expected, rel=1e-13)


def large(stage: int, size: float):
    import zerolite

    dtype = torch.float32
    model = zerolite.shard(Given(dtype), stage=stage, precision=zerolite.Precision(dtype, dtype))
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    model({name: gradient * size for name, gradient in given(0, dist.get_rank(), dtype).items()}).backward()
    optimizer.step()
    return optimizer.grad_norm, optimizer.step_was_skipped


@pytest.mark.parametrize("size", [1e25, 1e-30], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_of_what_fp32_cannot_square(ranks, stage, size):
    """Squares that overflow or vanish in fp32: a finite gradient is no reason to skip."""
    expected = sum(gradient.square().sum() for gradient in mean(0, 2, torch.float64).values()).sqrt().item() * size
    for norm, skipped in ranks(2).run(large, stage, size):
        assert not skipped
        assert norm == pytest.approx(expected, rel=1e-5)
