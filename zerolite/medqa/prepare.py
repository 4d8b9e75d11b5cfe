"""Files of any layout that is read as one file of checked rows, with a card that says what became of each row.

`python -m zerolite.medqa.prepare FILES --output rows.jsonl` writes rows of `messages`, `language`, `source` and
`licence`, which `train_medqa.py` reads, and beside them `rows.md` (the card) and `rows.rejected.jsonl`. Rows that are
not usable and exact duplicates are left out and counted. Nothing here is medical advice.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zerolite
from zerolite import DataError
from zerolite.medqa import readers
from zerolite.medqa.data import Reject
from zerolite.medqa.layouts import columns_of
from zerolite.medqa.rows import Conversation, conversation, is_absent, shown, text
from zerolite.medqa.streams import lasting

DUPLICATE = "is an exact duplicate"
UNKNOWN = "unknown"
# Counted, never changed: rows with such numbers should be looked at before they are trained on.
PERSONAL = {
    "mobile number of China": re.compile(r"(?<!\d)1[3-9]\d{9}(?!\d)"),
    "identity number of China": re.compile(r"(?<![\dA-Za-z])[1-9]\d{5}(?:19|20)\d{9}[\dXx](?![\dA-Za-z])"),
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*[a-zA-Z]"),
}


@dataclass(frozen=True)
class Prepared:
    """A usable row and what is known about it."""

    conversation: Conversation
    source: str
    licence: str
    language: str

    def as_row(self) -> dict[str, object]:
        """The row as it is written: answers without loss have weight 0."""
        row, messages = self.conversation, []
        if row.system:
            messages.append({"role": "system", "content": row.system})
        for turn, (question, answer) in enumerate(row.turns):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer} | ({} if row.has_loss(turn) else {"weight": 0}))
        return {"messages": messages, "language": self.language, "source": self.source, "licence": self.licence}


@dataclass
class Counts:
    """What became of every row; `read` is the sum of all others."""

    read: Counter[str] = field(default_factory=Counter)  # by file
    kept: Counter[str] = field(default_factory=Counter)  # by file
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by file and reason
    rows_of: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # kept, by source, licence and language
    ignored: Counter[str] = field(default_factory=Counter)  # keys that are not used, in rows
    personal: Counter[str] = field(default_factory=Counter)  # kinds of numbers, in rows that are kept

    def __str__(self) -> str:
        kept, read, dropped = self.kept.total(), self.read.total(), self.dropped.total()
        return f"{read} rows read, {kept} kept, {dropped} dropped"


def prepare(
    files: list[Path], columns: str | None, source: str | None, licence: str | None, counts: Counts
) -> Iterator[Prepared | Reject]:
    """Each row of `files` in order, kept or rejected, and counted in `counts`.

    source, licence: of rows that say nothing about it. Raises DataError for a file that cannot be read or holds no row.
    """
    seen, rows_of = set(), readers.reader(columns)
    for file in files:
        name = str(file)
        for line, value in rows_of(file):
            counts.read[name] += 1
            ignored: Counter[str] = Counter()
            try:
                found = _prepared(value(), ignored, source or file.name, licence or UNKNOWN)
                key = hashlib.blake2b(repr(found.conversation).encode(), digest_size=16).digest()
                if key in seen:
                    raise ValueError(DUPLICATE)
            except ValueError as error:
                counts.dropped[name, kind_of_reason(str(error))] += 1
                yield Reject(name, line, str(error))
                continue
            seen.add(key)
            counts.kept[name] += 1
            counts.rows_of[found.source, found.licence, found.language] += 1
            counts.ignored.update(ignored.keys())
            texts = "\n".join(part for turn in found.conversation.turns for part in turn)
            counts.personal.update(kind for kind, pattern in PERSONAL.items() if pattern.search(texts))
            yield found
        if counts.read[name] == 0:
            raise DataError(f"{file}: no usable row: the file holds none")


def _prepared(row: object, ignored: Counter[str], source: str, licence: str) -> Prepared:
    found = conversation(row, ignored)
    assert isinstance(row, dict)  # or `conversation` has raised

    def said(*keys: str, default: str) -> str:
        return next((text(row[key], key) for key in keys if not is_absent(row.get(key))), default)

    return Prepared(
        found,
        said("source", default=source),
        said("licence", "license", default=licence),
        said("language", "lang", default=found.language),
    )


def kind_of_reason(reason: str) -> str:
    """A reason without what is of one row alone: numbers, and what came."""
    return re.sub(r"\d+", "N", re.split(r"[,;] got ", reason)[0])[:100]


def card(counts: Counts, title: str) -> str:
    """The counts as Markdown."""
    lines = [f"# {title}", "", "No medical advice: for learning and research alone.", "", f"{counts}.", ""]
    lines += ["| file | read | kept | dropped |", "|---|---|---|---|"]
    for file, read in counts.read.items():
        lines.append(f"| {_cell(file)} | {read} | {counts.kept[file]} | {read - counts.kept[file]} |")
    lines += ["", "| source | licence | language | rows |", "|---|---|---|---|"]
    for (source, licence, language), number in sorted(counts.rows_of.items()):
        lines.append(f"| {_cell(source)} | {_cell(licence)} | {_cell(language)} | {number} |")
    if counts.dropped:
        lines += ["", "| file | dropped because a row | rows |", "|---|---|---|"]
        for (file, reason), number in sorted(counts.dropped.items()):
            lines.append(f"| {_cell(file)} | {_cell(reason)} | {number} |")
    for title, found in (("Personal numbers, which were left in", counts.personal), ("Keys not used", counts.ignored)):
        if found:
            rows = ", ".join(f"{_cell(key)} in {number} rows" for key, number in found.most_common(50))
            lines += ["", f"{title}: {rows}."]
    if any(licence == UNKNOWN for _, licence, _ in counts.rows_of):
        lines += ["", "Rows of an unknown licence: `--licence` names it where the files do not."]
    return "\n".join(lines) + "\n"


def _cell(value: str) -> str:
    return re.sub(r"[|\r\n`<]", " ", value.encode("utf-8", "replace").decode())


def write(files: list[Path], output: Path, columns: str | None, source: str | None, licence: str | None) -> Counts:
    """Write the rows, the card and the rejects; all of them take their places once all rows were read.

    Raises DataError as `prepare` does, where no row is kept, and for an output that exists.
    """
    card_path, rejects_path = output.with_suffix(".md"), output.with_suffix(".rejected.jsonl")
    for path in (output, card_path, rejects_path):
        if path.exists():
            raise DataError(f"{path}: exists: remove it, or name another --output")
    counts, unfinished = Counts(), {path: path.with_name(f".{path.name}.unfinished") for path in (output, rejects_path)}
    try:
        with (
            unfinished[output].open("w", encoding="utf-8") as kept,
            unfinished[rejects_path].open("w", encoding="utf-8") as rejected,
        ):
            for found in prepare(files, columns, source, licence, counts):
                if isinstance(found, Reject):
                    entry = {"file": found.file, "line": found.line, "reason": found.reason}
                    rejected.write(json.dumps(entry, ensure_ascii=True) + "\n")
                else:
                    kept.write(json.dumps(found.as_row(), ensure_ascii=False) + "\n")
        if not counts.kept:
            reasons = shown([reason for (_, reason), _ in counts.dropped.most_common(3)])
            raise DataError(f"no usable row: {counts}, mostly since: {reasons}")
        card_path.write_text(card(counts, output.name), encoding="utf-8")
        os.replace(unfinished[output], output)
        if counts.dropped:
            os.replace(unfinished[rejects_path], rejects_path)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
    return counts


@lasting()
def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m zerolite.medqa.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write; it must not exist")
    parser.add_argument("--columns", help="what columns are: question=title,context=ask,answer=reply")
    parser.add_argument("--source", help="of rows that name none (default: the file's name)")
    parser.add_argument("--licence", help="of rows that name none (default: unknown)")
    given = parser.parse_args(argv)
    try:
        if given.columns:
            columns_of(given.columns)
        counts = write(given.files, given.output, given.columns, given.source, given.licence)
    except (ValueError, zerolite.ZeroliteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(card(counts, given.output.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
