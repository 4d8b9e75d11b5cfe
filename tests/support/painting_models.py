"""Tiny models of diffusers, one of each family that text to image is trained with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from models import drawn
from torch import nn


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False, norm_num_groups=4,
    )  # fmt: skip


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def vae() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


CASES: dict[str, Callable[[], nn.Module]] = {
    "unet": unet,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "vae": vae,
}


def build_painting(name: str) -> nn.Module:
    return drawn(CASES[name]).eval()


@torch.no_grad()
def output_of(model: nn.Module) -> torch.Tensor:
    """What it gives for one fixed input."""
    torch.manual_seed(1)
    latents, text, pooled, time = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, 16),
        torch.randn(2, 12),
        torch.tensor([3, 7]),
    )
    name = type(model).__name__
    if name == "AutoencoderKL":
        return model(torch.randn(2, 3, 8, 8)).sample.clone()
    inputs: dict = {"hidden_states": latents, "timestep": time, "encoder_hidden_states": text}
    if name == "UNet2DConditionModel":
        return model(latents, time, text).sample.clone()
    if name == "DiTTransformer2DModel":
        inputs = {"hidden_states": latents, "timestep": time, "class_labels": torch.tensor([1, 2])}
    elif name == "PixArtTransformer2DModel":
        conditions = {"resolution": None, "aspect_ratio": None}
        inputs |= {"encoder_hidden_states": torch.randn(2, 5, 12), "added_cond_kwargs": conditions}
    elif name == "SD3Transformer2DModel":
        inputs |= {"pooled_projections": pooled}
    elif name == "FluxTransformer2DModel":
        ids = torch.randn(16, 3)
        inputs = {
            "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": text, "pooled_projections": pooled,
            "timestep": time / 10, "img_ids": ids, "txt_ids": ids[:5], "guidance": torch.ones(2),
        }  # fmt: skip
    return model(**inputs).sample.clone()
