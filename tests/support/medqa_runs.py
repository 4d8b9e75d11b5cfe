"""What runs of train_medqa.py are made of: a tiny model and a command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paths import SHARED
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zerolite.medqa.arguments import CORPUS

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data not beside the repository")


def tiny_llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **settings,
    )
    return LlamaForCausalLM(config)


def write_talker(folder: Path) -> Path:
    """A random model that says something else after each token, in a folder with the shipped tokenizer."""
    tiny_llama(initializer_range=0.4).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CORPUS / "tokenizer").save_pretrained(folder)
    return folder


def to_flags(options: dict) -> list[str]:
    return [p for name, value in options.items() for p in ([f"--{name}"] + [str(value)] * (value is not True))]
