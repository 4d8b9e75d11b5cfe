"""Tiny models of diffusers whose folders are read and written: those of diffusers_runs.py, and an autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import diffusers_runs
import torch
from models import drawn
from torch import nn


def vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


CASES: dict[str, Callable[[], nn.Module]] = {**diffusers_runs.FAMILIES, "vae": vae}


def build_painting(name: str) -> nn.Module:
    return drawn(CASES[name]).eval()


@torch.no_grad()
def output_of(model: nn.Module) -> torch.Tensor:
    """What it gives for one fixed input."""
    kind = type(model).__name__.lower()
    if kind == "autoencoderkl":
        return model(torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)).sample.clone()
    family = next(name for name in diffusers_runs.FAMILIES if kind.startswith(name))
    return diffusers_runs.output_of(model, diffusers_runs.in_fp32(diffusers_runs.joint_batch(family, 0))).clone()
