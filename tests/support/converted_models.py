"""Tiny models of transformers whose folders have other names or shapes than they: vision, experts, ties."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from models import drawn
from torch import nn

TEXT = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
CLIP = tf.CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    projection_dim=16,
)  # fmt: skip
QWEN_VISION = dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4, mlp_ratio=2)
IMAGE_TOKENS = dict(image_token_id=63, vision_start_token_id=62, vision_end_token_id=61, video_token_id=60)
EXPERTS = dict(moe_intermediate_size=10, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=14)
LAYERS = ["conv", "full_attention"]
LATENT = dict(
    kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=12,
    n_group=1, topk_group=1, moe_intermediate_size=10, num_experts_per_tok=2, first_k_dense_replace=1,
    n_shared_experts=1,
)  # fmt: skip


def text(**other) -> dict:
    return {**TEXT, **other}


def llava() -> nn.Module:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=CLIP, text_config=tf.LlamaConfig(**TEXT), image_token_index=63)
    )


def llava_next() -> nn.Module:
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(vision_config=CLIP, text_config=tf.LlamaConfig(**TEXT), image_token_index=63)
    )


def paligemma() -> nn.Module:
    vision = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = tf.PaliGemmaConfig(vision_config=vision, text_config=tf.GemmaConfig(**TEXT), projection_dim=16)
    return tf.PaliGemmaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    config = tf.Qwen2VLConfig(text_config=text(rope_parameters=ROPE), vision_config=QWEN_VISION, **IMAGE_TOKENS)
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=16,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    config = tf.Qwen2_5_VLConfig(text_config=text(rope_parameters=ROPE), vision_config=vision, **IMAGE_TOKENS)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def glm4v() -> nn.Module:
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=16, image_size=8
    )
    config = tf.Glm4vConfig(text_config=text(rope_parameters=ROPE), vision_config=vision, **IMAGE_TOKENS)
    return tf.Glm4vForConditionalGeneration(config)


def qwen3_vl_moe() -> nn.Module:
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=16,
        deepstack_visual_indexes=[0], num_position_embeddings=16,
    )  # fmt: skip
    config = tf.Qwen3VLMoeConfig(text_config=text(**EXPERTS, rope_parameters=ROPE), vision_config=vision)
    return tf.Qwen3VLMoeForConditionalGeneration(config)


def ernie_vl_moe() -> nn.Module:
    vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4)
    text_config = text(
        moe_intermediate_size=[10, 6], moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse"], rope_parameters=ROPE,
    )  # fmt: skip
    config = tf.Ernie4_5_VLMoeConfig(text_config=text_config, vision_config=vision)
    return tf.Ernie4_5_VLMoeForConditionalGeneration(config)


def gemma3() -> nn.Module:
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = tf.Gemma3Config(vision_config=vision, text_config=text(), mm_tokens_per_image=4)
    return tf.Gemma3ForConditionalGeneration(config)


def internvl() -> nn.Module:
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = tf.InternVLConfig(vision_config=vision, text_config=tf.Qwen2Config(**TEXT), image_token_id=63)
    return tf.InternVLForConditionalGeneration(config)


def marian() -> nn.Module:
    return tf.MarianMTModel(
        tf.MarianConfig(
            vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0,
            max_position_embeddings=64, decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1,
        )
    )  # fmt: skip


def causal(cls: str, **other) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, f"{cls}ForCausalLM")(getattr(tf, f"{cls}Config")(**text(**other)))


SEEING: dict[str, Callable[[], nn.Module]] = {
    "llava": llava,
    "qwen2-vl": qwen2_vl,
    "glm4v": glm4v,
    "llava-next": llava_next,
    "paligemma": paligemma,
    "qwen2.5-vl": qwen2_5_vl,
    "gemma3": gemma3,
    "internvl": internvl,
}

EXPERT: dict[str, Callable[[], nn.Module]] = {
    "mixtral": causal("Mixtral", num_local_experts=4),
    "qwen2-moe": causal("Qwen2Moe", **EXPERTS),
    "deepseek-v3": causal("DeepseekV3", **LATENT, num_key_value_heads=2, head_dim=4),
    "qwen3-moe": causal("Qwen3Moe", **EXPERTS),
    "deepseek-v2": causal("DeepseekV2", **LATENT, num_key_value_heads=2, head_dim=4),
    "olmoe": causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": causal("Phimoe", num_local_experts=4),
    "gpt-oss": causal("GptOss", num_local_experts=4, num_experts_per_tok=2),
    "jamba": causal("Jamba", num_experts=4, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
    "lfm2-moe": causal("Lfm2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, layer_types=LAYERS),
    "qwen3-vl-moe": qwen3_vl_moe,
    "ernie-vl-moe": ernie_vl_moe,
}

OTHER: dict[str, Callable[[], nn.Module]] = {
    "nomic-bert": lambda: tf.NomicBertForMaskedLM(tf.NomicBertConfig(**TEXT)),
    "marian": marian,
    "ibert": lambda: tf.IBertForMaskedLM(tf.IBertConfig(**TEXT)),
    "gemma2": causal("Gemma2"),
    "gpt-neox": causal("GPTNeoX"),
}

CASES = {**SEEING, **EXPERT, **OTHER}


def build_case(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return drawn(CASES[name]).to(dtype)


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    """Logits for fixed tokens, with a picture where the model is one of three that see."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the widths are too small for the kernel that takes all at once
    generator = torch.Generator().manual_seed(3)
    ids = torch.arange(3, 27).view(2, 12)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {})}
    kind = model.config.model_type
    if kind == "llava":
        ids[:, 2:6] = 63
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float32).to(model.dtype)
    elif kind in ("qwen2_vl", "glm4v"):
        ids[:, 2:8] = torch.tensor([62, 63, 63, 63, 63, 61])
        pixels = torch.randn(32, 96, generator=generator)
        inputs |= {"pixel_values": pixels.to(model.dtype), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        inputs["mm_token_type_ids"] = (ids == 63).int()
    return model(**inputs, **({"use_cache": False} if model.can_generate() else {})).logits.clone()
