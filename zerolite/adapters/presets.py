"""A learning rate and a start for each method of fine-tuning, and parameter groups for an optimizer."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Preset:
    """AdamW's learning rate; for prompts the arguments `tokens` and `init` of `add_prompt`."""

    learning_rate: float
    tokens: int | None = None
    init: str | None = None


# Each method needs a learning rate of its own. On MetaMathQA with Llama 3.2 3B (PEFT's method_comparison, July
# 2026) prompt tuning scores 5.7 at 1e-4 and 34.3 at 1e-3 from the vocabulary, a prefix 18.6 from random values at 1e-3
# and 41.6 from real keys and values at 5e-3, full fine-tuning 47.2 at 1e-5, LoRA 47.8 at 1e-4, p-tuning 35.0 at 1e-4.
# P-tuning v2: 128 tokens at 2e-2, as ChatGLM-6B's authors train it.
PRESETS = {
    "full": Preset(2e-5),
    "lora": Preset(2e-4),
    "prompt": Preset(1e-3, tokens=20, init="vocabulary"),
    "prefix": Preset(5e-3, tokens=50, init="vocabulary"),
    "p-tuning": Preset(1e-4, tokens=20, init="random"),
    "p-tuning-v2": Preset(2e-2, tokens=128, init="vocabulary"),
}


def parameter_groups(
    model: nn.Module, lr: float, loraplus_ratio: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups of the parameters that require a gradient, for any optimizer. Not collective.

    loraplus_ratio: LoRA+ (Hayou et al. 2024, arXiv 2402.12354) trains each lora_B with `loraplus_ratio * lr`. The paper
        recommends 16, with an `lr` smaller than LoRA's. None: one group.
    Raises ValueError where no parameter trains, for a ratio that is not above 0, and for a ratio without a LoRA.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(f"nothing trains in this {type(model).__name__}: add an adapter, or set requires_grad")
    if loraplus_ratio is None:
        return [{"params": list(trained.values()), "lr": lr, "weight_decay": weight_decay}]
    if not loraplus_ratio > 0:
        raise ValueError(f"loraplus_ratio= is how much faster lora_B learns, above 0, got {loraplus_ratio!r}")
    Bs = [parameter for name, parameter in trained.items() if name.endswith(".lora_B")]
    if not Bs:
        raise ValueError(f"loraplus_ratio={loraplus_ratio!r} is for LoRA, and no lora_B trains in this model")
    rest = [parameter for name, parameter in trained.items() if not name.endswith(".lora_B")]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": Bs, "lr": lr * loraplus_ratio, "weight_decay": weight_decay},
    ]
