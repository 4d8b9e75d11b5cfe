"""What an adapter is, but for its values: the configurations of LoRA and of prompts, checked when they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from zerolite.adapters import patterns

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj")
DEEP_KINDS = ("prefix", "p-tuning-v2")
MAX_ALPHA = 1e18  # its square is finite in fp32: DoRA's norms have it
KINDS = ("prompt", "p-tuning", *DEEP_KINDS)

T = TypeVar("T")
Targets = str | tuple[str, ...] | list[str]


@dataclass(frozen=True)
class LoraConfig:
    """What a LoRA adapter is, but for its values.

    targets: as a PEFT file tells them: ends of names, or a regular expression.
    modules_to_save: ends of names of modules that train whole, as a PEFT file tells them.
    rank_pattern, alpha_pattern: regular expressions for ends of names that have a rank or an alpha of their own.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: Targets = DEFAULT_TARGETS
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"the rank r is an integer from 1, got {r!r:.80}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= MAX_ALPHA:
                raise ValueError(f"alpha is a finite number of at most {MAX_ALPHA:g}, got {alpha!r:.80}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability from 0 to below 1, got {self.dropout!r:.80}")

    def rank_of(self, layer_name: str) -> int:
        """r, or the rank that `rank_pattern` has for the layer."""
        return _first_match(self.rank_pattern, layer_name, self.r)

    def scale_of(self, layer_name: str) -> float:
        """alpha / r; with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
        r, alpha = self.rank_of(layer_name), _first_match(self.alpha_pattern, layer_name, self.alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _first_match(pattern: Mapping[str, T], layer_name: str, default: T) -> T:
    """The value of the first key that matches the name's end, as in PEFT."""
    return next((value for key, value in pattern.items() if patterns.match(rf"(.*\.)?({key})$", layer_name)), default)


@dataclass(frozen=True)
class PromptConfig:
    """What `add_prompt` was asked for, its defaults resolved."""

    kind: str  # one of KINDS
    tokens: int
    init: str  # "random", "vocabulary", "text" or "zeros"
    encoder: str | None = None  # "mlp" or "lstm"
    encoder_hidden: int | None = None

    @property
    def is_deep(self) -> bool:
        """The virtual tokens are keys and values of every layer, not embeddings in front of the first."""
        return self.kind in DEEP_KINDS
