"""The model and the data of the small examples: a stack of blocks that learns to add up what it reads."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH, ROWS = 16, 32, 8, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tokens (rows, LENGTH) to logits (rows, LENGTH, VOCAB)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def batches(count: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of `count` batches: tokens, and their sums modulo VOCAB."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)[rank::world]
        yield tokens, tokens.cumsum(1) % VOCAB


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
