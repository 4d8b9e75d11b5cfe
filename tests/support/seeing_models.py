"""Tiny models that read images, of three families, with the tokenizer and the image processor of such a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from zerolite.medqa.arguments import CORPUS

FAMILIES = ("llava", "qwen2_vl", "glm4v")
SIDE = 24  # pixels of an image that is read
PATCH = 6
IMAGE_TOKEN = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "glm4v": "<|image|>"}
SPECIAL = {
    "llava": ["<image>"],
    "qwen2_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "glm4v": ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"],
}
# As llava-1.5's, which writes images first, and as Qwen2-VL's and GLM-4V's, which keep the order.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + '\\n' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ORDERED = (
    "{{% for message in messages %}}{{{{ '### ' + message['role'] + '\\n' }}}}{{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}}{{% else %}}{{% for content in message['content'] %}}"
    "{{% if content['type'] == 'image' %}}{{{{ '{begin}{image}{end}' }}}}{{% else %}}{{{{ content['text'] }}}}"
    "{{% endif %}}{{% endfor %}}{{% endif %}}{{{{ eos_token + '\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '### assistant\\n' }}}}{{% endif %}}"
)
TEMPLATES = {
    "llava": LLAVA,
    "qwen2_vl": ORDERED.format(begin="<|vision_start|>", image="<|image_pad|>", end="<|vision_end|>"),
    "glm4v": ORDERED.format(begin="<|begin_of_image|>", image="<|image|>", end="<|end_of_image|>"),
}


def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """The shipped one with the family's image tokens and a template of its kind."""
    tokenizer = AutoTokenizer.from_pretrained(CORPUS / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]})
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def build(family: str, dtype: torch.dtype = torch.float32, hidden: int = 32, seed: int = 0) -> PreTrainedModel:
    """A model of random numbers for that tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(family)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    image, *others = tokenizer.convert_tokens_to_ids(SPECIAL[family])
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH, projection_dim=hidden,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_id=image, image_seq_length=16,
            vision_feature_layer=-1,
        )  # fmt: skip
        model = LlavaForConditionalGeneration(config)
    elif family == "qwen2_vl":
        vision = {
            "depth": 2, "embed_dim": hidden, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        rope = {
            "rope_type": "default",
            "mrope_section": [hidden // 32, hidden // 32, hidden // 16],
            "rope_theta": 10000.0,
        }
        config = Qwen2VLConfig(
            vision_config=vision, text_config={**text, "rope_parameters": rope}, image_token_id=image,
            video_token_id=others[0], vision_start_token_id=others[1], vision_end_token_id=others[2],
        )  # fmt: skip
        model = Qwen2VLForConditionalGeneration(config)
    else:
        vision = {
            "depth": 2, "hidden_size": hidden, "out_hidden_size": hidden, "intermediate_size": 2 * hidden,
            "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "image_size": SIDE,
        }  # fmt: skip
        rope = {
            "rope_type": "default",
            "mrope_section": [hidden // 32, hidden // 32, hidden // 16],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        }
        config = Glm4vConfig(
            vision_config=vision, text_config={**text, "rope_parameters": rope}, image_token_id=image,
            video_token_id=others[0], image_start_token_id=others[1], image_end_token_id=others[2],
        )  # fmt: skip
        model = Glm4vForConditionalGeneration(config)
    vision = model.model.vision_tower if family == "llava" else model.model.visual
    with torch.no_grad():
        for parameter in vision.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # of a frozen tower of small random numbers, all patches look alike
    return model.to(dtype)


def write_processor(folder: Path, family: str) -> None:
    """The files of an image processor, as folders of these families have them."""
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": True}
    if family == "llava":
        own = {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", **means,
            "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE},
        }  # fmt: skip
        processor = {
            "processor_class": "LlavaProcessor", "patch_size": PATCH, "vision_feature_select_strategy": "default",
            "image_token": "<image>", "num_additional_image_tokens": 1,
        }  # fmt: skip
        (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    else:
        kind, area = {"qwen2_vl": ("Qwen2VL", SIDE * SIDE), "glm4v": ("Glm4v", 2 * SIDE * SIDE)}[family]  # two frames
        own = {
            "image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor", **means,
            "size": {"shortest_edge": area, "longest_edge": area}, "patch_size": PATCH,
            "temporal_patch_size": 2, "merge_size": 2,
        }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(own), encoding="utf-8")


def write_seer(folder: Path, family: str, hidden: int = 32) -> Path:
    """A model folder as users have it: weights, tokenizer with its template, processor."""
    build(family, hidden=hidden).save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    write_processor(folder, family)
    return folder
