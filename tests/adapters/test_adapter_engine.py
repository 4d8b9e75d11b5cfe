"""A frozen model with a few trainable parameters that stay whole: the engine's side of adapters, whatever they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Block, Stack, assert_close, assert_same_bits, drawn, joint_batch, loss_of, part
from torch import Tensor, nn
from zerolite_kernels import cpu

import zerolite
from zerolite.adapters import state
from zerolite.adapters.checks import check_gradients

STEPS = 4


class AdaptedBlock(Block):
    """A low-rank bypass around one layer, and a shift of its output."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.shift = None

    def add(self, width: int) -> None:
        self.lora_A = nn.Parameter(torch.randn(2, width))
        self.lora_B = nn.Parameter(torch.randn(2 * width + 1, 2))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.up(h) + h @ self.lora_A.T @ self.lora_B.T)) + self.shift


class AdaptedStack(Stack):
    def __init__(self, width: int = 7, blocks: int = 3) -> None:
        super().__init__(width, blocks)
        self.blocks = nn.ModuleList(AdaptedBlock(width) for _ in range(blocks))
        self.prompt = None

    def add(self) -> None:
        adapter = state.begin(self, "default", None)
        for block in self.blocks:
            block.add(7)
        self.prompt = nn.Parameter(torch.randn(7))  # of the root
        state.adopt(self, adapter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.prompt
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def make(dtype: torch.dtype) -> AdaptedStack:
    def build() -> AdaptedStack:
        model = AdaptedStack()
        model.add()
        return copy.deepcopy(model)  # a copy's adapters are adapters too

    return drawn(build).to(dtype)


def adapter_values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in state.adapter_of(model, None).parameters.items()}


def train(stage: int, dtype: torch.dtype, offload=None, precision=None):
    """(the adapter after some steps, whether base parameters are unreadable outside of forward, gradient norms)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make(dtype)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    zerolite.shard(model, stage=stage, offload=offload, precision=precision)
    optimizer = zerolite.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, max_grad_norm=1.0)
    norms = []
    for step in range(STEPS):
        loss_of(model, part(joint_batch("stack", step, dtype), rank, world)).backward()
        if step == 0:
            check_gradients(model)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    values = {name: value.clone() for name, value in adapter_values(model).items()}
    list(model.parameters())  # waits for what is away
    values = adapter_values(model)
    is_hidden = any(p.isnan().any() for p in model.parameters() if not p.requires_grad)
    with zerolite.full_params(model):
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], value.to(now[name].dtype)) for name, value in base.items()), "the base moved"
    return values, is_hidden, norms


def test_stages_change_no_bit_and_the_adapter_stays_readable(ranks):
    expected, _, norms = ranks(2).run(train, 0, torch.float32)[0]
    for stage in (1, 2, 3):
        for values, is_hidden, other_norms in ranks(2).run(train, stage, torch.float32):
            assert_same_bits(values, expected)
            assert is_hidden == (stage == 3) and other_norms == norms


def test_all_stages_train_as_plain_torch_does(ranks):
    """In fp64, against torch.optim.AdamW on one process with the joint batch."""
    model = make(torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    for step in range(STEPS):
        loss_of(model, joint_batch("stack", step, torch.float64)).backward()
        for parameter in trained:
            parameter.grad /= 2  # the mean over two ranks
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = adapter_values(model)
    for stage in range(4):
        assert_close(ranks(2).run(train, stage, torch.float64)[0][0], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")
@pytest.mark.parametrize(("stage", "parameters"), [(0, False), (2, False), (3, False), (3, True)])
def test_offload_changes_no_bit(ranks, stage, parameters):
    expected, _, norms = ranks(2).run(train, 2, torch.float32)[0]
    for values, _, other_norms in ranks(2).run(train, stage, torch.float32, zerolite.Offload(parameters=parameters)):
        assert_same_bits(values, expected)
        assert other_norms == norms


def test_sixteen_bit_adapters_have_a_master(ranks):
    precision = zerolite.Precision(torch.bfloat16, reduce=torch.float32)
    expected, *_ = ranks(2).run(train, 2, torch.float32, None, precision)[0]
    values, *_ = ranks(2).run(train, 3, torch.float32, None, precision)[0]
    assert all(value.dtype == torch.bfloat16 for value in values.values())
    assert_same_bits(values, expected)


def measured(stage: int):
    model = make(torch.float32)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trains) for trains in (True, False)]
    zerolite.shard(model, stage=stage)
    optimizer = zerolite.AdamW([p for p in model.parameters() if p.requires_grad])
    loss_of(model, part(joint_batch("stack", 0, torch.float32), dist.get_rank(), dist.get_world_size())).backward()
    usage = zerolite.measure(model, optimizer)
    buckets = [
        (b.gradients is None, b.parameters.stays_unsharded) for unit in model._zerolite.units for b in unit.buckets
    ]
    return counts, usage, buckets


def test_frozen_parameters_own_no_gradients_and_no_states(ranks):
    """Bytes at stage 3: 4 of each adapter parameter, 4/N of its gradient, 8/N of its moments, 4/N of the base."""
    results = ranks(2).run(measured, 3)
    total, (trained, frozen) = 0, results[0][0]
    for _, usage, buckets in results:
        assert all(is_resident != is_frozen for is_frozen, is_resident in buckets)
        total += usage.parameters_bytes + usage.gradients_bytes + usage.optimizer_bytes - usage.padding_bytes
    # The root, embedding and output layer, stays gathered from forward to the end of backward, and is freed then.
    assert total == 2 * 4 * trained + 4 * frozen + 4 * trained + 8 * trained


def save_and_load(folder: Path, frozen: bool, saved_at: int, loaded_at: int):
    def build(stage: int):
        model = zerolite.shard(make(torch.float32), stage=stage)
        return model, zerolite.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(model, optimizer, number: int) -> None:
        rows = part(joint_batch("stack", number, torch.float32), dist.get_rank(), dist.get_world_size())
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build(saved_at)
    step(model, optimizer, 0)
    zerolite.save(model, folder, optimizer, frozen=frozen)
    step(model, optimizer, 1)
    again, other = build(loaded_at)
    zerolite.load(again, folder, other)
    step(again, other, 1)
    return adapter_values(model), adapter_values(again)


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(3, 3), (3, 0), (1, 3)])
def test_a_checkpoint_without_the_base_resumes_exactly(ranks, tmp_path, saved_at, loaded_at):
    for straight, resumed in ranks(2).run(save_and_load, tmp_path / "c", False, saved_at, loaded_at):
        assert_same_bits(resumed, straight)
    small = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    ranks(2).run(save_and_load, tmp_path / "d", True, saved_at, loaded_at)
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["frozen"] is False
    base_bytes = 4 * sum(p.numel() for p in make(torch.float32).parameters() if not p.requires_grad)
    assert sum(path.stat().st_size for path in (tmp_path / "d").iterdir()) > small + base_bytes


def learn_nothing(stage: int) -> str:
    model = zerolite.shard(make(torch.float32), stage=stage)
    x = model.first(joint_batch("stack", 0, torch.float32)["x"]) + model.prompt
    with pytest.raises(zerolite.ZeroliteError) as error:
        F.mse_loss(x, torch.zeros_like(x)).backward()
        check_gradients(model)
    return str(error.value)


@pytest.mark.parametrize("stage", [0, 2])
def test_an_adapter_that_learns_nothing_is_named(ranks, stage):
    for message in ranks(2).run(learn_nothing, stage):
        assert "adapter 'default' learns nothing in 6 of 10 parameters" in message
        assert "blocks.0.lora_B, blocks.0.shift" in message and "lora_A" not in message


def ask_for_a_state_dict(stage: int) -> str:
    model = zerolite.shard(make(torch.float32), stage=stage)
    try:
        return f"{len(model.state_dict())} tensors"
    except zerolite.ZeroliteError as error:
        return str(error)


def test_a_base_that_is_sharded_gives_no_state_dict(ranks):
    """Though the adapter beside it is whole."""
    assert ranks(2).run(ask_for_a_state_dict, 2)[0].endswith("tensors")
    assert "hold no whole parameters" in ranks(2).run(ask_for_a_state_dict, 3)[0]


def test_adapters_are_added_before_sharding():
    model = zerolite.shard(AdaptedStack(), stage=0)
    with pytest.raises(ValueError, match="added before zerolite.shard"):
        state.begin(model, "late", None)
    plain = Stack()
    with pytest.raises(ValueError, match="has no adapter"):
        state.use(plain, "default")
    model = make(torch.float32)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        state.begin(model, "default", None)
    with pytest.raises(ValueError, match="is an identifier"):
        state.begin(model, "a.b", None)
    with pytest.raises(ValueError, match="there is no adapter 'other': the model has default"):
        state.use(model, "other")


def test_which_adapter_is_on():
    """The newest, the one that `use` names, none inside `disabled`; a copy has switches of its own."""
    model = make(torch.float32)
    first = state.adapters_of(model).current
    second = state.begin(model, "second", None)
    model.extra = nn.Parameter(torch.zeros(3))
    state.adopt(model, second)
    assert list(second.parameters) == ["extra"] and not any(p.requires_grad for p in first.parameters.values())
    assert state.adapters_of(model).current is second
    with state.disabled(model), state.disabled(model):
        assert state.adapters_of(model).current is None
    state.use(model, "default")
    assert state.adapters_of(model).current is first
    twin = copy.deepcopy(model)
    state.use(twin, "second")
    assert state.adapters_of(model).active == "default"
    assert state.adapter_of(twin, None).parameters["extra"] is twin.extra
