"""What every rank must have been told alike: compared by one number, and named with both values where it differs."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from zerolite.errors import ZeroliteError
from zerolite.runtime.rank_errors import Ranks

NUM_NAMED = 4  # differences that an error tells

Settings = Mapping[str, str]  # what was set -> its value, in words


def digest_of(text: str) -> float:
    """48 bits of a hash of `text`, which an fp64 number holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def compare_settings(ranks: Ranks, what: str, settings: Settings) -> None:
    """ZeroliteError on every rank where the ranks' settings differ; `what` says what they are of. Collective.

    One number a rank travels where they are equal.
    """
    digest = torch.tensor([digest_of(json.dumps(dict(settings)))], dtype=torch.float64)
    if len(set(ranks.all_gather_scalars(digest).view(-1).tolist())) > 1:
        raise difference(ranks, what, settings)


def difference(ranks: Ranks, what: str, settings: Settings) -> ZeroliteError:
    """The error that names what differs, the same on every rank, for those whose digests differed. Collective."""
    everyone = [json.loads(text) for text in gather_texts(ranks, json.dumps(dict(settings)))]
    names = dict.fromkeys(name for one in everyone for name in one)
    different = [name for name in names if len({one.get(name) for one in everyone}) > 1]
    said = [f"{name} is {_by_rank([one.get(name, 'absent') for one in everyone])}" for name in different[:NUM_NAMED]]
    if len(different) > NUM_NAMED:
        said.append(f"{len(different) - NUM_NAMED} more")
    if not different:
        place, at = next(item for item in enumerate(zip(*everyone, strict=True)) if len(set(item[1])) > 1)
        said = [
            f"their order: number {place} is {_by_rank(at)} (the order of a set, or of a folder's files, is no order)"
        ]
    return ZeroliteError(f"ranks differ in {what}: {'; '.join(said)}. Give every rank the same")


def gather_texts(ranks: Ranks, text: str) -> list[str]:
    """Every rank's text, without spaces at its end, in the order of the ranks' rows. Collective."""
    encoded = text.encode()
    lengths = ranks.all_gather_scalars(torch.tensor([float(len(encoded))], dtype=torch.float64)).view(-1)
    padded = encoded.ljust(int(lengths.max()))
    rows = ranks.all_gather_scalars(torch.tensor(list(padded), dtype=torch.float64)).view(len(lengths), -1)
    return [bytes(map(int, row)).decode().rstrip(" ") for row in rows.tolist()]


def _by_rank(values: Sequence[str]) -> str:
    """ "2 on rank 0 and 3 on ranks 1, 2"."""
    ranks_of: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(value, []).append(str(rank))
    return " and ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" for value, ranks in ranks_of.items()
    )
