"""LoRA's default targets are the language model's in a model that reads images or sound, or are refused by name."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from models import drawn
from torch import nn

from zerolite.adapters.files import CONFIG, load, save
from zerolite.adapters.lora import add_lora, layers_of

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
SPEECH = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4,
    "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
Llama = transformers.LlamaConfig


def llava() -> nn.Module:
    vision, text = transformers.CLIPVisionConfig(**IMAGE), Llama(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return drawn(lambda: transformers.LlavaForConditionalGeneration(config)).eval()


def git() -> nn.Module:
    """Its base model is the language model, with the vision model in it."""
    sizes = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GitConfig(vision_config=IMAGE, **sizes)
    return drawn(lambda: transformers.GitForCausalLM(config)).eval()


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(**SPEECH)
    return drawn(lambda: transformers.WhisperForConditionalGeneration(config)).eval()


def clip_vision() -> nn.Module:
    return drawn(lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE))).eval()


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (llava, {"model.language_model": 6}),
        (git, {"git.encoder": 6}),
        (whisper, {"model.encoder": 3, "model.decoder": 6}),  # both halves of a sequence-to-sequence model
        (clip_vision, {"encoder.layers": 6}),  # images are all that it reads
    ],
)
def test_the_default_leaves_towers_out(build, parts):
    found = list(layers_of(add_lora(build()), "default"))
    counts = {part: sum(part in name for name in found) for part in parts}
    assert counts == parts and len(found) == sum(parts.values())


def test_peft_opens_the_default_of_a_vision_language_model(tmp_path):
    """The file names layers of the language model only; targets given by name mean what they mean in PEFT."""
    peft = pytest.importorskip("peft")
    model = add_lora(llava(), dropout=0.0)
    inputs = {
        "input_ids": torch.tensor([[5, *[63] * 4, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save(model, tmp_path)
    twin = peft.PeftModel.from_pretrained(llava(), tmp_path).eval()
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert torch.equal(load(llava(), tmp_path)(**inputs).logits, model(**inputs).logits)
    assert not any("vision" in name for name in json.loads((tmp_path / CONFIG).read_text())["target_modules"])
    named = add_lora(llava(), targets=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(llava(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert len(layers_of(named, "default")) == len(theirs.targeted_module_names) == 8


class TwoModels(transformers.PreTrainedModel):
    """Two language models and a vision model, none of which is the decoder."""

    config_class = Llama
    input_modalities = ("image", "text")

    def __init__(self, config: Llama):
        super().__init__(config)
        self.thinker, self.talker = transformers.LlamaModel(config), transformers.LlamaModel(config)
        self.visual = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE))
        self.post_init()


def test_a_choice_between_language_models_is_the_users():
    model = TwoModels(Llama(**TEXT))
    with pytest.raises(ValueError, match=r"in several models of TwoModels: talker, thinker; give targets=") as error:
        add_lora(model)
    assert not hasattr(model, "_zerolite_adapters")
    pattern = str(error.value).split("'")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert {name.split(".")[0] for name in layers_of(add_lora(model, targets=pattern), "default")} == {"talker"}
