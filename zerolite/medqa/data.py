"""Reading rows of questions and answers: files in, checked conversations out, and what became of every row.

`zerolite.medqa.rows` says what a row is, `zerolite.medqa.json_rows` what a file is. A row that is not usable raises
DataError with file, line and reason, or is counted where the caller asks for that. No row and no key is left out
without being told.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zerolite import DataError
from zerolite.medqa import json_rows
from zerolite.medqa.json_rows import Located
from zerolite.medqa.rows import Conversation, Passage, Row, conversation

__all__ = ["Conversation", "Passage", "Reject", "Row", "Rows", "read"]

SHOWN_KEYS = 12


@dataclass(frozen=True)
class Reject:
    """A row that is not usable, and why."""

    file: str
    line: int  # of the row's first character, from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass
class Rows:
    """What reading gave: every row is either kept or rejected."""

    kept: list[Conversation] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)  # kept, too, where the caller asked for them
    rejected: list[Reject] = field(default_factory=list)
    files: list[tuple[str, int, int]] = field(default_factory=list)  # (file, rows kept, rows rejected)
    ignored: Counter[str] = field(default_factory=Counter)  # key: rows that have it, unused

    def __str__(self) -> str:
        read = self.num_kept + len(self.rejected)
        told = f"{read} rows read, {self.num_kept} kept, {len(self.rejected)} rejected"
        return told + (f"; {len(self.passages)} of them are texts without a question" if self.passages else "")

    @property
    def num_kept(self) -> int:
        return len(self.kept) + len(self.passages)

    def details(self) -> list[str]:
        """Lines for people: rows of each file where there are several, and the keys that are not used."""
        lines = []
        if len(self.files) > 1:
            lines += [f"{file}: {kept} kept, {rejected} rejected" for file, kept, rejected in self.files]
        if self.ignored:
            most = [f"{key} ({count})" for key, count in self.ignored.most_common(SHOWN_KEYS)]
            more = len(self.ignored) - len(most)
            lines.append(
                f"keys that are not used (in rows): {ascii(', '.join(most))[1:-1]}" + f", {more} more" * (more > 0)
            )
        return lines


def read(
    files: list[Path],
    *,
    skip_invalid: bool = False,
    max_samples: int | None = None,
    rows_of: Callable[[Path], Iterator[Located]] = json_rows.rows,
    usable: Callable[[object, Counter[str]], Row] = conversation,
) -> Rows:
    """The conversations of `files` in order, of each file the first `max_samples` usable ones at most.

    rows_of: gives the rows of a file, each with its line. usable: what a row says; `rows.usable` takes passages, too,
    which are refused else. Raises DataError for the first row that is not usable (with `skip_invalid` it goes to
    `Rows.rejected`), for a file that cannot be read or holds no row, for a JSON array that breaks off (nothing behind
    that point can be told apart), and where no row is usable.
    """
    found = Rows()
    for file in files:
        kept, rejected = found.num_kept, len(found.rejected)
        for line, value in rows_of(file):
            ignored: Counter[str] = Counter()
            try:
                row = usable(value(), ignored)
                if isinstance(row, Conversation):
                    found.kept.append(row)
                else:
                    found.passages.append(row)
                found.ignored.update(ignored.keys())
            except ValueError as error:
                reject = Reject(str(file), line, str(error))
                if not skip_invalid:
                    raise DataError(f"{reject} (--skip_invalid leaves such rows out)") from None
                found.rejected.append(reject)
            if max_samples is not None and found.num_kept - kept == max_samples:
                break
        found.files.append((str(file), found.num_kept - kept, len(found.rejected) - rejected))
        if found.files[-1][1:] == (0, 0):
            raise DataError(f"{file}: no usable row: the file holds none")
    if not found.num_kept:
        raise DataError(f"{', '.join(map(str, files))}: no usable row: {found}")
    return found
