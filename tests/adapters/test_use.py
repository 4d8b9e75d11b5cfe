"""`use` says which adapter computes and trains, as PEFT's set_adapter; on a sharded model it cannot unfreeze."""

from __future__ import annotations

import pytest
import torch
from lora_models import base, draw, logits_of, weigh
from models import assert_close, assert_same_bits
from torch import nn

import zerolite
from zerolite.adapters.files import save
from zerolite.adapters.lora import add_lora
from zerolite.adapters.merge import merge
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import adapter_of, use

SECOND = {"targets": ["v_proj", "o_proj"], "r": 2}


def two(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with two drawn adapters; the second is the newest."""
    torch.manual_seed(0)
    model = add_lora(base("llama", dtype), r=4, dropout=0.0)
    add_lora(model, dropout=0.0, name="second", **SECOND)
    draw(model)
    draw(model, "second", seed=2)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weigh(logits_of(model.train())).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def values(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in adapter_of(model, name).parameters.items()}


@pytest.mark.parametrize("names", [["default"], ["default", "second"]])
def test_what_trains_after_switching_is_what_trains_in_peft(names, tmp_path):
    """Steps after each switch, with an optimizer over what requires a gradient then, end at PEFT's values."""
    peft = pytest.importorskip("peft")
    model = two()
    save(model, tmp_path / "default", "default")
    save(model, tmp_path / "second", "second")
    twin = peft.PeftModel.from_pretrained(
        base("llama"), tmp_path / "default", is_trainable=True, autocast_adapter_dtype=False
    )
    twin.load_adapter(str(tmp_path / "second"), "second", is_trainable=True, autocast_adapter_dtype=False)
    twin.set_adapter("second")
    before = {name: values(model, name) for name in ("default", "second")}
    for name in names:
        use(model, name)
        twin.set_adapter(name)
        assert sum(p.numel() for p in trained(model)) == sum(p.numel() for p in trained(twin))
        for some in (model, twin):
            step(some, torch.optim.AdamW(trained(some), lr=1e-2))
    twin.save_pretrained(tmp_path / "theirs", selected_adapters=["default", "second"])
    opened = zerolite.adapters.load(base("llama"), tmp_path / "theirs")
    zerolite.adapters.load(opened, tmp_path / "theirs" / "second", "second")
    for name in ("default", "second"):
        assert_close(values(model, name), values(opened, name), rtol=1e-9, atol=1e-12)
        assert (name in names) == any(
            not torch.equal(value, before[name][key]) for key, value in values(model, name).items()
        )


def test_a_merged_adapter_stays_frozen_and_prompts_are_switched_alike():
    model = two()
    add_prompt(model, "prompt", 3, name="third")
    use(model, "default")
    assert {id(p) for p in trained(model)} == {id(p) for p in adapter_of(model, "default").parameters.values()}
    use(model, "third")
    assert {id(p) for p in trained(model)} == {id(p) for p in model.prompts.parameters()}
    use(model, "default")
    merge(model)
    use(model, "default")
    assert not trained(model)


def on_rank(stage: int):
    model = two(torch.float32)
    use(model, "default")
    zerolite.shard(model, stage)
    optimizer = zerolite.AdamW(trained(model), lr=1e-2)
    frozen = values(model, "second")
    step(model, optimizer)
    once = values(model, "default")
    use(model, "second")
    with torch.no_grad():
        second = logits_of(model.eval())
    with pytest.raises(ValueError, match="'second' was frozen when the model was sharded") as refused:
        logits_of(model.train())
    use(model, "default")
    step(model, optimizer)
    assert_same_bits(values(model, "second"), frozen)
    return once, values(model, "default"), second, str(refused.value)


def test_a_sharded_model_evaluates_what_it_cannot_train(ranks):
    """At stage 3 on two ranks: chosen before `shard` an adapter trains; one that was frozen says so in training."""
    model = two(torch.float32)
    use(model, "second")
    expected = logits_of(model)
    use(model, "default")
    zerolite.shard(model, 0)
    optimizer = zerolite.AdamW(trained(model), lr=1e-2)
    after = []
    for _ in range(2):
        step(model, optimizer)
        after.append(values(model, "default"))
    for once, twice, second, message in ranks(2).run(on_rank, 3):
        assert_same_bits(once, after[0])
        assert_same_bits(twice, after[1])
        assert torch.equal(second, expected) and "use(model, 'second') before zerolite.shard" in message
