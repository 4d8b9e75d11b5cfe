"""One decision for all ranks: what fails on one of them raises on all, at the same place, naming that rank."""

from collections.abc import Callable
from typing import Protocol

import torch

from zerolite.errors import ZeroliteError

MESSAGE_BYTES = 1024


class Ranks(Protocol):
    """What can gather a few numbers from every rank: a `mesh.RankMesh`, or the engine of a model."""

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor: ...


def on_all_ranks(ranks: Ranks, what: str, error: type[ZeroliteError], work: Callable[[], str | None]) -> list[str]:
    """Run `work()`, which communicates nothing, on this rank; its short text from every rank, in rank order.

    Raises `error` on all ranks where one failed, from this rank's own failure if it has one. Collective.
    """
    cause = None
    try:
        result = work() or ""
    except Exception as failure:  # whatever it is, the other ranks wait for this rank's word
        cause = failure
        result = str(failure) if isinstance(failure, error) else f"{type(failure).__name__}: {failure}"
    text = result.encode()[:MESSAGE_BYTES]
    scalars = [float(cause is not None), float(len(text)), *map(float, text), *[0.0] * (MESSAGE_BYTES - len(text))]
    rows = ranks.all_gather_scalars(torch.tensor(scalars, dtype=torch.float64)).view(-1, len(scalars)).tolist()
    texts = [bytes(map(int, row[2 : 2 + int(row[1])])).decode(errors="replace") for row in rows]
    failures = [f"rank {rank}: {text}" for rank, (row, text) in enumerate(zip(rows, texts, strict=True)) if row[0]]
    if failures:
        raise error(f"{what} failed on {len(failures)} of {len(rows)} ranks; " + "; ".join(failures[:4])) from cause
    return texts
