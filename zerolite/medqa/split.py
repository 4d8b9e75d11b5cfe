"""A split of rows that no group crosses: what stands in one row of a group would else be validated in another.

Rows are of one group where they share a question or an answer, are near duplicates, or name one document or disease.
Groups and split depend on the rows and the seed, not on the order of the rows.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zerolite import DataError
from zerolite.medqa.rows import Conversation, Row
from zerolite.medqa.similar import NearDuplicates

# In UTF-8, of letters and digits: 24 letters or 8 Chinese characters. Many rows share a shorter answer by chance.
TELLING_BYTES = 24


@dataclass(frozen=True)
class Groups:
    """Which rows belong together."""

    of_row: list[str]  # of each row: a hash that all rows of its group have
    num_near: int  # rows that have a near duplicate

    @property
    def sizes(self) -> Counter[str]:
        return Counter(self.of_row)

    def __str__(self) -> str:
        sizes = self.sizes
        return f"{len(sizes)} groups, the largest of {max(sizes.values())} rows; {self.num_near} have a near duplicate"


def groups_of(rows: Sequence[Row]) -> Groups:
    """Groups of rows, at least one. Raises ValueError where what finds near duplicates is not installed."""
    prints = [hashlib.blake2b(_whole(row).encode(), digest_size=16).hexdigest() for row in rows]
    order = sorted(range(len(rows)), key=lambda row: prints[row])
    parents = list(range(len(rows)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    first: dict[str, int] = {}
    near, near_rows = NearDuplicates(), set()
    for row in order:
        for key in _keys_of(rows[row]):
            parents[root(row)] = root(first.setdefault(key, row))
        if isinstance(rows[row], Conversation) and rows[row].images:
            continue
        for other in near.find_all(_whole(rows[row])):
            parents[root(row)] = root(other)
            near_rows |= {row, other}
        near.add(row, _whole(rows[row]))
    names: dict[int, str] = {}
    for row in order:
        names.setdefault(root(row), prints[row])
    return Groups([names[root(row)] for row in range(len(rows))], len(near_rows))


def _keys_of(row: Row) -> Iterator[str]:
    """What no other row of another group has: its image, where it has one, for many ask the same about another."""
    if row.group:
        yield f"group {row.group}"
    if isinstance(row, Conversation) and row.images:
        yield from (f"image {image.digest}" for image in row.images)
        return
    if not isinstance(row, Conversation):
        yield f"text {_plain(row.text)}"
        return
    for turn, (question, answer) in enumerate(row.turns):
        # Of a dialogue, a question that is no more than a greeting says nothing.
        if len(row.turns) == 1 or _is_telling(question):
            yield f"question {_plain(question)}"
        if row.has_loss(turn) and _is_telling(answer):
            yield f"answer {_plain(answer)}"


def _is_telling(text: str) -> bool:
    return len(_plain(text).encode()) >= TELLING_BYTES


def _plain(text: str) -> str:
    """Letters and digits alone, in one case and width; the text itself where it has none."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold()) or text


def _whole(row: Row) -> str:
    if isinstance(row, Conversation):
        return "\n".join([*(text for turn in row.turns for text in turn), *(image.digest for image in row.images)])
    return row.text


def check_size(size: float) -> None:
    """Raises ValueError for a `--val_size` that is neither a fraction nor a number of rows."""
    if not 0 <= size < float("inf") or (size > 1 and size != int(size)):
        raise ValueError(f"--val_size: expected a fraction below 1 or a number of rows, got {size:g}")


def split(groups: Groups, languages: Sequence[str], size: float, seed: int) -> list[int]:
    """The rows to validate on, in order: whole groups, drawn by `seed`, of each language its part where they allow it.

    size: a part of the rows where it is below 1, else a number of them, which the split is at most, and less by less
    than a group. Only where no group is so small is it one group, and more. Raises DataError where no row would be left
    to train on.
    """
    num_rows, sizes = len(groups.of_row), groups.sizes
    wanted = max(1, round(size * num_rows)) if size < 1 else int(size)
    if wanted >= num_rows or len(sizes) == 1:
        why = f"{wanted} rows to validate on leave none of {num_rows} to train on"
        if wanted < num_rows:
            why = f"all {num_rows} rows are one group, since they share questions, answers or a document"
        raise DataError(f"--val_size {size:g}: {why}; --validation_file names other rows")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for group, language in zip(groups.of_row, languages, strict=True):
        counts[group][language] += 1
    drawn = sorted(counts, key=lambda group: hashlib.blake2b(f"{seed} {group}".encode()).digest())
    left, chosen = _shares(Counter(languages), wanted), set()
    for group in drawn:
        if all(left[language] >= number for language, number in counts[group].items()):
            left -= counts[group]
            chosen.add(group)
    room = wanted - sum(sizes[group] for group in chosen)
    for group in drawn:
        if group not in chosen and sizes[group] <= room:
            room -= sizes[group]
            chosen.add(group)
    if not chosen:
        chosen = {min(drawn, key=lambda group: sizes[group])}
    return [row for row, group in enumerate(groups.of_row) if group in chosen]


def _shares(rows: Counter[str], wanted: int) -> Counter[str]:
    """`wanted` rows divided among languages as `rows` are, by largest remainders."""
    total = rows.total()
    shares = Counter({language: wanted * number // total for language, number in rows.items()})
    rests = sorted(rows, key=lambda language: (-(wanted * rows[language] % total), language))
    shares.update(rests[: wanted - shares.total()])
    return shares


def apart(rows: Sequence[Row], size: float, seed: int) -> tuple[list[Row], list[Row], str]:
    """(rows to train on, rows to validate on, what is told about them). Raises as `groups_of` and `split`."""
    groups = groups_of(rows)
    chosen = set(split(groups, [row.language for row in rows], size, seed))
    train = [row for number, row in enumerate(rows) if number not in chosen]
    validation = [row for number, row in enumerate(rows) if number in chosen]
    return train, validation, f"{len(validation)} of these rows (--val_size {size:g}) in whole groups; {groups}"
