"""Virtual tokens act as PEFT's do, with and without a cache and checkpointing, start where they claim to, and train."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, assert_close, assert_same_bits, part
from peft_twins import (
    CASES,
    FAMILIES,
    KINDS,
    TOKENS,
    base,
    batch,
    difference,
    moved_right,
    of_tokens,
    ours,
    pairs,
    peft_twin,
    right_padded,
)

from zerolite.adapters.prefix import PREFIX, cache_keyword
from zerolite.adapters.prompts import add_prompt, compute_initial_values
from zerolite.adapters.state import disabled, use

DEEP = ("prefix", "prefix-mlp", "p-tuning-v2")
TEXT = [5, 6, 7, 8, 9]


def checkpointed(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 has another name for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.prompts.named_parameters()}


# Against PEFT #


@pytest.mark.parametrize(
    ("family", "case", "attention"),
    [
        *((*case, "sdpa") for case in CASES),
        *((family, kind, "eager") for family in FAMILIES for kind in ("prompt", "prefix")),
    ],
)
def test_logits_losses_and_gradients_are_those_of_peft(family, case, attention):
    """One forward and backward on padded rows gives PEFT's logits and loss, and its gradient of every parameter.

    PEFT is given the padding on the right: on the left it counts padding into the positions, here nothing does.
    """
    pytest.importorskip("peft")
    model = base(family, attention)
    adapted = ours(model, case)
    twin = peft_twin(model, adapted, case)
    for inputs in (batch(), right_padded(batch())):
        there = moved_right(inputs) if inputs["attention_mask"][-1, 0] == 0 else inputs
        output, expected = adapted(**inputs), twin(**there)
        logits = of_tokens(output.logits, inputs["attention_mask"])
        assert difference(logits, of_tokens(expected.logits, there["attention_mask"])) <= 1e-6
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
        output.loss.backward()
        expected.loss.backward()
    for theirs, mine in pairs(twin, adapted):
        assert mine.grad.abs().max() > 0
        assert difference(mine.grad, theirs.grad) <= 2e-6
    frozen = [name for name, p in adapted.named_parameters() if p.grad is not None and not name.startswith("prompts.")]
    assert not frozen


@pytest.mark.parametrize(("family", "case"), CASES)
def test_generate_gives_the_tokens_of_peft(family, case):
    """Greedy tokens after left-padded rows are PEFT's after each row alone, with a cache and without one."""
    pytest.importorskip("peft")
    model = base(family)
    adapted = ours(model, case)
    twin = peft_twin(model, adapted, case)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = torch.cat(
        [alone(twin, case, how, row[mask == 1][None]) for row, mask in zip(*inputs.values(), strict=True)]
    )
    answers = [adapted.generate(**inputs, **how, use_cache=use_cache)[:, 7:] for use_cache in (True, False)]
    assert torch.equal(answers[0], expected) and torch.equal(answers[1], expected)
    with disabled(adapted):
        assert torch.equal(adapted.generate(**inputs, **how), model.generate(**inputs, **how))


@torch.no_grad()
def alone(twin, case, how, input_ids):
    """Six greedy tokens after one row, by forwards."""
    ids = input_ids
    for _ in range(6):
        ids = torch.cat([ids, twin(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    # PEFT 0.21 hands its cache over as past_key_values, which generate of transformers 5.24 does not look at.
    if cache_keyword(type(twin.get_base_model()).forward) == "past_key_values":
        assert torch.equal(twin.generate(input_ids=input_ids, **how), ids)
    elif case not in DEEP:
        assert torch.equal(twin.generate(input_ids=input_ids, **how, use_cache=False), ids)
    return ids[:, -6:]


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_beams_are_those_of_a_model_without_a_cache(case):
    """Beam search, which reorders the cache with the virtual tokens in it, ends the same without a cache."""
    adapted = ours(base("llama"), case)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    how = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(adapted.generate(**inputs, **how), adapted.generate(**inputs, **how, use_cache=False))


# Within the model's forward #


@pytest.mark.parametrize(("family", "case"), CASES)
def test_activation_checkpointing_changes_no_bit(family, case):
    """Outputs and gradients are the same bits with activation checkpointing, attention dropout included."""
    model = base(family, "eager")
    model.config.attention_dropout = 0.2
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    results = []
    for prepare in (lambda model: model.train(), checkpointed):
        adapted = prepare(ours(model, case))
        torch.manual_seed(3)
        # Two forwards before the backward: a recomputation must find the virtual tokens of its own.
        outputs = [adapted(**inputs, use_cache=False) for inputs in (batch(), right_padded(batch()))]
        (outputs[0].loss + 2 * outputs[1].loss).backward()
        results.append({"logits": outputs[0].logits, "loss": outputs[1].loss, **gradients(adapted)})
    assert_same_bits(*results)


@pytest.mark.parametrize("case", ["prompt", "prefix", "prefix-mlp"])
def test_a_cache_while_training_changes_no_bit(case):
    """use_cache=True and use_cache=False give the same bits, gradients included."""
    results = []
    for use_cache in (True, False):
        adapted = ours(base("llama"), case).train()
        output = adapted(**batch(), use_cache=use_cache)
        output.loss.backward()
        results.append({"logits": output.logits, **gradients(adapted)})
    assert_same_bits(*results)


def test_nothing_says_that_a_checkpointed_prefix_is_dropped(monkeypatch):
    """transformers logs that checkpointing drops the cache; for a prefix, which arrives, it says nothing."""
    from transformers import modeling_layers

    said = []
    monkeypatch.setattr(modeling_layers.logger, "warning_once", said.append)
    checkpointed(ours(base("llama"), "prefix"))(**batch(), use_cache=False)
    assert not said


def test_reentrant_checkpointing_of_a_prefix_is_refused():
    """Reentrant checkpointing would give a prefix no gradient: an error says what to call."""
    adapted = ours(base("llama"), "prefix").train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        adapted(**batch())


def test_a_prefix_that_does_not_arrive_is_an_error():
    """Where layers hand no keyword on to attention, checkpointing would lose the prefix: an error names the layers."""
    adapted = checkpointed(ours(base("llama"), "prefix"))
    for layer in adapted.model.layers[1:]:
        layer.register_forward_pre_hook(without_prefix, with_kwargs=True)
        layer.self_attn.register_forward_pre_hook(without_prefix, with_kwargs=True, prepend=True)
    with pytest.raises(ValueError, match=r"layers \[1, 2\]"):
        adapted(batch()["input_ids"][:, :1])  # of one token, so that no mask would tell of the missing keys


def without_prefix(module, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name not in (PREFIX, "cache", "past_key_values")}


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_token_by_token_with_a_cache_is_the_whole_forward(case):
    """Logits of a row fed one token at a time through the returned cache are those of the row fed at once."""
    adapted = ours(base("qwen2"), case)
    input_ids = batch()["input_ids"][:1]
    keyword = cache_keyword(type(adapted).forward)
    expected = adapted(input_ids=input_ids, use_cache=False).logits
    output = adapted(input_ids=input_ids[:, :3], use_cache=True)
    logits = [output.logits]
    for position in range(3, input_ids.shape[1]):
        cached = {keyword: output[keyword]}
        output = adapted(input_ids=input_ids[:, position : position + 1], use_cache=True, **cached)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_logits_to_keep_counts_from_the_end_or_names_real_tokens(case):
    """The last n logits are the last n of all, and positions are those of real tokens."""
    adapted = ours(base("llama"), case)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    every = adapted(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
    torch.testing.assert_close(adapted(**inputs, logits_to_keep=3).logits, every[:, -3:])
    torch.testing.assert_close(adapted(**inputs, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])


@pytest.mark.parametrize("case", KINDS)
def test_inputs_embeds_and_positional_arguments(case):
    """Embeddings, or token ids given by position, give what token ids given by name do."""
    adapted = ours(base("gpt2"), case)
    input_ids = batch()["input_ids"]
    expected = adapted(input_ids=input_ids).logits
    assert torch.equal(adapted(inputs_embeds=adapted.get_input_embeddings()(input_ids)).logits, expected)
    assert torch.equal(adapted(input_ids).logits, expected)


@pytest.mark.parametrize("case", ["prompt", "p-tuning-lstm", "prefix", "prefix-mlp"])
def test_half_precision_base(case):
    """Under a bf16 base virtual tokens stay fp32, get finite gradients and agree with the fp32 model's logits."""
    model = base("llama")
    expected = ours(model, case)(**batch()).logits
    for adapted in (ours(model.bfloat16(), case), checkpointed(ours(model.bfloat16(), case))):
        output = adapted(**batch())
        output.loss.backward()
        assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in adapted.prompts.parameters())
        assert difference(output.logits.float(), expected) < 0.1
        if case != "p-tuning-lstm":  # for which oneDNN has no bf16 kernel on every CPU
            with torch.autocast("cpu", torch.bfloat16):
                adapted(**batch()).loss.backward()


# Several adapters #


def test_switched_off_used_and_copied():
    """`disabled` is the base bit by bit, `use` brings each adapter's logits back, a deep copy has tokens of its own."""
    model = base("llama")
    adapted = ours(model, "prompt")
    inputs = batch()
    first = adapted(**inputs).logits
    add_prompt(adapted, "prefix", 3, init="random", name="second")
    assert not any(parameter.requires_grad for parameter in adapted.prompts["default"].parameters())
    second = adapted(**inputs).logits
    assert second.shape[1] == first.shape[1] - TOKENS
    with disabled(adapted):
        assert torch.equal(adapted(**inputs).logits, model(**inputs).logits)
    use(adapted, "default")
    assert torch.equal(adapted(**inputs).logits, first)
    twin = copy.deepcopy(adapted)
    use(adapted, "second")
    with torch.no_grad():
        twin.prompts["default"].embedding.zero_()
    assert torch.equal(adapted(**inputs).logits, second)
    assert twin(**inputs).logits.shape == first.shape
    assert not torch.equal(twin(**inputs).logits, first)
    use(adapted, "default")
    assert torch.equal(adapted(**inputs).logits, first)


# Initial values #


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning-v2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_text_is_the_model_after_that_text(family, kind):
    """Virtual tokens from a text give the logits that the plain model gives after the text itself."""
    model = base(family)
    adapted = add_prompt(copy.deepcopy(model), kind, len(TEXT), text_ids=TEXT)
    input_ids = batch()["input_ids"]
    rows, length = input_ids.shape
    expected = model(torch.cat([torch.tensor(TEXT).expand(rows, -1), input_ids], dim=1)).logits[:, -length:]
    assert difference(adapted(input_ids).logits[:, -length:], expected) <= 2e-6


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 9), text=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
def test_a_text_is_repeated_or_cut(tokens, text):
    """Virtual token i starts from the embedding of the text's token i modulo its length."""
    adapted = add_prompt(base("gpt2"), "prompt", tokens, text_ids=text)
    rows = [text[index % len(text)] for index in range(tokens)]
    assert torch.equal(adapted.prompts["default"].embedding, adapted.get_input_embeddings().weight[rows])


def test_other_initial_values():
    """Vocabulary rows are rows of the embedding, a prefix from the vocabulary is no noise, zeros are zeros."""
    model = base("llama")

    def tokens(kind, **options):
        return add_prompt(copy.deepcopy(model), kind, 11, **options).prompts["default"]

    torch.manual_seed(4)
    prompt = tokens("prompt").embedding
    weight = model.get_input_embeddings().weight
    ids = [int((weight == row).all(dim=1).nonzero()) for row in prompt]
    assert len(set(ids)) > 3
    torch.manual_seed(4)
    prefix = tokens("prefix")
    assert torch.equal(prefix.embedding, tokens("p-tuning-v2", text_ids=ids).embedding)
    model.config.attention_dropout = 0.5
    for layer in model.train().model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(prefix.embedding, tokens("prefix", text_ids=ids).embedding)  # computed without dropout
    assert tokens("prefix", init="zeros")().abs().max() == 0
    assert tokens("prefix", encoder="mlp", encoder_hidden=9)().abs().max() == 0
    assert tokens("prefix", encoder="mlp", init="random")().abs().max() > 0
    assert 0.5 < tokens("p-tuning").embedding.std() < 1.5


@pytest.mark.parametrize("options", [{}, {"text_ids": TEXT}], ids=["vocabulary", "text"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_values_postponed_on_meta_are_those_given_at_once(kind, options):
    """Added on the meta device and settled once the weights are there, virtual tokens are the same bits."""
    from zerolite.engine.meta_init import parameters_on_meta

    model = base("llama").train()
    torch.manual_seed(4)
    expected = add_prompt(copy.deepcopy(model), kind, TOKENS, **options)
    late = parameters_on_meta(FAMILIES["llama"])
    torch.manual_seed(4)
    add_prompt(late, kind, TOKENS, **options)
    assert not any(parameter.is_meta for parameter in late.prompts.parameters())
    weights = model.state_dict()
    for name, parameter in late.named_parameters():
        if parameter.is_meta:
            filled = torch.nn.Parameter(weights[name], requires_grad=False)
            torch.utils.swap_tensors(parameter, filled)
    with pytest.raises(ValueError, match=r"zerolite\.shard\(model\) compute them"):
        late(**batch())
    compute_initial_values(late.train())
    assert all(module.training for module in late.modules())
    assert_same_bits(dict(late.prompts.named_parameters()), dict(expected.prompts.named_parameters()))
    assert torch.equal(late(**batch()).logits, expected(**batch()).logits)


# Training #


@pytest.mark.parametrize("case", KINDS)
def test_twenty_steps_lower_the_loss(case):
    """From their default initial values and with checkpointing, all kinds learn a small batch."""
    kind, encoder = KINDS[case]
    torch.manual_seed(0)
    adapted = checkpointed(add_prompt(base("llama"), kind, TOKENS, encoder=encoder))
    optimizer = torch.optim.AdamW(adapted.prompts.parameters(), lr=3e-2, weight_decay=0)
    losses = []
    for _ in range(20):
        loss = adapted(**batch(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


STEPS = 3


def sharded(case: str, stage: int):
    import torch.distributed as dist

    import zerolite

    torch.manual_seed(dist.get_rank())  # rank 0's values count
    model = zerolite.shard(checkpointed(ours(base("llama").double(), case)), stage=stage)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = zerolite.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    for _ in range(STEPS):
        summed_loss(model, part(wide_batch(), dist.get_rank(), dist.get_world_size())).backward()
        optimizer.step()
        optimizer.zero_grad()
    with zerolite.full_params(model):
        return {name: parameter.detach().clone() for name, parameter in model.prompts.named_parameters()}


def wide_batch():
    inputs = batch(rows=4)
    inputs.pop("labels")
    return inputs


def summed_loss(model, inputs):
    length = inputs["input_ids"].shape[1]
    logits = model(**inputs, use_cache=False, logits_to_keep=length).logits.double()
    targets = inputs["input_ids"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") * 2.0**-4


@cache
def on_one_process(case: str):
    model = checkpointed(ours(base("llama").double(), case))
    optimizer = torch.optim.AdamW(model.prompts.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(STEPS):
        for rank in range(2):
            summed_loss(model, part(wide_batch(), rank, 2)).backward()
        for parameter in model.prompts.parameters():
            parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.prompts.named_parameters()}


@pytest.mark.each
@pytest.mark.parametrize("case", ["prompt", "p-tuning-lstm", "prefix", "prefix-mlp"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sharded_training_ends_where_one_process_does(ranks, case, stage):
    """Three steps on two ranks, with checkpointing, end at plain torch's virtual tokens at every stage."""
    results = ranks(2).run(sharded, case, stage)
    assert_same_bits(*results)
    assert_close(results[0], on_one_process(case), rtol=1e-6, atol=1e-9)


def loaded(folder: str, kind: str, stage: int, text_ids):
    import torch.distributed as dist

    import zerolite

    torch.manual_seed(4 + dist.get_rank())  # rank 0's draws count
    model = zerolite.load_pretrained(
        folder, stage, adapt=lambda model: add_prompt(model, kind, TOKENS, text_ids=text_ids)
    )
    logits = model(**batch()).logits
    with zerolite.full_params(model):
        return logits, model.prompts["default"].embedding.detach().clone()


@pytest.mark.parametrize("text_ids", [None, TEXT], ids=["vocabulary", "text"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("stage", [0, 3])
def test_values_of_a_model_loaded_into_shards_are_those_of_the_whole_one(ranks, stage, kind, text_ids, tmp_path):
    """Added by load_pretrained on two ranks, virtual tokens and logits are bit by bit those of one process."""
    model = base("llama")
    model.save_pretrained(tmp_path)
    torch.manual_seed(4)
    add_prompt(model, kind, TOKENS, text_ids=text_ids)
    for logits, embedding in ranks(2).run(loaded, str(tmp_path), kind, stage, text_ids):
        assert torch.equal(embedding, model.prompts["default"].embedding)
        assert torch.equal(logits, model(**batch()).logits)


# Refusals #


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "soft"}, "'soft'"),
        ({"tokens": 0}, "tokens="),
        ({"encoder": "mlp"}, "encoder="),
        ({"kind": "p-tuning-v2", "encoder": "mlp"}, "encoder="),
        ({"kind": "prefix", "encoder": "lstm"}, "'lstm'"),
        ({"encoder_hidden": 8}, "encoder_hidden=8"),
        ({"init": "zeros"}, "'zeros'"),
        ({"kind": "p-tuning", "init": "vocabulary"}, "'vocabulary'"),
        ({"kind": "p-tuning", "text_ids": [3]}, "'text'"),
        ({"init": "text"}, "text_ids="),
        ({"text_ids": []}, "text_ids="),
        ({"text_ids": [VOCAB]}, "64"),
    ],
)
def test_arguments_are_refused_by_name(options, text):
    """A wrong or contradictory argument is a ValueError that names it, and leaves the model as it was."""
    model = base("llama")
    with pytest.raises(ValueError, match=text):
        add_prompt(model, **options)
    assert not hasattr(model, "prompts") and all(parameter.requires_grad for parameter in model.parameters())


def test_models_and_inputs_are_refused_by_name():
    """Encoder-decoders, foreign modules, static caches, ready-made masks, packed rows and token types are errors."""
    from models import t5

    with pytest.raises(ValueError, match="encoder-decoder"):
        add_prompt(t5())
    with pytest.raises(TypeError, match="Linear"):
        add_prompt(torch.nn.Linear(2, 2))
    input_ids = batch()["input_ids"]
    for case in ("prompt", "prefix"):
        adapted = ours(base("gpt2"), case)
        with pytest.raises(ValueError, match="static"):
            adapted.generate(input_ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        with pytest.raises(ValueError, match="4-D"):
            adapted(input_ids, attention_mask=torch.ones(3, 1, 7, 7))
        with pytest.raises(ValueError, match="packs"):
            adapted(input_ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), use_cache=False)
    with pytest.raises(ValueError, match="token_type_ids"):
        ours(base("gpt2"), "prompt")(input_ids, token_type_ids=torch.zeros_like(input_ids))
