"""LoRA in the base's weights: PEFT's merge, one rounding, the reported difference, sharded or not."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_models import (
    FAMILIES,
    VARIANTS,
    adapted,
    base,
    draw,
    logits_of,
    peft_twin,
    relative,
    token_ids,
)  # fmt: skip
from models import Stack, assert_close, assert_same_bits, drawn, llama
from torch import Tensor, nn

import zerolite
from zerolite import ZeroliteError
from zerolite.adapters import layers
from zerolite.adapters.lora import add_lora, compute_initial_values, layers_of
from zerolite.adapters.merge import merge
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import adapters_of, disabled, use


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora." not in name}


@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_those_of_peft(family, variant, targets, monkeypatch):
    """Every weight in fp32, to rounding, though only a few rows are widened at a time; logits stay the adapted ones."""
    pytest.importorskip("peft", reason="merging is compared with PEFT: pip install peft")
    monkeypatch.setattr(layers, "ROWS_NUMEL", 40)
    options = VARIANTS[variant] | ({"targets": targets} if targets != "default" else {})
    model = adapted(family, torch.float32, **options)
    names = {"target_modules": targets} if targets != "default" else {}
    twin = peft_twin(family, model, torch.float32, **VARIANTS[variant], **names).merge_and_unload()
    before = logits_of(model)
    difference = merge(model)
    assert_close(weights(model), {name: p.detach() for name, p in twin.named_parameters()}, rtol=1e-6, atol=3e-7)
    assert 0 < difference < 1e-4 and relative(logits_of(model), before) < 1e-5
    assert relative(logits_of(model), logits_of(base(family, torch.float32))) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bit_weights_are_rounded_once(variant, dtype):
    """They are the nearest to W + scale B A in fp64, with DoRA at least as close to fp64 as PEFT's."""
    pytest.importorskip("peft", reason="merging is compared with PEFT: pip install peft")
    model = adapted("llama", dtype, targets="all-linear", **VARIANTS[variant])
    twin = peft_twin("llama", model, dtype, target_modules="all-linear", **VARIANTS[variant]).merge_and_unload()
    truth, before = copy.deepcopy(model).double(), weights(model)
    merge(truth)
    merge(model)
    theirs = dict(twin.named_parameters())
    for name, value in weights(truth).items():
        mine = (weights(model)[name].double() - value).abs()
        assert mine.norm() <= 1.001 * (theirs[name].double() - value).norm()
        nearest = (value.to(dtype).double() - value).abs()
        summed_in_fp32 = torch.finfo(torch.float32).eps * (before[name].double().abs() + value.abs())
        assert variant == "dora" or (mine <= nearest + 4 * summed_in_fp32).all(), name


def test_the_difference_is_that_of_the_logits():
    """On the batch that is given: the largest difference between the adapted and the merged model, in bf16 not zero."""
    model = adapted("llama", torch.bfloat16).train()
    model.model.layers[0].eval()
    batch = {"input_ids": token_ids()}
    twin = copy.deepcopy(model).eval()
    before = logits_of(twin)
    difference = merge(model, batch=batch)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].mlp.training
    assert difference == (logits_of(model.eval()).float() - before.float()).abs().max().item() > 0


def test_another_adapter_goes_on_after_a_merge():
    """A merged adapter is left out of forwards, and the next one adds to the merged weights."""
    model = adapted("llama")
    add_lora(model, r=2, dropout=0.0, targets=("o_proj",), name="second")
    draw(model, "second")
    with disabled(model):
        merge(model, "default")
    assert adapters_of(model).active == "second"
    merged = adapted("llama")
    merge(merged)
    second = logits_of(model)
    assert relative(second, logits_of(merged)) > 1e-3
    use(model, "default")
    assert torch.equal(logits_of(model), logits_of(merged))
    with disabled(model):
        assert torch.equal(logits_of(model), logits_of(merged))
    use(model, "second")
    merge(model)
    assert relative(logits_of(model), second) < 1e-6
    with pytest.raises(ValueError, match="'second' is merged already"):
        merge(model)


def test_what_cannot_be_merged_is_refused():
    """Prompts, tied weights, values that are not finite, and a model whose inputs nobody knows: nothing is changed."""
    with pytest.raises(ValueError, match="only LoRA is merged"):
        merge(add_prompt(base("llama"), tokens=2))
    tied = add_lora(drawn(lambda: llama(tied=True)), targets=("lm_head",))
    before = weights(tied)
    with pytest.raises(ValueError, match="lm_head.weight is tied"):
        merge(tied)
    assert_same_bits(weights(tied), before)
    model = adapted("llama")
    layers_of(model, "default")["model.layers.1.self_attn.v_proj"].lora["default"].lora_B.data[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(ZeroliteError, match="NaN"):
        merge(model)
    assert_same_bits(weights(model), before)
    stack = add_lora(drawn(Stack), targets="all-linear")
    with pytest.raises(ValueError, match="give batch="):
        merge(stack)
    assert merge(stack, batch={"x": torch.ones(2, 5)}) < 1e-6


# Sharded


def merge_on_rank(folder, stage: int, dtype: torch.dtype, options: dict, how: str):
    offload = {"no": None, "states": "cpu", "parameters": zerolite.Offload(parameters=True)}[how]
    model = adapted("llama", dtype, **options)
    model = zerolite.shard(model, stage, offload=offload)
    if how != "no":  # parameters are on their way back from the workers when the merge begins
        optimizer = zerolite.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
        logits_of(model).float().sum().backward()
        optimizer.step()
    before = logits_of(model).detach()
    difference = merge(model)
    after = logits_of(model).detach()
    zerolite.export(model, folder)
    with zerolite.full_params(model):
        return weights(model), before, after, difference


CASES = [(stage, dtype, "no") for stage in range(4) for dtype in (torch.float64, torch.bfloat16)]
CASES += [(2, torch.bfloat16, "states"), (3, torch.float32, "states")]
CASES += [(3, torch.float32, "parameters"), (3, torch.bfloat16, "parameters")]


@pytest.mark.each
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("stage, dtype, how", CASES)
def test_merging_sharded_models(ranks, tmp_path, stage, dtype, how, variant):
    """On two ranks the weights, and the folder that is exported, are bit for bit those of a merge on one process."""
    from transformers import LlamaForCausalLM

    options = VARIANTS[variant] | {"targets": "all-linear"}
    expected = adapted("llama", dtype, **options)
    merge(expected)
    for parameters, before, after, difference in ranks(2).run(merge_on_rank, tmp_path, stage, dtype, options, how):
        assert_same_bits(parameters, weights(expected))
        torch.testing.assert_close(before, logits_of(adapted("llama", dtype, **options)))
        torch.testing.assert_close(after, logits_of(expected))
        assert difference >= 0 and (dtype != torch.bfloat16 or difference > 0)
    opened = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_bits(dict(opened.named_parameters()), weights(expected))


def load_with_dora(folder, stage: int, offload, dtype):
    precision = zerolite.Precision(dtype) if dtype is not None else None
    options = {"stage": stage, "offload": offload, "precision": precision}
    model = zerolite.load_pretrained(folder, adapt=lambda m: add_lora(m, dropout=0.0, use_dora=True), **options)
    compute_initial_values(model)
    adapter = adapters_of(model).by_name["default"]
    masters = [
        b.shard.values().clone() for unit in model._zerolite.units for b in unit.buckets if b.gradients is not None
    ]
    logits = logits_of(model).detach()
    with disabled(model):
        plain = logits_of(model).detach()
    return {name: p.clone() for name, p in adapter.parameters.items()}, masters, logits, plain


@pytest.mark.each
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("offload, dtype", [(None, None), (None, torch.bfloat16), ("cpu", torch.bfloat16)])
def test_doras_magnitudes_are_settled_on_a_sharded_base(ranks, tmp_path, stage, offload, dtype):
    """From a folder straight into shards: magnitudes are the norms of the base's rows, and the model is the base."""
    plain = base("llama", torch.float32)
    plain.save_pretrained(tmp_path)
    plain = plain if dtype is None else plain.to(dtype)
    answers = ranks(2).run(load_with_dora, tmp_path, stage, offload, dtype)
    for parameters, masters, logits, of_base in answers:
        assert_same_bits(parameters, answers[0][0])
        for name, parameter in parameters.items():
            if name.endswith("magnitude"):
                weight = plain.get_parameter(name.replace("lora.default.magnitude", "weight"))
                torch.testing.assert_close(parameter, weight.float().norm(dim=1).to(parameter.dtype))
        assert all(master.isfinite().all() for master in masters)
        assert torch.equal(logits, of_base) and relative(logits, logits_of(plain)) < 1e-1
