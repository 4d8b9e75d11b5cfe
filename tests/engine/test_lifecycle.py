"""From start to resumption: meta, buffers, input gradients, exceptions, closures, optimizer state, units."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed as dist
from cases import data, squared
from models import Block, Stack, assert_close, assert_same_bits, build, drawn, joint_batch, llama, loss_of, part, whole
from torch import nn

STAGES = (0, 1, 2, 3)


def share(model: nn.Module, stage: int, dtype: torch.dtype = torch.float64, **options):
    import zerolite

    model = zerolite.shard(model, stage=stage, precision=zerolite.Precision(dtype, dtype))
    return model, zerolite.AdamW(model.parameters(), **{"lr": 1e-2, **options})


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    import zerolite

    with zerolite.full_params(model):
        return whole(model)


def learn(model: nn.Module, optimizer, step: int) -> None:
    x, y = data(dist.get_rank(), step)
    squared(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def plain(steps: int, world: int = 2) -> dict[str, torch.Tensor]:
    model = drawn(Stack).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        for rank in range(world):
            x, y = data(rank, step)
            (squared(model(x), y) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


# start


def start_apart(stage: int):
    model, _ = share(drawn(Stack, seed=dist.get_rank()).double(), stage)
    return full(model)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_start_apart_get_the_first_ranks_parameters(ranks, stage):
    for result in ranks(3).run(start_apart, stage):
        assert_same_bits(result, whole(drawn(Stack, seed=0).double()))


def start_on_meta(stage: int):
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        model = Stack()
        hugging = llama()
    model, optimizer = share(model, stage)
    start = full(model)
    learn(model, optimizer, 0)
    hugging, _ = share(hugging, stage)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        logits = hugging(input_ids=ids).logits.clone()
    return start, full(model), full(hugging), logits


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_on_meta_is_initialised_by_its_own_rules_alike_on_every_rank(ranks, stage):
    results = ranks(2).run(start_on_meta, stage)
    for start, after, hugging, logits in results:
        for mine, first in zip((start, after, hugging), results[0], strict=False):
            assert_same_bits(mine, first)
        assert all(value.isfinite().all() for value in [*start.values(), *after.values()])
        assert (start["blocks.0.norm.weight"] == 1).all() and (start["blocks.0.norm.bias"] == 0).all()
        assert 0.1 < start["first.weight"].abs().max() <= 5**-0.5  # nn.Linear's bound
        assert not torch.equal(start["blocks.0.up.weight"], start["blocks.1.up.weight"])
        assert 0.015 < hugging["model.embed_tokens.weight"].std() < 0.025  # LlamaConfig.initializer_range
        twin = llama().double()
        twin.load_state_dict(hugging)  # the rotary caches are the twin's own
        torch.testing.assert_close(logits, twin(input_ids=torch.arange(3, 11)[None]).logits, rtol=1e-6, atol=1e-8)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True)

    def forward(self, x):
        return self.lstm(x)[0]


def start_recurrent_on_meta(stage: int):
    with torch.device("meta"):
        model = Recurrent()
    model, _ = share(model, stage)
    with torch.no_grad():
        return full(model), model(torch.ones(3, 2, 5, dtype=torch.float64)).clone()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_recurrent_model_on_meta(ranks, stage):
    """Its weights, to which nn.LSTM refers weakly, are swapped as any others, and it computes with them."""
    for weights, output in ranks(2).run(start_recurrent_on_meta, stage):
        twin = Recurrent().double()
        twin.load_state_dict(weights)
        assert torch.equal(output, twin(torch.ones(3, 2, 5, dtype=torch.float64)))


# buffers


class Buffers(Stack):
    def __init__(self):
        super().__init__()
        self.normal = nn.BatchNorm1d(7)
        self.register_buffer("table", torch.arange(7.0), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.blocks[1].register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        self.count += 1
        return super().forward(x) + self.normal(self.first(x) * self.table).sum(1, keepdim=True)


def train_with_buffers(stage: int):
    model, optimizer = share(drawn(Buffers).double(), stage)
    for step in range(3):
        learn(model, optimizer, step)
    return full(model), {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_stay_on_their_rank_with_their_type(ranks, stage):
    twins = [drawn(Buffers).double() for _ in range(2)]
    optimizers = [torch.optim.AdamW(twin.parameters(), lr=1e-2) for twin in twins]
    for step in range(3):
        for rank, twin in enumerate(twins):
            x, y = data(rank, step)
            squared(twin(x), y).backward()
        for pair in zip(*(twin.parameters() for twin in twins), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            pair[0].grad, pair[1].grad = mean, mean.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for twin, (parameters, buffers) in zip(twins, ranks(2).run(train_with_buffers, stage), strict=True):
        assert_close(parameters, whole(twin))
        assert_close(buffers, dict(twin.named_buffers()))
        assert buffers["count"] == 3 and buffers["blocks.1.mask"].dtype == torch.bool


# gradients of inputs


def input_gradients(stage: int, checkpointing: bool):
    model, optimizer = share(build("llama"), stage)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    embeds = embeddings(dist.get_rank()).requires_grad_()
    model(inputs_embeds=embeds).logits.square().mean().backward()
    optimizer.zero_grad()
    (only,) = (
        torch.autograd.grad(model(inputs_embeds=embeds).logits.sin().mean(), embeds) if not checkpointing else [None]
    )
    before = full(model)
    optimizer.step()  # no parameter has a gradient now, unless autograd.grad left one
    return embeds.grad, only, before, full(model)


def embeddings(rank: int) -> torch.Tensor:
    return torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_inputs_get_their_own_ranks_gradient(ranks, stage, checkpointing):
    model = build("llama")
    for rank, (gradient, only, before, after) in enumerate(ranks(2).run(input_gradients, stage, checkpointing)):
        embeds = embeddings(rank).requires_grad_()
        expected = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().mean(), embeds)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
        if only is not None:
            expected = torch.autograd.grad(model(inputs_embeds=embeds).logits.sin().mean(), embeds)[0]
            torch.testing.assert_close(only, expected, rtol=1e-9, atol=1e-15)
        assert_same_bits(after, before)


# failures


class Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("in backward")


def fail_in(where: str, stage: int, block: int, late: bool):
    model, optimizer = share(drawn(Stack).double(), stage)
    learn(model, optimizer, 0)

    def refuse(module, inputs):
        if where == "forward":
            raise ArithmeticError("in forward")
        return (Refuse.apply(inputs[0]),)

    for _ in range(2):
        handle = model.blocks[block].register_forward_pre_hook(refuse)
        x, y = data(dist.get_rank(), 77)
        try:
            squared(model(x), y).backward()
            raise AssertionError("it should have failed")
        except ArithmeticError as error:
            assert where in str(error)
        handle.remove()
        if not late:
            optimizer.zero_grad()
    for step in (1, 2):
        x, y = data(dist.get_rank(), step)
        loss = squared(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return full(model)


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_after_an_exception_training_goes_on_as_if_it_had_not_been(ranks, stage, where, block):
    """Whether gradients are forgotten right away or late, between the next forward and its backward."""
    for late in (False, True):
        for result in ranks(2).run(fail_in, where, stage, block, late):
            assert_close(result, plain(3))


def forget(stage: int):
    model, optimizer = share(drawn(Stack).double(), stage)
    for step in range(3):
        x, y = data(dist.get_rank(), step + 90)
        loss = squared(model(x), y)  # a forward whose backward never comes
        del loss
        learn(model, optimizer, step)
    return full(model)


@pytest.mark.parametrize("stage", STAGES)
def test_a_forward_without_backward_leaves_no_trace(ranks, stage):
    for result in ranks(2).run(forget, stage):
        assert_close(result, plain(3))


# closures and optimizer state


def step_by_closure(stage: int):
    model, optimizer = share(drawn(Stack).double(), stage)
    losses = []
    for step in range(3):
        x, y = data(dist.get_rank(), step)

        def closure():
            optimizer.zero_grad()
            loss = squared(model(x), y)  # noqa: B023
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    return full(model), losses


@pytest.mark.parametrize("stage", STAGES)
def test_closures(ranks, stage):
    for rank, (parameters, losses) in enumerate(ranks(2).run(step_by_closure, stage)):
        assert_close(parameters, plain(3))
        x, y = data(rank, 0)
        assert losses[0] == pytest.approx(squared(drawn(Stack).double()(x), y).item(), rel=1e-12)


def resume(stage: int, rule: str, dtype: torch.dtype):
    import zerolite

    precision = zerolite.Precision(dtype)
    batches = [part(joint_batch("stack", step, dtype), dist.get_rank(), dist.get_world_size()) for step in range(4)]

    def start():
        model = zerolite.shard(build("stack", dtype), stage=stage, precision=precision)
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": 0.03}, {"params": rest, "weight_decay": 0.5}]
        return model, getattr(zerolite, rule)(groups, lr=1e-2)

    def learn(model, optimizer, batches):
        for batch in batches:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    learn(model, optimizer, batches[:2])
    optimizer.param_groups[1]["lr"] = 0.005
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    middle = full(model)
    learn(model, optimizer, batches[2:])

    again, other = start()
    with zerolite.full_params(again, writeback=True), torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(middle[name])
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[1]["lr"] == 0.005
    learn(again, other, batches[2:])
    return full(model), full(again)


@pytest.mark.each
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "rule, dtype",
    [
        ("AdamW", torch.float32),
        ("Adam", torch.float32),
        ("Lion", torch.float32),
        ("Lamb", torch.float32),
        ("AdamW", torch.bfloat16),
    ],
)
def test_optimizer_state_goes_on_bit_for_bit(ranks, rule, dtype, stage):
    """bf16 as well: the state holds the fp32 master."""
    for straight, resumed in ranks(2).run(resume, stage, rule, dtype):
        assert_same_bits(resumed, straight)


# optimizers that share a model, and parameters frozen on the way


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [*model.first.parameters(), model.blocks[1].up.weight], [
        *model.blocks[0].parameters(),
        model.blocks[1].up.bias,
    ]


def alternate(model: nn.Module, make, rank_data) -> None:
    """Two optimizers, stepped in turn; each forgets only its own gradients. In the third step a block is frozen."""
    optimizers = [make(half, lr) for half, lr in zip(halves(model), (1e-2, 3e-2), strict=True)]
    for step in range(4):
        model.blocks[0].requires_grad_(step != 2)
        for x, y, share in rank_data(step):
            (squared(model(x), y) / share).backward()
        optimizer = optimizers[step % 2]
        optimizer.step()
        optimizer.zero_grad()


def alternate_on_rank(stage: int):
    import zerolite

    model = zerolite.shard(drawn(Stack).double(), stage=stage)
    make = lambda half, lr: zerolite.AdamW(half, lr=lr, weight_decay=0.1)  # noqa: E731
    alternate(model, make, lambda step: [(*data(dist.get_rank(), step), 1)])
    return full(model)


@pytest.mark.parametrize("stage", STAGES)
def test_two_optimizers_share_a_model_and_blocks_freeze_and_thaw(ranks, stage):
    model = drawn(Stack).double()
    make = lambda half, lr: torch.optim.AdamW(half, lr=lr, weight_decay=0.1)  # noqa: E731
    alternate(model, make, lambda step: [(*data(rank, step), 2) for rank in range(2)])
    for result in ranks(2).run(alternate_on_rank, stage):
        assert_close(result, whole(model))


def both(model: nn.Module, make, rank_data) -> None:
    """Two optimizers over the same parameters, each with its own states, both stepped on the same gradients."""
    optimizers = [make(model.parameters(), lr) for lr in (1e-2, 3e-2)]
    for step in range(3):
        for x, y, share in rank_data(step):
            (squared(model(x), y) / share).backward()
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad()


def both_on_rank(stage: int):
    import zerolite

    model = zerolite.shard(drawn(Stack).double(), stage=stage)
    both(model, zerolite.AdamW, lambda step: [(*data(dist.get_rank(), step), 1)])
    return full(model)


@pytest.mark.parametrize("stage", STAGES)
def test_two_optimizers_over_the_same_parameters(ranks, stage):
    model = drawn(Stack).double()
    both(model, torch.optim.AdamW, lambda step: [(*data(rank, step), 2) for rank in range(2)])
    for result in ranks(2).run(both_on_rank, stage):
        assert_close(result, whole(model))


# the end


def drop(stage: int):
    import gc
    import weakref

    model, optimizer = share(build("llama"), stage)
    ids = torch.arange(3, 11)[None]
    for _ in range(2):
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    full(model)
    references = [weakref.ref(thing) for thing in (model, optimizer, model.lm_head.weight)]
    del model, optimizer
    gc.collect()
    return [reference() is None for reference in references]


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_nobody_holds_is_freed(ranks, stage):
    for freed in ranks(2).run(drop, stage):
        assert all(freed), freed


# units


def choose_units(stage: int, choice: str):
    import zerolite

    units = {
        "default": None,
        "class": [Block],
        "linear": lambda module: isinstance(module, nn.Linear),
        "nested": lambda module: isinstance(module, (nn.Linear, Block)),
    }[choice]
    precision = zerolite.Precision(torch.float32, torch.float32)
    model = zerolite.shard(drawn(Stack), stage=stage, precision=precision, units=units)
    optimizer = zerolite.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        x, y = (tensor.float() for tensor in data(dist.get_rank(), step))
        squared(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return full(model)


@pytest.mark.parametrize("stage", STAGES)
def test_the_choice_of_units_changes_no_bit(ranks, stage):
    """Vector instructions and their tails must round alike wherever an element lies."""
    expected, _ = ranks(2).run(choose_units, stage, "default")
    for choice in ("class", "linear", "nested"):
        for result in ranks(2).run(choose_units, stage, choice):
            assert_same_bits(result, expected)
