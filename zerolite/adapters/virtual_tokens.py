"""The parameters of one prompt: an embedding of virtual tokens, and the encoder that maps it, where there is one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from zerolite.adapters.config import PromptConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its virtual tokens follow."""

    hidden: int
    layers: int
    heads: int  # that have keys and values of their own
    head_dim: int


def shape_of(model: nn.Module) -> Shape:
    """The sizes, read from the configuration: parameters may lie on the meta device or be sharded."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.hidden_size, config.num_hidden_layers, heads, head_dim)


class VirtualTokens(nn.Module):
    """The virtual tokens of one adapter. `forward()` gives what the model and a file take, (tokens, width).

    Width is the model's hidden size. For deep kinds it is layers * 2 * heads * head_dim: layer by layer, first keys,
    then values. An encoder has the modules of PEFT's encoder, so equal values give equal outputs.
    """

    embedding: nn.Parameter  # (tokens, width), or what the encoder takes
    source_ids: Tensor | None  # (tokens,) ids whose values the embedding still needs; None: it has its values

    def __init__(self, config: PromptConfig, shape: Shape, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config, self.shape = config, shape
        width = shape.layers * 2 * shape.heads * shape.head_dim if config.is_deep else shape.hidden
        width_in = width
        self.encoder = nn.Identity()
        if config.encoder is not None:
            assert config.encoder_hidden is not None, "an encoder has a hidden size"
            width_in = shape.heads * shape.head_dim if config.is_deep else shape.hidden
            build = _deep_mlp if config.is_deep else _LSTM if config.encoder == "lstm" else _mlp
            self.encoder = build(width_in, config.encoder_hidden, width)
        self.embedding = nn.Parameter(torch.randn(config.tokens, width_in))
        if config.init == "zeros":
            nn.init.zeros_(self.embedding if config.encoder is None else self.encoder[-1].weight)
            if config.encoder is not None:
                nn.init.zeros_(self.encoder[-1].bias)
        self.register_buffer("source_ids", None, persistent=False)
        self.to(device=device, dtype=dtype)

    def forward(self) -> Tensor:
        if self.source_ids is not None and not isinstance(self.embedding, FakeTensor):  # a plan's, which has no values
            raise ValueError(
                "this prompt starts from values of the base model, which had none when it was added: "
                "zerolite.load_pretrained(adapt=...) and zerolite.shard(model) compute them; where neither is called, "
                "add the prompt once the weights are loaded"
            )
        return self.encoder(self.embedding)

    def without_gradient(self) -> list[nn.Parameter]:
        """Parameters whose gradient is zero whatever the loss: those behind an encoder's last layer that is zero."""
        last = self.encoder[-1] if isinstance(self.encoder, nn.Sequential) else None
        if last is None or last.weight.any():
            return []
        return [p for p in self.parameters() if p is not last.weight and p is not last.bias]

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, heads, tokens, head_dim) each."""
        shape = self.shape
        values = self().view(1, -1, 2 * shape.layers, shape.heads, shape.head_dim)
        keys_and_values = values.permute(2, 0, 3, 1, 4).unbind()
        return list(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))


def _mlp(width_in: int, hidden: int, width: int) -> nn.Module:
    """P-tuning (Liu et al. 2021, GPT Understands, Too, section 3.2)."""
    layers = nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
    return nn.Sequential(*layers)


def _deep_mlp(width_in: int, hidden: int, width: int) -> nn.Module:
    """The reparametrisation of a prefix (Li and Liang 2021, section 4.3)."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.Tanh(), nn.Linear(hidden, width))


class _LSTM(nn.Module):
    """P-tuning's two bidirectional layers with an MLP on top."""

    def __init__(self, width_in: int, hidden: int, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width_in, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.head(self.lstm(embedding[None])[0])[0]
