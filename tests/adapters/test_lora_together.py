"""Q, K and V of one input are computed together, whatever the calls are, the results are those of separate layers."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from lora_models import (
    adapted,
    draw,
    logits_of,
    peft_name,
    relative,
    token_ids,
    weigh,
)
from models import assert_close, assert_same_bits, build, drawn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from zerolite.adapters import layers
from zerolite.adapters.lora import add_lora, layers_of
from zerolite.adapters.state import adapters_of

peft = pytest.importorskip("peft", reason="adapters are compared with PEFT: pip install peft")


class Attention(nn.Module):
    """Three projections that `how` calls as it likes; no attention, so that each output has its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 4, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor, other: Tensor, how) -> list[Tensor]:
        return how(self, x, other)


def without_gradients(m: Attention, x: Tensor, other: Tensor) -> list[Tensor]:
    with torch.no_grad():
        q = m.q_proj(x)
    return [q, m.k_proj(x), m.v_proj(x)]


def written_to(m: Attention, x: Tensor, other: Tensor) -> list[Tensor]:
    with torch.no_grad():  # autograd itself refuses a backward through what was written to
        x = x * 1
        q = m.q_proj(x)
        x.mul_(2)
        return [q, m.k_proj(x), m.v_proj(x)]


def switched(m: Attention, x: Tensor, other: Tensor) -> list[Tensor]:
    q = m.q_proj(x)
    m.q_proj.adapters.num_disabled += 1
    k = m.k_proj(x)
    m.q_proj.adapters.num_disabled -= 1
    return [q, k, m.v_proj(x)]


def evaluating(m: Attention, x: Tensor, other: Tensor) -> list[Tensor]:
    q = m.q_proj(x)
    m.k_proj.eval()
    k = m.k_proj(x)
    m.k_proj.train()
    return [q, k, m.v_proj(x)]


# how -> (the calls, how often the kernels are called): three projections of one input are one call.
ORDERS = {
    "usual": (lambda m, x, other: [m.q_proj(x), m.k_proj(x), m.v_proj(x)], 1),
    "backwards": (lambda m, x, other: [m.v_proj(x), m.k_proj(x), m.q_proj(x)], 1),
    "twice": (lambda m, x, other: [p(y) for y in (x, other) for p in (m.q_proj, m.k_proj, m.v_proj)], 2),
    "again at once": (lambda m, x, other: [m.q_proj(x), m.q_proj(x), m.k_proj(x), m.v_proj(x)], 2),
    "again": (lambda m, x, other: [m.q_proj(x), m.k_proj(x), m.v_proj(x), m.k_proj(x)], 2),
    "cross": (lambda m, x, other: [m.q_proj(x), m.k_proj(other), m.v_proj(other)], 3),
    "equal, not same": (lambda m, x, other: [m.q_proj(x), m.k_proj(x.clone()), m.v_proj(x)], 2),
    "one": (lambda m, x, other: [m.k_proj(x)], 1),
    "two": (lambda m, x, other: [m.q_proj(x), m.v_proj(x)], 1),
    "without gradients": (without_gradients, None),
    "written to": (written_to, None),
    "switched off": (switched, 1),
    "evaluating": (evaluating, None),
}


def attention(together: bool, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = add_lora(drawn(lambda: nn.Sequential(Attention())).double(), r=3, dropout=dropout)
    draw(model)
    if not together:
        for layer in layers_of(model, "default").values():
            layer.lora["default"].together = None
    return model.train()


def called(model: nn.Module, how) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, other = (torch.randn(7, 6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    outputs = model[0](x, other, how)
    if losses := [weigh(output) for output in outputs if output.requires_grad]:
        sum(losses).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return outputs, grads, torch.zeros(()) if x.grad is None else x.grad


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_read_once_change_no_result(order, monkeypatch):
    """Whatever calls an attention makes, outputs and gradients are those of each layer on its own."""
    how, expected_calls = ORDERS[order]
    calls = []

    def counted(x, *args):
        calls.append(x)
        return real(x, *args)

    real = layers.lora_linears
    monkeypatch.setattr(layers, "lora_linears", counted)
    outputs, grads, dx = called(attention(True), how)
    assert expected_calls in (None, len(calls))
    expected, expected_grads, expected_dx = called(attention(False), how)
    assert len(outputs) == len(expected)
    for actual, output in zip(outputs, expected, strict=True):
        assert actual.requires_grad == output.requires_grad
        torch.testing.assert_close(actual, output, rtol=1e-12, atol=1e-12)
    assert_close(grads, expected_grads, atol=1e-12)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-12)


def test_hooks_of_single_layers_go_on_working():
    """A hook that replaces K's input, one that changes Q's output, and a backward hook."""
    results = []
    for together in (True, False):
        model = attention(together)
        seen = []
        model[0].k_proj.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
        model[0].q_proj.register_forward_hook(lambda m, args, output: output + 1)
        model[0].v_proj.register_full_backward_hook(lambda m, dx, dy, seen=seen: seen.append(dy[0]))
        results.append((called(model, ORDERS["usual"][0]), seen))
    (actual, seen), (expected, expected_seen) = results
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen, expected_seen)
    assert len(seen) == 1


class Leaving(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_held_after_the_forward(raises):
    """Neither the input nor outputs that nobody asked for outlive the module's forward, be it one that raises."""
    model, alive = attention(True), []

    def how(m: Attention, x: Tensor, other: Tensor) -> list[Tensor]:
        m.q_proj(x)
        together = m.q_proj.lora["default"].together
        alive.extend(weakref.ref(output) for output in together.outputs.values())
        assert len(alive) == 2 and all(ref() is not None for ref in alive)
        if raises:
            raise Leaving
        return [x]

    x = torch.randn(7, 6, dtype=torch.float64)
    alive_x = weakref.ref(x)
    try:
        model[0](x, x, how)
    except Leaving:
        pass
    del x
    gc.collect()
    assert alive_x() is None and all(ref() is None for ref in alive)


def test_a_block_reads_its_inputs_once(monkeypatch):
    """LLaMA with all linear layers: Q, K and V in one call, gate and up in one, O and down each in one."""
    widths = []

    def counted(x, weights, *args):
        widths.append(len(weights))
        return real(x, weights, *args)

    real = layers.lora_linears
    monkeypatch.setattr(layers, "lora_linears", counted)
    logits_of(adapted("llama", targets="all-linear"))
    assert widths == [3, 1, 2, 1] * 2


class CheckpointedAttention(GradientCheckpointingLayer, Attention):
    """Recomputed by its forward alone, without the hooks around it."""

    def forward(self, x: Tensor, other: Tensor, how) -> tuple[Tensor, ...]:
        return tuple(how(self, x, other))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_module_that_is_checkpointed_itself(use_reentrant):
    """Its layers draw the same masks when it is recomputed, whoever computes them."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(drawn(lambda: nn.Sequential(CheckpointedAttention())).double(), r=3, dropout=0.5)
        draw(model)
        model.train()[0].gradient_checkpointing = checkpointing
        model[0]._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=use_reentrant)
        torch.manual_seed(1)
        outputs, grads, dx = called(model, ORDERS["usual"][0])
        results.append(grads | {"dx": dx} | dict(zip("qkv", outputs, strict=True)))
    assert_same_bits(*results)


def test_an_encoder_decoder_is_that_of_peft():
    """T5 has q, k and v, and cross-attention, where k and v read another input: no output is computed for nothing."""
    torch.manual_seed(0)
    model = add_lora(build("t5"), r=4, alpha=6, dropout=0.0)
    draw(model)
    assert all(layer.lora["default"].together is None for layer in layers_of(model, "default").values())
    twin = peft.get_peft_model(build("t5"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v"]))
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for key, parameter in adapters_of(model).by_name["default"].parameters.items():
            theirs[peft_name(key)].data = parameter.detach().clone()
        ids = {"input_ids": token_ids(), "decoder_input_ids": token_ids()}
        actual, expected, plain = (m.eval()(**ids).logits for m in (model, twin, build("t5")))
    assert relative(actual, expected) < 1e-13 and relative(actual, plain) > 1e-3


def test_a_layer_called_outside_of_its_module_computes_alone():
    model = attention(True)
    x = torch.randn(7, 6, dtype=torch.float64)
    model[0].q_proj(x)
    assert not model[0].q_proj.lora["default"].together.outputs


def test_masks_are_independent_and_off_in_eval():
    """With dropout, equal projections of one input differ; in eval the adapter is exact."""
    model = attention(True, dropout=0.5)
    q, k = model[0].q_proj, model[0].k_proj
    x = torch.ones(50, 6, dtype=torch.float64)
    with torch.no_grad():
        k.weight.copy_(q.weight[:4]), k.lora["default"].lora_A.copy_(q.lora["default"].lora_A)
        k.lora["default"].lora_B.copy_(q.lora["default"].lora_B[:4])
        q.bias.zero_()
        first, second, _ = model[0](x, x, ORDERS["usual"][0])
        assert not torch.equal(first[:, :4], second)
        model.eval()
        first, second, _ = model[0](x, x, ORDERS["usual"][0])
        torch.testing.assert_close(first[:, :4], second)
        q = model[0].q_proj
        low_rank = q.lora["default"]
        exact = x @ (q.weight + low_rank.scale * low_rank.lora_B @ low_rank.lora_A).T
        torch.testing.assert_close(first, exact)
