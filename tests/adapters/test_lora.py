"""LoRA, rsLoRA and DoRA on models: PEFT's logits and gradients, and which layers are meant."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_models import (
    FAMILIES,
    VARIANTS,
    adapted,
    base,
    draw,
    gradients,
    logits_of,
    peft_name,
    peft_twin,
    relative,
    targets_of,
    weigh,
)
from models import assert_close, assert_same_bits, drawn, part
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import zerolite
from zerolite.adapters import layers, targets
from zerolite.adapters.layers import LoraLayer
from zerolite.adapters.lora import add_lora, compute_initial_values, layers_of
from zerolite.adapters.presets import PRESETS, parameter_groups
from zerolite.adapters.state import adapters_of, disabled, use

peft = pytest.importorskip("peft", reason="adapters are compared with PEFT: pip install peft")


# Against PEFT


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(family, variant):
    """In fp64 a whole model with the default targets computes, forward and backward, what PEFT's does."""
    model = adapted(family, **VARIANTS[variant]).train()
    twin = peft_twin(family, model, **VARIANTS[variant])
    actual, expected = logits_of(model), logits_of(twin)
    assert relative(actual, expected) < 1e-13 and relative(actual, logits_of(base(family))) > 1e-2
    theirs = gradients(twin, weigh(expected))
    for key, gradient in gradients(model, weigh(actual)).items():
        assert relative(gradient, theirs[peft_name(key)]) < 1e-13, key


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OwnForward(nn.Linear):
    """Falcon's linear layer, for one, has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def linear(width: int, out: int) -> nn.Module:
    return nn.Linear(width, out)


def conv1d(width: int, out: int) -> nn.Module:
    return Conv1D(out, width)


def own_forward(width: int, out: int) -> nn.Module:
    return OwnForward(width, out)


def one(make, dtype: torch.dtype, r: int = 5, dropout: float = 0.0, **options) -> tuple[nn.Module, nn.Module]:
    """(ours, PEFT's) of one layer of 41 to 9 features, with the same values, in training."""
    plain = drawn(lambda: One(make(41, 9))).to(dtype)
    model = add_lora(copy.deepcopy(plain), r, 7, dropout, targets=("layer",), **options)
    draw(model)
    config = peft.LoraConfig(r=r, lora_alpha=7, lora_dropout=dropout, target_modules=["layer"], **options)
    twin = peft.get_peft_model(copy.deepcopy(plain), config, autocast_adapter_dtype=False)
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for key, parameter in adapters_of(model).by_name["default"].parameters.items():
            theirs[peft_name(key)].copy_(parameter)
    return model.train(), twin.train()


def compare(model: nn.Module, twin: nn.Module, tolerance: float, dtype: torch.dtype, skip=(), seed: int = 0) -> None:
    x = torch.randn(3, 11, 41, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(seed)
    actual = model(ours)
    torch.manual_seed(seed)
    expected = twin(theirs)
    assert actual.dtype == expected.dtype and relative(actual, expected) < tolerance
    weigh(actual).backward()
    weigh(expected).backward()
    assert relative(ours.grad, theirs.grad) < tolerance
    parameters = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        if ".lora." in key and key not in skip:
            assert relative(parameter.grad, parameters[peft_name(key)].grad) < tolerance, key


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [linear, conv1d])
def test_one_layer_is_that_of_peft_to_rounding_in_fp32(make, variant):
    """Output and every gradient within 1e-6 of PEFT's, sizes 41 and 9, rank 5."""
    compare(*one(make, torch.float32, **VARIANTS[variant]), 1e-6, torch.float32)


@pytest.mark.parametrize("make", [linear, conv1d, own_forward])
def test_dora_with_dropout_is_that_of_peft(make):
    """PEFT's DoRA drops the input of W too, but for the first term; the same masks come of the same seed."""
    model, twin = one(make, torch.float64, dropout=0.4, use_dora=True)
    compare(model, twin, 1e-13, torch.float64)


@pytest.mark.parametrize("what", ["own forward", "rank 300", "base trains"])
def test_layers_that_the_kernels_do_not_serve_are_those_of_peft(what, monkeypatch):
    """A forward of the layer's own, a rank above the kernels' and a base that trains go another way to the same."""
    monkeypatch.setattr(layers, "lora_linears", None)
    make, r = own_forward if what == "own forward" else linear, 300 if what == "rank 300" else 5
    model, twin = one(make, torch.float64, r, 0.3)
    if what == "base trains":
        model.layer.weight.requires_grad_(True)
        twin.base_model.model.layer.base_layer.weight.requires_grad_(True)
    compare(model, twin, 1e-13, torch.float64)
    if what == "base trains":
        expected = twin.base_model.model.layer.base_layer.weight.grad
        assert relative(model.layer.weight.grad, expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bit_layers_are_as_close_to_fp64_as_peft(variant, dtype):
    """The error of the output against fp64 is at most 1.2 times PEFT's in the same dtype."""
    model, twin = one(linear, dtype, **VARIANTS[variant])
    truth = copy.deepcopy(model).double()
    x = torch.randn(64, 41, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = truth(x.double())
    assert model(x).dtype == dtype
    assert relative(model(x), expected) <= 1.2 * relative(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_new_adapter_changes_no_bit(family, variant, dtype):
    """With B = 0 the logits are the base's, DoRA's too, where Q, K and V have a bias as where they have none."""
    model = add_lora(base(family, dtype), dropout=0.0, **VARIANTS[variant])
    assert torch.equal(logits_of(model), logits_of(base(family, dtype)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_is_that_of_peft(variant):
    """An fp32 model under autocast computes in bf16 and gives bf16, within bf16's rounding of PEFT."""
    model, twin = one(linear, torch.float32, **VARIANTS[variant])
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, twin, 2e-2, torch.float32)


# Which layers


def names_of(model: nn.Module) -> set[str]:
    return set(layers_of(model, "default"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_means_q_k_v_or_the_fused_projection(family):
    expected = {name for name, _ in base(family).named_modules() if name.endswith(tuple(targets_of(family)))}
    assert names_of(add_lora(base(family))) == expected and len(expected) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_what_it_means_in_peft(family):
    """Every linear layer but the output head; the file's short names mean the same layers."""
    model = add_lora(base(family), targets="all-linear")
    twin = peft.get_peft_model(base(family), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {name for name, module in twin.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    theirs = {name.removeprefix("base_model.model.") for name in theirs}
    assert names_of(model) == theirs
    short = adapters_of(model).by_name["default"].config.targets
    assert all("." not in name for name in short) and set(targets.find(base(family), short)[1]) == theirs


PARTS = st.sampled_from(["q_proj", "k_proj", "proj", "layers", "0", "1", "self_attn", "mlp", "q", "a_q_proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(NAMES, st.lists(NAMES, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_names_match_as_in_peft(name, chosen):
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=chosen)
    assert targets.matches(name, tuple(chosen)) == bool(check_target_module_exists(config, name))


PIECES = st.sampled_from([".*", r"\.", "q_proj", "[kq]_proj", r"\d", "layers", "(self_attn|mlp)"])
PATTERNS = st.lists(PIECES, min_size=1, max_size=6)


@given(NAMES, PATTERNS.map("".join))
@settings(max_examples=200, deadline=None)
def test_a_string_matches_as_in_peft(name, pattern):
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=pattern)
    assert targets.matches(name, pattern) == bool(check_target_module_exists(config, name))


def test_a_regular_expression_chooses_layers():
    model = add_lora(base("llama"), targets=r"model\.layers\.1\..*(q|down)_proj")
    assert names_of(model) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize(
    "chosen, text",
    [
        (("q_porj", "v_proj"), r"targets q_porj match no module: .* q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (r".*nothing", r"match no module"),
        (("self_attn",), r"self_attn, which is of class LlamaAttention"),
        (("embed_tokens",), r"embed_tokens, which is of class Embedding"),
        ((), r"takes names of layers"),
    ],
)
def test_targets_that_mean_nothing_are_refused(chosen, text):
    model = base("llama")
    with pytest.raises(ValueError, match=text):
        add_lora(model, targets=chosen)
    assert not hasattr(model, "_zerolite_adapters") and all(p.requires_grad for p in model.parameters())


def test_layers_that_would_pass_the_adapter_over_are_refused():
    """A forward on the instance and MultiheadAttention's output layer never call the adapted forward."""
    model = base("llama")
    model.model.layers[0].self_attn.q_proj.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has a forward of its own on the instance"):
        add_lora(model)
    with pytest.raises(ValueError, match="reads its weight directly"):
        add_lora(One(nn.MultiheadAttention(8, 2)), targets=("out_proj",))
    with pytest.raises(ValueError, match="no plain weight matrix"):
        layer = nn.Linear(4, 4).requires_grad_(False)
        layer.weight.data = layer.weight.data.to(torch.int8)
        add_lora(One(layer), targets=("layer",))


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"r": 2.0}, {"r": True}, {"dropout": 1.0}, {"dropout": -0.1}, {"alpha": float("nan")}]
)
def test_values_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="|".join(options)):
        add_lora(base("llama"), **options)


@pytest.mark.parametrize("name", ["two words", "keys"])
def test_names_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match="adapter"):
        add_lora(base("llama"), name=name)


# Checkpointing, copies, several adapters


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"targets": "all-linear"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_changes_no_bit(family, options, use_reentrant):
    """Logits and gradients with dropout: the recomputation draws the same masks."""
    results = []
    for checkpointing in (False, True):
        model = adapted(family, torch.float32, dropout=0.3, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(7)
        logits = logits_of(model)
        weigh(logits).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"logits": logits})
    assert_same_bits(*results)


def test_names_and_classes_of_the_base_stay():
    """Base checkpoints go on loading, layers are still linear layers, and the base is frozen."""
    plain, model = base("llama"), adapted("llama")
    names = dict(plain.named_parameters())
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".lora.default." in name for name in missing)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(names)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear) and isinstance(layer, LoraLayer) and "r=4" in repr(layer)
    assert type(layer) is type(model.model.layers[1].self_attn.v_proj)


def test_a_deep_copy_is_a_model_of_its_own():
    """It computes the same, shares no parameter, reads its own inputs once, and is switched on its own."""
    model = adapted("llama")
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    layer = twin.model.layers[0].self_attn.k_proj
    together = layer.lora["default"].together
    assert together.layers[1] is layer and layer.adapters is adapters_of(twin) is not adapters_of(model)
    assert set(map(id, adapters_of(twin).by_name["default"].parameters.values())) <= set(map(id, twin.parameters()))
    with disabled(twin):
        assert torch.equal(logits_of(twin), logits_of(base("llama")))
        assert not torch.equal(logits_of(model), logits_of(base("llama")))


def test_two_adapters_are_chosen_by_name():
    """Each gives what it gives alone; the newest trains; switched off, the base is what it was."""
    model = adapted("llama", seed=1)
    torch.manual_seed(2)
    add_lora(model, r=2, alpha=3, dropout=0.0, targets="all-linear", name="second")
    draw(model, "second", seed=2)
    second = adapted("llama", seed=2, r=2, alpha=3, targets="all-linear")
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())
    assert torch.equal(logits_of(model), logits_of(second))
    use(model, "default")
    assert torch.equal(logits_of(model), logits_of(adapted("llama", seed=1)))
    with disabled(model):
        assert torch.equal(logits_of(model), logits_of(base("llama")))
    with pytest.raises(ValueError, match="'default' already"):
        add_lora(model)
    with pytest.raises(ValueError, match="no adapter 'third'"):
        use(model, "third")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_base_without_values_gets_adapters_on_the_cpu(variant):
    """On meta, A is drawn and B zero; DoRA's magnitude is NaN until the base has values, then the norms of its rows."""
    from zerolite.engine.meta_init import parameters_on_meta

    model = add_lora(parameters_on_meta(FAMILIES["llama"]), r=4, dropout=0.0, **VARIANTS[variant])
    parameters = adapters_of(model).by_name["default"].parameters
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters.values())
    filled = base("llama", torch.float32).state_dict()
    model.load_state_dict(filled, strict=False, assign=True)
    for name, parameter in parameters.items():
        assert parameter.isnan().all() if name.endswith("magnitude") else parameter.isfinite().all()
    compute_initial_values(model)
    compute_initial_values(model)  # nothing is left to do
    for name, parameter in parameters.items():
        if name.endswith("magnitude"):
            weight = filled[name.replace("lora.default.magnitude", "weight")]
            torch.testing.assert_close(parameter.data, weight.norm(dim=1))
    torch.testing.assert_close(logits_of(model.eval()), logits_of(base("llama", torch.float32)))


# Groups and presets


def test_loraplus_groups():
    """LoRA+: every lora_B in a group of its own at a multiple of the rate, as PEFT's optimizer has it."""
    from peft.optimizers import create_loraplus_optimizer

    model = adapted("llama")
    rest, Bs = parameter_groups(model, lr=1e-3, loraplus_ratio=16, weight_decay=0.1)
    twin = peft_twin("llama", model)
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.1)
    counts = {lr: sum(len(g["params"]) for g in theirs.param_groups if g["lr"] == lr) for lr in (1e-3, 16e-3)}
    assert (rest["lr"], Bs["lr"]) == (1e-3, 16e-3) and {rest["weight_decay"], Bs["weight_decay"]} == {0.1}
    assert {1e-3: len(rest["params"]), 16e-3: len(Bs["params"])} == counts
    assert all(p.shape[1] == 4 for p in Bs["params"])
    (whole,) = parameter_groups(model, lr=1e-3)
    assert len(whole["params"]) == len(rest["params"]) + len(Bs["params"])
    with pytest.raises(ValueError, match="no lora_B"):
        parameter_groups(base("llama"), lr=1e-3, loraplus_ratio=16)
    with pytest.raises(ValueError, match="nothing trains"):
        parameter_groups(base("llama").requires_grad_(False), lr=1e-3)


def test_every_method_has_a_preset():
    assert set(PRESETS) == {"full", "lora", "prompt", "prefix", "p-tuning", "p-tuning-v2"}
    assert all(0 < preset.learning_rate < 0.1 for preset in PRESETS.values())


# Sharded

ROWS = 4


def steps_of(model: nn.Module, optimizer, rank: int, world: int, steps: int = 3) -> None:
    """Training on the joint batch; the loss is a sum, so that the mean over ranks is the joint one over the world."""
    for step in range(steps):
        ids = torch.randint(3, 64, (ROWS, 9), generator=torch.Generator().manual_seed(step))
        ids = part({"input_ids": ids}, rank, world)["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits.double()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") * world / 16
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_on_rank(family: str, options: dict, stage: int, checkpointing: bool):
    import torch.distributed as dist

    model = adapted(family, **options).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kind = nn.Linear if options.get("name") == "linear_units" else None
    model = zerolite.shard(model, stage, precision=zerolite.Precision(torch.float64, torch.float64), units=kind)
    optimizer = zerolite.AdamW(parameter_groups(model, lr=1e-2, loraplus_ratio=4))
    steps_of(model, optimizer, dist.get_rank(), dist.get_world_size())
    with zerolite.full_params(model):
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return parameters, logits_of(model.eval()).detach()


@pytest.mark.each
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "family, options, checkpointing",
    [
        ("llama", {}, False),
        ("llama", {"use_dora": True, "targets": "all-linear"}, True),
        ("gpt2", {"use_rslora": True}, False),
        ("llama", {"name": "linear_units"}, False),
    ],
    ids=["lora", "dora-all-checkpointed", "rslora-gpt2", "units-are-linear-layers"],
)
def test_two_ranks_train_as_one_process(ranks, family, options, checkpointing, stage):
    """At every stage adapters after three steps are those of one process with torch's AdamW; the base is untouched."""
    model = adapted(family, **options).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, loraplus_ratio=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps_of(model, optimizer, 0, 1)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert all(torch.equal(value, before[name]) == (".lora." not in name) for name, value in expected.items())
    for parameters, logits in ranks(2).run(train_on_rank, family, options, stage, checkpointing):
        assert_close(parameters, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(logits, logits_of(model.eval()), rtol=1e-6, atol=1e-7)
