"""Likelihoods of given answers, a batch at a time: of each row the sum over its label tokens, and how many are right.

The logits of label tokens alone are computed, some at a time, in the output layer (see
[Note: the loss in the output layer], loss.py).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from zerolite.medqa.batches import collate
from zerolite.medqa.loss import at_labels
from zerolite.medqa.prompts import IGNORED, Example

CHUNK_TOKENS = 512  # label tokens whose logits are there at once


@dataclass(frozen=True)
class Scored:
    """What is scored: an example, maybe with several ids in the place of its last label token."""

    example: Example
    last: tuple[int, ...] = field(default=())  # (): the example's own one

    @property
    def endings(self) -> tuple[int, ...]:
        return self.last or (int(self.example.labels[self.example.labels != IGNORED][-1]),)


@dataclass(frozen=True)
class Score:
    """Of an example."""

    log_likelihoods: list[float]  # nats, summed over the label tokens: one for each ending
    num_labels: int
    num_right: int  # label tokens, of the first ending, that are the likeliest ones where they stand


@torch.no_grad()
def scores(model: nn.Module, batch: list[Scored], pad_token_id: int) -> list[Score]:
    """Scores of a batch, those of one row at a time. At stage 3 every rank must call it."""
    num_labels = [one.example.num_labels for one in batch]
    num_endings = max(len(one.endings) for one in batch)
    row_of = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(num_labels))
    results: list[torch.Tensor] = []

    def of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        parts = zip(logits.split(CHUNK_TOKENS), wanted_of(targets).split(CHUNK_TOKENS), strict=True)
        results.append(torch.cat([_of_chunk(*part) for part in parts]))
        return results[-1]

    def of_hidden(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
        parts = zip(hidden.split(CHUNK_TOKENS), wanted_of(targets).split(CHUNK_TOKENS), strict=True)
        results.append(torch.cat([_of_chunk(F.linear(h, head.weight, head.bias), wanted) for h, wanted in parts]))
        return results[-1]

    def wanted_of(targets: torch.Tensor) -> torch.Tensor:
        """(label tokens, endings) ids: each label's own, but at the end of a row its endings."""
        wanted = targets[:, None].repeat(1, num_endings)
        for end, one in zip(torch.tensor(num_labels).cumsum(0).tolist(), batch, strict=True):
            padded = one.endings + one.endings[:1] * (num_endings - len(one.endings))
            wanted[end - 1] = torch.tensor(padded, device=wanted.device)
        return wanted

    at_labels(model, collate([one.example for one in batch], pad_token_id), of_hidden, of_logits)
    (found,) = results
    found = found.double().cpu()
    sums = torch.zeros(len(batch), num_endings + 1, dtype=torch.float64).index_add(0, row_of, found)
    return [
        Score(row[: len(one.endings)], number, round(row[-1]))
        for row, number, one in zip(sums.tolist(), num_labels, batch, strict=True)
    ]


def _of_chunk(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(tokens, endings + 1): log probabilities (nats) of the wanted ids, then 1 where the first one is likeliest."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = logits.gather(1, wanted) - logits.logsumexp(dim=1, keepdim=True)
    is_right = logits.argmax(dim=1) == wanted[:, 0]
    return torch.cat([found, is_right[:, None].to(found.dtype)], dim=1)
