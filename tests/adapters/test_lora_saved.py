"""What LoRA keeps for backward beyond the frozen layers, in bytes of unique storages, beside PEFT."""

from __future__ import annotations

import pytest
import torch
from lora_layers import Layer, layer, peft_layers
from torch import nn

M, K, N, R = 256, 512, 512, 8


def saved_bytes(forward, owned: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps of `forward()`, without those of `owned`."""
    known = {t.untyped_storage().data_ptr() for t in owned}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    assert outputs
    return sum(storage.nbytes() for storage in kept.values())


def with_block(given: Layer, forward):
    """The layers inside a block: their input is a norm's output, as in every model, and no tensor of the caller's."""
    norm = nn.RMSNorm(K, dtype=given.x.dtype).requires_grad_(False)

    def run():
        given_x, given.x = given.x, norm(given.x)
        outputs = forward()
        given.x = given_x
        return outputs

    return run


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 0.3), (torch.bfloat16, 0.2)], ids=["fp32", "bf16"])
def test_q_k_v_save_a_fraction_of_what_peft_saves(dtype, limit):
    """Dropout 0.05; beyond what the same frozen layers save; adapters in fp32, as PEFT makes them, on either base."""
    pytest.importorskip("peft")
    given = layer((M, K), N, R, dtype=dtype, bias=False)
    given.As, given.Bs = ([t.detach().float().requires_grad_() for t in ts] for ts in (given.As, given.Bs))
    owned = [given.x, *given.weights, *given.As, *given.Bs]
    modules = peft_layers(given, dropout=0.05)
    owned += [p for module in modules for p in module.parameters()]
    frozen = saved_bytes(with_block(given, lambda: given.plain_base()), owned)
    ours = saved_bytes(with_block(given, lambda: given.ours(0.05)), owned) - frozen
    theirs = saved_bytes(with_block(given, lambda: [module(given.x) for module in modules]), owned) - frozen
    print(f"{dtype}: ours {ours}, PEFT {theirs}, {ours / theirs:.3f}")
    assert 0 < ours <= limit * theirs


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_what_is_saved_is_what_the_design_says(dropout):
    """x once, S, a bit per element and mask; weights, A and B themselves, not copies."""
    given = layer((M, K), N, R)
    owned = [*given.weights, *given.As, *given.Bs]
    expected = M * K * 4 + 3 * M * R * 4 + (3 * M * K // 8 if dropout else 0)
    assert saved_bytes(lambda: given.ours(dropout), owned) == expected


def test_a_strided_input_is_saved_as_it_is():
    """No copy of a transposed x is kept, nor of transposed weights."""
    given = layer((M, K), N, R)
    given.x = torch.randn(4, M // 4, K).transpose(0, 1).requires_grad_()
    given.weights = [weight.t().contiguous().t() for weight in given.weights]
    owned = [given.x, *given.weights, *given.As, *given.Bs]
    assert saved_bytes(lambda: given.ours(0.0), owned) == 3 * M * R * 4
