"""Files of any layout that is read as one file of checked rows, with a card that says what became of each row.

`zerolite prepare FILES --output rows.jsonl` writes rows of `messages` (or `text`), `language`, `source`, `licence` and
`group`, which `train_medqa.py` reads, and beside them `rows.md` (the card) and `rows.rejected.jsonl`. `--val_size` puts
a part of them into `rows.validation.jsonl`, in whole groups. Rows that are not usable and exact duplicates are left out
and counted; near duplicates are counted, and stay in one group. Nothing here is medical advice.
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

from zerolite import DataError
from zerolite.medqa import readers, terminal
from zerolite.medqa.data import Reject
from zerolite.medqa.layouts import columns_of
from zerolite.medqa.rows import Passage, Row, is_absent, shown, text, usable
from zerolite.medqa.split import check_size, groups_of, split
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

    row: Row
    source: str
    licence: str
    language: str

    def as_row(self) -> dict[str, object]:
        """The row as it is written: answers without loss have weight 0."""
        row, messages = self.row, []
        known = {"language": self.language, "source": self.source, "licence": self.licence}
        known |= {"group": row.group} if row.group else {}
        if isinstance(row, Passage):
            return {"text": row.text, **known}
        if row.system:
            messages.append({"role": "system", "content": row.system})
        for turn, (question, answer) in enumerate(row.turns):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer} | ({} if row.has_loss(turn) else {"weight": 0}))
        return {"messages": messages, **known}

    @property
    def texts(self) -> str:
        """All that a person said or asked."""
        if isinstance(self.row, Passage):
            return self.row.text
        return "\n".join(part for turn in self.row.turns for part in turn)


@dataclass
class Counts:
    """What became of every row; `read` is the sum of all others."""

    read: Counter[str] = field(default_factory=Counter)  # by file
    kept: Counter[str] = field(default_factory=Counter)  # by file
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by file and reason
    rows_of: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # kept, by source, licence and language
    ignored: Counter[str] = field(default_factory=Counter)  # keys that are not used, in rows
    personal: Counter[str] = field(default_factory=Counter)  # kinds of numbers, in rows that are kept
    written: dict[str, Counter[str]] = field(default_factory=dict)  # rows of a file that was written, by language
    groups: str = ""  # what the kept rows share, for people

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
                key = hashlib.blake2b(repr(found.row).encode(), digest_size=16).digest()
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
            counts.personal.update(kind for kind, pattern in PERSONAL.items() if pattern.search(found.texts))
            yield found
        if counts.read[name] == 0:
            raise DataError(f"{file}: no usable row: the file holds none")


def _prepared(row: object, ignored: Counter[str], source: str, licence: str) -> Prepared:
    found = usable(row, ignored)
    assert isinstance(row, dict)  # or `usable` has raised

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
        lines.append(f"| {cell(file)} | {read} | {counts.kept[file]} | {read - counts.kept[file]} |")
    lines += ["", "| source | licence | language | rows |", "|---|---|---|---|"]
    for (source, licence, language), number in sorted(counts.rows_of.items()):
        lines.append(f"| {cell(source)} | {cell(licence)} | {cell(language)} | {number} |")
    lines += [
        "",
        f"Kept rows that share something are of one group: {counts.groups}.",
        "",
        "| written to | language | rows |",
        "|---|---|---|",
    ]
    for file, languages in counts.written.items():
        lines += [f"| {cell(file)} | {cell(language)} | {number} |" for language, number in sorted(languages.items())]
    if counts.dropped:
        lines += ["", "| file | dropped because a row | rows |", "|---|---|---|"]
        for (file, reason), number in sorted(counts.dropped.items()):
            lines.append(f"| {cell(file)} | {cell(reason)} | {number} |")
    for title, found in (("Personal numbers, which were left in", counts.personal), ("Keys not used", counts.ignored)):
        if found:
            rows = ", ".join(f"{cell(key)} in {number} rows" for key, number in found.most_common(50))
            lines += ["", f"{title}: {rows}."]
    if any(licence == UNKNOWN for _, licence, _ in counts.rows_of):
        lines += ["", "Rows of an unknown licence: `--licence` names it where the files do not."]
    return "\n".join(lines) + "\n"


def cell(value: str) -> str:
    """A text as a cell of a Markdown table."""
    return re.sub(r"[|\r\n`<]", " ", value.encode("utf-8", "replace").decode())


@dataclass(frozen=True)
class Split:
    """How many rows are to be validated on, as `--val_size` says, and the seed that they are drawn by."""

    size: float
    seed: int


def write(
    files: list[Path],
    output: Path,
    columns: str | None,
    source: str | None,
    licence: str | None,
    validation: Split | None = None,
) -> Counts:
    """Write the rows, the card and the rejects; all of them take their places once all rows were read.

    Raises DataError as `prepare` and `split` do, where no row is kept, and for an output that exists.
    """
    rejects_path, held_out_path = output.with_suffix(".rejected.jsonl"), output.with_suffix(".validation.jsonl")
    card_path, written = output.with_suffix(".md"), [output, rejects_path] + [held_out_path] * (validation is not None)
    for path in (*written, card_path):
        if path.exists():
            raise DataError(f"{path}: exists: remove it, or name another --output")
    counts, unfinished = Counts(), {path: path.with_name(f".{path.name}.unfinished") for path in written}
    try:
        rows: list[Prepared] = []
        with unfinished[rejects_path].open("w", encoding="utf-8") as rejected:
            for found in prepare(files, columns, source, licence, counts):
                if isinstance(found, Reject):
                    entry = {"file": found.file, "line": found.line, "reason": found.reason}
                    rejected.write(json.dumps(entry, ensure_ascii=True) + "\n")
                else:
                    rows.append(found)
        if not rows:
            reasons = shown([reason for (_, reason), _ in counts.dropped.most_common(3)])
            raise DataError(f"no usable row: {counts}, mostly since: {reasons}")
        groups = groups_of([one.row for one in rows])
        counts.groups, held_out = str(groups), set()
        if validation:
            held_out = set(split(groups, [one.language for one in rows], validation.size, validation.seed))
        for path, is_held_out in ((output, False), (held_out_path, True))[: len(written) - 1]:
            chosen = [one for number, one in enumerate(rows) if (number in held_out) == is_held_out]
            lines = [json.dumps(one.as_row(), ensure_ascii=False) + "\n" for one in chosen]
            unfinished[path].write_text("".join(lines), encoding="utf-8")
            counts.written[path.name] = Counter(one.language for one in chosen)
        card_path.write_text(card(counts, output.name), encoding="utf-8")
        for path in written:
            if path != rejects_path or counts.dropped:
                os.replace(unfinished[path], path)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
    return counts


@lasting()
def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for a mistake of the user."""
    return terminal.run("prepare", command, argv)


def command(argv: list[str]) -> None:
    """Raises ValueError for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="zerolite prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write; it must not exist")
    parser.add_argument("--columns", help="what columns are: question=title,context=ask,answer=reply, or text=body")
    parser.add_argument("--source", help="of rows that name none (default: the file's name)")
    parser.add_argument("--licence", help="of rows that name none (default: unknown)")
    parser.add_argument("--val_size", type=float, help="rows to validate on: below 1 a fraction, else how many")
    parser.add_argument("--seed", type=int, default=42, help="of the rows to validate on (default: 42)")
    given = parser.parse_args(argv)
    if given.columns:
        columns_of(given.columns)
    if given.val_size is not None:
        check_size(given.val_size)
    validation = Split(given.val_size, given.seed) if given.val_size else None
    counts = write(given.files, given.output, given.columns, given.source, given.licence, validation)
    print(card(counts, given.output.name))


if __name__ == "__main__":
    sys.exit(main())
