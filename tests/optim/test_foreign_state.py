"""What users do to `optimizer.state` and `param_groups` on the way does what it does in torch.optim."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from models import assert_close, assert_same_bits
from torch import nn

import zerolite

STEPS = 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(6, 1)).to(dtype)


def batch(rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


def groups(model: nn.Module) -> list[dict]:
    return [{"params": list(model[:2].parameters()), "lr": 0.02}, {"params": list(model[2:].parameters())}]


# What is done before step 3. `optimizer` is torch's or ours.


def zero_in_place(optimizer):
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].mul_(0.5)


def put_new_tensors(optimizer):
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        state.update(exp_avg_sq=state["exp_avg_sq"] * 2)


def loop_over_all_that_is_there(optimizer):
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                value.mul_(0.25)


def put_plain_dicts(optimizer):
    for parameter, state in list(optimizer.state.items()):
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **{n: v * 3 for n, v in state.items() if n != "step"}}


def empty_one(optimizer):
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {}


def clear_one(optimizer):
    optimizer.state[optimizer.param_groups[1]["params"][0]].clear()


def delete_one(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def drop_all(optimizer):
    optimizer.state = defaultdict(dict)


def set_steps(optimizer):
    for state in optimizer.state.values():
        state["step"] = torch.tensor(100.0)
        state["step"] += 1


def move_a_parameter(optimizer):
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop(0))


def remove_a_group(optimizer):
    optimizer.param_groups.pop(0)


def add_a_group(optimizer):
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": 0.05, "weight_decay": 0.0})


def remove_and_empty_then_add_again(optimizer):
    parameter = optimizer.param_groups[1]["params"].pop()
    del optimizer.state[parameter]
    optimizer.state_dict()  # finds it gone
    optimizer.param_groups[1]["params"].append(parameter)


def tensor_lr(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.005, dtype=torch.float64)


def its_own_earlier_state(optimizer):
    earlier = pickle.loads(pickle.dumps(optimizer.state_dict()))
    zero_in_place(optimizer)
    drop_all(optimizer)
    optimizer.load_state_dict(earlier)


def a_state_dict_without_states(optimizer):
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})


EDITS = {edit.__name__: edit for edit in (
    zero_in_place, put_new_tensors, loop_over_all_that_is_there, put_plain_dicts, empty_one, clear_one, delete_one,
    drop_all, set_steps, move_a_parameter, remove_a_group, add_a_group, remove_and_empty_then_add_again, tensor_lr,
    its_own_earlier_state, a_state_dict_without_states,
)}  # fmt: skip


def trained(name: str, stage: int, dtype: torch.dtype, offload=None) -> dict[str, torch.Tensor]:
    model = zerolite.shard(net(dtype), stage=stage, offload=offload, units=Block)
    optimizer = zerolite.AdamW(groups(model), lr=0.01, betas=(0.9, 0.99))
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(STEPS):
        if step == 3:
            EDITS[name](optimizer)
        model(batch(rank, step, dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def all_trained(stages, dtype: torch.dtype, offload=None) -> dict:
    return {(name, stage): trained(name, stage, dtype, offload) for name in EDITS for stage in stages}


def expected(name: str, world: int) -> dict[str, torch.Tensor]:
    model = net(torch.float64)
    optimizer = torch.optim.AdamW(groups(model), lr=0.01, betas=(0.9, 0.99))
    for step in range(STEPS):
        if step == 3:
            EDITS[name](optimizer)
        for rank in range(world):
            (model(batch(rank, step, torch.float64)).square().mean() / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("world", [1, 2])
def test_the_parameters_are_those_of_torch(ranks, world):
    """In fp64, at every stage."""
    wanted = {name: expected(name, world) for name in EDITS}
    untouched = wanted["its_own_earlier_state"]  # undoes what it did
    for name, parameters in wanted.items():
        same = all(torch.equal(value, untouched[key]) for key, value in parameters.items())
        assert same == (name == "its_own_earlier_state"), f"{name} changes nothing"
    for results in ranks(world).run(all_trained, (0, 2, 3), torch.float64):
        for (name, stage), parameters in results.items():
            try:
                assert_close(parameters, wanted[name])
            except AssertionError as error:
                raise AssertionError(f"{name}, stage {stage}: {error}") from None


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_offload_changes_no_bit_of_it(ranks, states):
    """Where workers hold the states; those of few bits are compared with themselves at another stage."""
    offload = zerolite.Offload(states=states, workers=1, threads=1)
    on_host = ranks(2).run(all_trained, (1, 3), torch.float32, offload)[0]
    on_device = ranks(2).run(all_trained, (1,), torch.float32)[0]
    for name in EDITS:
        assert_same_bits(on_host[name, 1], on_host[name, 3])
        if states == "fp32":
            assert_same_bits(on_host[name, 1], on_device[name, 1])


def test_load_state_dict_calls_hooks_and_changes_nothing_where_it_raises():
    torch.manual_seed(0)
    model = zerolite.shard(net(torch.float32), stage=1, units=Block)
    optimizer = zerolite.AdamW(groups(model), lr=0.01)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    good, log = copy.deepcopy(optimizer.state_dict()), []
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: log.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: log.append("post"))
    optimizer.load_state_dict(good)
    assert log == ["pre", "post"]

    def broken(change) -> dict:
        state_dict = copy.deepcopy(good)
        for state in state_dict["state"].values():
            state["exp_avg"] += 1
        change(state_dict)
        return state_dict

    for change, message in [
        (lambda d: d["state"][3].pop("exp_avg"), r"state of 1\.\w+.* has no exp_avg"),
        (lambda d: d["state"][7].update(exp_avg_sq=torch.ones(5)), r"exp_avg_sq of .* has shape \(5,\), expected"),
        (lambda d: d["state"][7].update(step=-1.0), "step of .* is a whole number of at least 0, got -1"),
        (lambda d: d["state"][7].update(exp_avg=3.0), "exp_avg of .* is a tensor of shape .*, got float"),
        (lambda d: d["param_groups"].pop(), "param groups of other sizes"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(broken(change))
        for index, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, good["state"][index][name]) for name, value in state.items())


def test_an_incomplete_state_is_refused_at_the_step():
    model = zerolite.shard(net(torch.float32), stage=1, units=Block)
    optimizer = zerolite.AdamW(model.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    del optimizer.state[next(model.parameters())]["exp_avg"]
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ValueError, match="has no exp_avg, only"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_parameter_in_two_groups_is_refused():
    model = zerolite.shard(net(torch.float32), stage=1, units=Block)
    optimizer = zerolite.AdamW(groups(model), lr=0.01)
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"][0])
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.step()


def test_a_tensor_learning_rate_is_saved_as_a_number(tmp_path):
    model = zerolite.shard(net(torch.float32), stage=1, units=Block)
    optimizer = zerolite.AdamW(model.parameters(), lr=torch.tensor(0.25))
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    zerolite.save(model, tmp_path / "checkpoint", optimizer)
    other = zerolite.shard(net(torch.float32), stage=1, units=Block)
    resumed = zerolite.AdamW(other.parameters(), lr=1.0)
    zerolite.load(other, tmp_path / "checkpoint", resumed)
    assert resumed.param_groups[0]["lr"] == 0.25
