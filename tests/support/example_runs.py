"""The examples of zerolite.examples, and the scripts that they were made from, run on ranks.

In an example a line that ends in `# zerolite` is new, and `# was:` stands before what was there: undoing both gives the
script of somebody who does not know zerolite, which runs on plain torch and its trainers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict  # as what follows: for the examples, once for all ranks
import torch.distributed.fsdp  # noqa: F401
import transformers
from accelerate.state import AcceleratorState, GradientState
from paths import ROOT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import zerolite
import zerolite.integrations.lightning
from zerolite.engine.engine import find_engine

transformers.LlamaForCausalLM  # noqa: B018  # loads lazily

FOLDER = ROOT / "zerolite" / "examples"
NEW, WAS = "# zerolite", re.compile(r"( *)# was: (.*)")


@dataclass
class Result:
    losses: list[float]
    parameters: dict[str, Tensor]


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def original(source: str) -> str:
    kept = [line for line in source.splitlines() if not line.endswith(NEW)]
    return "\n".join(WAS.sub(r"\1\2", line) for line in kept)


def run(name: str, is_original: bool, dtype: torch.dtype = torch.float64, constants=None, **options: Any) -> Result:
    """On a rank: what `main` returns, with models built in `dtype`; `constants` of the example have other values."""
    source = source_of(name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(original(source) if is_original else source, f"{name}.py", "exec", dont_inherit=True), namespace)
    namespace.update(constants or {})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_default_dtype(dtype)
    try:
        losses, model = namespace["main"](**options)
    finally:
        torch.set_default_dtype(torch.float32)
    return Result(losses, parameters_of(model))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    if find_engine(model) is not None:
        with zerolite.full_params(model):
            return {name: value.detach().clone() for name, value in model.named_parameters()}
    whole = {}
    for name, value in model.named_parameters():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        whole[name.removeprefix("module.")] = value.detach().clone()
    return whole
