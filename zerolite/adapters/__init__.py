"""Adapters of a frozen model: LoRA and the prompt family, their files, and which of them a forward uses."""

from zerolite.adapters.checks import check_gradients
from zerolite.adapters.files import load, save
from zerolite.adapters.lora import add_lora
from zerolite.adapters.merge import check_merge, merge
from zerolite.adapters.presets import PRESETS, parameter_groups
from zerolite.adapters.prompts import add_prompt
from zerolite.adapters.state import disabled, use

__all__ = [
    "PRESETS",
    "add_lora",
    "add_prompt",
    "check_gradients",
    "check_merge",
    "disabled",
    "load",
    "merge",
    "parameter_groups",
    "save",
    "use",
]
