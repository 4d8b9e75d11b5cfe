"""Virtual tokens enter every decoder's forward or are refused, and padding changes no token's logits."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import drawn
from peft_twins import FAMILIES, TOKENS, base, batch, difference, of_tokens, ours
from torch import nn

from zerolite.adapters.checks import check_gradients
from zerolite.adapters.files import save
from zerolite.adapters.prompts import add_prompt
from zerolite.api import shard
from zerolite.errors import ZeroliteError

DECODER = {
    "vocab_size": 64, "d_model": 16, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 2,
    "encoder_attention_heads": 2, "decoder_ffn_dim": 24, "encoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "is_encoder_decoder": False,
}  # fmt: skip
OPT = {
    "vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def decoder(family: str, **options) -> nn.Module:
    cls = getattr(transformers, f"{family}ForCausalLM")
    sizes = {**(OPT if family == "OPT" else DECODER), **options}
    return drawn(lambda: cls(cls.config_class(**sizes))).eval()


def llava() -> nn.Module:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text, vocab_size=64),
        image_token_index=63,
    )
    return drawn(lambda: transformers.LlavaForConditionalGeneration(config)).eval()


# The decoder that a model calls #


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["OPT", "Bart", "MBart", "Pegasus", "Blenderbot"])
def test_decoders_inside_of_wrappers_have_pefts_logits(family, kind, tmp_path):
    """Their models call the decoder past their base model. Prefixes next to cross-attention are refused by name."""
    peft = pytest.importorskip("peft")
    model = decoder(family)
    if kind == "prefix" and family != "OPT":
        with pytest.raises(ValueError, match=f"{family}Decoder has 4 attention modules with a cache for 2 layers"):
            add_prompt(model, kind, TOKENS)
        return
    adapted = add_prompt(copy.deepcopy(model), kind, TOKENS, init="random")
    save(adapted, tmp_path)
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    inputs = batch()["input_ids"]
    assert torch.equal(adapted(inputs).logits, twin(input_ids=inputs).logits)
    assert not torch.allclose(adapted(inputs).logits[:, -7:], model(inputs).logits)
    adapted(inputs).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.prompts.parameters())


def test_a_vision_language_model_reads_them_in_its_language_model():
    adapted = add_prompt(llava(), "prompt", TOKENS)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[63] * 4, 6, 7]])
    logits = adapted(input_ids=ids, pixel_values=pixels).logits
    prompt = adapted.prompts["default"].embedding.detach()
    with torch.no_grad():
        prompt.zero_()
    assert logits.shape[1] == TOKENS + 7
    assert not torch.allclose(adapted(input_ids=ids, pixel_values=pixels).logits[:, -1], logits[:, -1])


class Bypass(transformers.LlamaForCausalLM):
    """A model that calls its layers by itself."""

    def forward(self, input_ids, **kwargs):
        return self.lm_head(self.model.embed_tokens(input_ids))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_forward_that_does_not_pass_them_is_an_error(kind):
    adapted = ours(base("llama"), kind)
    adapted(**batch())
    adapted.__class__ = Bypass
    with pytest.raises(ValueError, match="forward of Bypass does not call LlamaModel, where virtual tokens enter"):
        adapted(batch()["input_ids"])


def test_embeddings_of_another_width_are_refused_by_name():
    with pytest.raises(ValueError, match="embeddings of width 8 and layers of width 16"):
        add_prompt(decoder("OPT", word_embed_proj_dim=8))


# Padding #


@pytest.mark.parametrize("case", ["prompt", "prefix"])
@pytest.mark.parametrize("family", [*FAMILIES, "OPT"])
def test_a_rows_logits_do_not_depend_on_its_padding(family, case):
    """Padded on the left, in forward and in generate, each row is as it is alone; with position_ids given, too."""
    adapted = ours(decoder(family) if family == "OPT" else base(family), case)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    ids, mask = inputs.values()
    rows = [row[real == 1][None] for row, real in zip(ids, mask, strict=True)]
    with torch.no_grad():
        expected = torch.cat([adapted(row).logits[0] for row in rows])
        given = (mask.cumsum(dim=1) - 1).clamp(min=0)
        for more in ({}, {"position_ids": given}, {"use_cache": True}):
            assert difference(of_tokens(adapted(**inputs, **more).logits, mask), expected) < 1e-5
        how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        scores = adapted.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True).logits[0]
    last = torch.stack([adapted(row).logits[0, -1] for row in rows])
    assert difference(scores, last) < 1e-5


# The check of gradients #


def gradients_of(encoder: str | None, kind: str, init: str, is_cut: bool) -> str:
    model = add_prompt(base("llama"), kind, TOKENS, encoder=encoder, init=init)
    shard(model, 0)
    inputs = batch()
    logits = model(**inputs).logits
    if is_cut:
        logits = logits.detach() + sum(p.sum() * 0 for p in model.prompts.parameters())
    logits.square().sum().backward()
    try:
        check_gradients(model)
    except ZeroliteError as error:
        return str(error)
    return ""


def test_an_encoder_that_starts_at_zero_is_no_false_alarm():
    """Behind a last layer of zeros nothing has a gradient yet; that layer must have one."""
    assert gradients_of("mlp", "prefix", "zeros", is_cut=False) == ""
    assert gradients_of("mlp", "prefix", "random", is_cut=False) == ""
    assert gradients_of("lstm", "p-tuning", "random", is_cut=False) == ""
    assert "learns nothing in 2 of 5 parameters" in gradients_of("mlp", "prefix", "zeros", is_cut=True)
    assert "learns nothing in 5 of 5 parameters" in gradients_of("mlp", "prefix", "random", is_cut=True)
