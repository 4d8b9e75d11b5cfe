"""The loss in the output layer is the loss of transformers, for every way a model treats its logits, at every stage."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

import zerolite
from zerolite import adapters
from zerolite.medqa import loss as loss_module
from zerolite.medqa.batches import collate
from zerolite.medqa.loss import label_loss
from zerolite.medqa.prompts import Example

VOCABULARY = 61
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, pad_token_id=0)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

RETURN_THEIR_HEAD = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, **HEADS),
    "gpt2": lambda: GPT2Config(**GPT2),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=24, num_attention_heads=2, dropout=0.0, word_embed_proj_dim=16),
    "mamba": lambda: MambaConfig(**SIZES),  # returns logits.float()
}
CHANGE_THEIR_LOGITS = {
    "gemma2": lambda: Gemma2Config(**SIZES, **HEADS, head_dim=8, final_logit_softcapping=3.0),
    "cohere": lambda: CohereConfig(**SIZES, **HEADS, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SIZES, **HEADS, logits_scaling=7.0),
}


def built(config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # logits far from 0
    return model.train()


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four rows of several lengths, prompts without labels."""
    torch.manual_seed(seed)
    examples = []
    for length, prompt in (9, 4), (7, 5), (12, 3), (5, 4):
        tokens = torch.randint(1, VOCABULARY, (length,), dtype=torch.int32).numpy()
        labels = tokens.copy()
        labels[:prompt] = -100
        examples.append(Example(tokens, labels))
    return collate(examples, 0)


def expected_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of transformers times its number of labels."""
    return model(**batch, use_cache=False).loss * (batch["labels"][:, 1:] != -100).sum()


def uses_the_head(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    with mock.patch.object(loss_module, "linear_cross_entropy", wraps=loss_module.linear_cross_entropy) as called:
        label_loss(model, batch)
    return called.called


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*RETURN_THEIR_HEAD, *CHANGE_THEIR_LOGITS])
def test_every_family_has_the_loss_and_gradients_of_transformers(name, dtype, rtol):
    """In the output layer where the model returns what that gives, on whole logits where it changes them."""
    model = built({**RETURN_THEIR_HEAD, **CHANGE_THEIR_LOGITS}[name]()).to(dtype)
    batch = batch_of()
    expected = expected_loss(model, batch)
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    assert uses_the_head(model, batch) == (name in RETURN_THEIR_HEAD)
    loss = label_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=10 * rtol, atol=rtol * scale, msg=key)


@pytest.mark.parametrize("name", [*RETURN_THEIR_HEAD, *CHANGE_THEIR_LOGITS])
def test_in_fp64_it_is_exact(name):
    """Against cross-entropy in fp64 of the logits that the model returns; transformers' own is in fp32 always."""
    if name == "mamba":
        pytest.skip("this model returns its logits in fp32")
    model, batch = built({**RETURN_THEIR_HEAD, **CHANGE_THEIR_LOGITS}[name]()).double(), batch_of()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    (gradient,) = torch.autograd.grad(expected, model.get_input_embeddings().weight)
    loss = label_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    (actual,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
    torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


# Models that do other things with their output layer #


class Masks(LlamaForCausalLM):
    """Writes to its logits, as Chameleon does, which cannot be seen from the object returned."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., :3] = -50.0
        return output


class KeepsAll(LlamaForCausalLM):
    """Takes no notice of logits_to_keep."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        return super().forward(*args, **kwargs)


class Flattens(LlamaForCausalLM):
    """Its output layer gets no rows of sequences."""

    def forward(self, input_ids, attention_mask, logits_to_keep, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:].flatten(0, 1))
        return type("Output", (), {"logits": logits.unflatten(0, (len(input_ids), -1))})()


class Adapted(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_adapted_head() -> nn.Module:
    model = built(RETURN_THEIR_HEAD["llama"]())
    model.lm_head.__class__ = Adapted
    return model


def with_hooked_head() -> nn.Module:
    model = built(RETURN_THEIR_HEAD["llama"]())
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def of_class(kind: type) -> nn.Module:
    torch.manual_seed(0)
    return kind(RETURN_THEIR_HEAD["llama"]()).train()


@pytest.mark.parametrize(
    ("make", "in_head"),
    [
        (lambda: of_class(Masks), False),
        (lambda: of_class(KeepsAll), True),
        (lambda: of_class(Flattens), False),
        (with_adapted_head, False),
        (with_hooked_head, False),
    ],
    ids=["masks", "keeps-all", "flattens", "adapted-head", "hooked-head"],
)
def test_other_output_layers(make, in_head):
    """The loss is that of the logits which the model returns, whatever it does to them."""
    model, batch = make(), batch_of()
    length = batch["input_ids"].shape[1]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=length).logits
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert uses_the_head(model, batch) == in_head
    torch.testing.assert_close(label_loss(model, batch), expected)


def test_a_change_of_mind_is_refused():
    """Not a wrong loss: a model that returned its head's result when asked and does not in the call is an error."""
    model, batch = built(RETURN_THEIR_HEAD["llama"]()), batch_of()
    label_loss(model, batch)
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match="something else"):
        label_loss(model, batch)


def test_nothing_of_it_stays_on_the_model():
    """Modes, hooks, the output layer's forward and the random state are as before, after an error as well."""
    model, batch = built(RETURN_THEIR_HEAD["llama"]()), batch_of()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    label_loss(model, batch)
    with mock.patch.object(loss_module, "linear_cross_entropy", side_effect=ArithmeticError):
        with pytest.raises(ArithmeticError):
            label_loss(model, batch)
    assert modes == [module.training for module in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert "forward" not in vars(model.lm_head) and not model._forward_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, VOCABULARY)
    with torch.inference_mode():
        assert not label_loss(built(RETURN_THEIR_HEAD["llama"]()), batch).requires_grad


# Adapters #


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "p-tuning-v2"])
def test_virtual_tokens_come_before_those_of_the_batch(kind):
    """The loss is that of the last positions, and only the adapter has gradients."""
    model, batch = built(RETURN_THEIR_HEAD["llama"]()), batch_of()
    adapters.add_prompt(model, kind, tokens=3)
    length = batch["input_ids"].shape[1]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, -length:]
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert uses_the_head(model, batch)
    loss = label_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert {p.requires_grad for p in model.parameters() if p.grad is None} == {False}
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize(("targets", "in_head"), [(["q_proj"], True), (["lm_head"], False)])
def test_an_adapter_on_the_output_layer_takes_whole_logits(targets, in_head):
    model, batch = built(RETURN_THEIR_HEAD["llama"]()), batch_of()
    assert uses_the_head(model, batch)  # asked before it is adapted
    adapters.add_lora(model, targets=targets, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert uses_the_head(model, batch) == in_head
    torch.testing.assert_close(label_loss(model, batch), expected_loss(model, batch))


# Sharded #


def trained(name: str, stage: int, precision: str, checkpointing: bool, trains: str) -> tuple[list, dict]:
    """On a rank: losses and parameters of four steps, a fifth batch without labels among them."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = built(RETURN_THEIR_HEAD[name]())
    if trains == "all but the head":
        model.get_output_embeddings().requires_grad_(False)
    elif trains == "lora":
        adapters.add_lora(model, r=2, dropout=0.0)
    elif trains == "prompt":
        adapters.add_prompt(model, tokens=3)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = zerolite.shard(model, stage=stage, precision=zerolite.Precision(param=dtype, reduce=torch.float32))
    optimizer = zerolite.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, max_grad_norm=1.0)
    losses = []
    for step in range(4):
        nothing = step == 2 and dist.get_rank() == 1
        loss = label_loss(model, collate([], 0) if nothing else batch_of(2 * step + dist.get_rank()))
        (loss / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        losses.append(label_loss(model, batch_of()).item())
    with zerolite.full_params(model):
        return losses, {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


def trained_plainly(*arguments) -> tuple[list, dict]:
    with mock.patch.object(loss_module, "_linear_head", return_value=None):
        return trained(*arguments)


@pytest.mark.parametrize(
    ("name", "precision", "checkpointing", "trains"),
    [
        ("llama", "fp32", False, "all"),
        ("llama-tied", "fp32", True, "all"),
        ("llama", "bf16", True, "all but the head"),
        ("gpt2", "bf16", False, "all"),
        ("llama-tied", "fp16", False, "all"),
        ("llama", "fp32", True, "lora"),
        ("llama-tied", "bf16", False, "prompt"),
    ],
)
def test_every_stage_gives_the_same_bits(ranks, name, precision, checkpointing, trains):
    """On two ranks, and to rounding what whole logits give."""
    arguments = precision, checkpointing, trains
    plains = ranks(2).run(trained_plainly, name, 2, *arguments)
    whole = ranks(2).run(trained, name, 0, *arguments)
    for plain, ours in zip(plains, whole, strict=True):
        tolerance = 1e-5 if precision == "fp32" else 0.02
        assert ours[0] == pytest.approx(plain[0], rel=tolerance)
    for stage in 1, 2, 3:
        for result, first in zip(ranks(2).run(trained, name, stage, *arguments), whole, strict=True):
            assert result[0] == first[0]
            assert all(torch.equal(value, first[1][key]) for key, value in result[1].items())
