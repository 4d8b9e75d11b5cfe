"""What several files of this folder take: the folder of a tiny model; a stderr that stays open."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from medqa_runs import tiny_llama


@pytest.fixture(autouse=True, scope="session")
def absl_closes_no_stream() -> None:
    """absl's log handler closes the stderr that it found at import when uvicorn sets logging up: pytest's own."""
    if importlib.util.find_spec("absl") is not None:
        import absl.logging

        absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__  # which it never closes


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny LLaMA to fine-tune, without a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder
