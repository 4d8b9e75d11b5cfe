"""The data of a run: files read, rejects written, rows tokenised, all before any model is built."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zerolite import DataError
from zerolite.medqa import data, readers, split
from zerolite.medqa.arguments import CORPUS, Options
from zerolite.medqa.images import rows as image_rows
from zerolite.medqa.images.sight import sight_of
from zerolite.medqa.passages import encode_passages
from zerolite.medqa.prompts import Example, encode
from zerolite.medqa.rows import usable

SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Corpus:
    train: list[Example]
    validation: list[Example]
    validation_languages: list[str]  # of each validation example
    validation_rows: list[data.Conversation]
    summary: str  # what was read, kept, rejected and shortened, for people
    first_row: str  # the first training row as the model reads it, for people

    @property
    def validation_by_language(self) -> dict[str, list[Example]]:
        """The validation examples of each language that has some, "en" before "zh"."""
        found: dict[str, list[Example]] = {}
        for language, example in zip(self.validation_languages, self.validation, strict=True):
            found.setdefault(language, []).append(example)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Encoded:
    """Examples of rows, conversations before passages, and what people are told about them."""

    examples: list[Example]
    languages: list[str]  # of each example
    told: str


def load(options: Options, tokenizer: PreTrainedTokenizerBase, rejects: Path | None) -> Corpus:
    """Read and tokenise the training and the validation files.

    Validation rows are those of `--validation_file`, a part of the training rows (`--val_size`), or none; the shipped
    ones where the training rows are shipped. rejects: where `--skip_invalid` writes file, line and reason of each row
    left out; None: this rank writes nothing. Raises DataError as `data.read` and `split` do, and for a set without a
    single label token.
    """
    kept = usable
    if options.image_folder is not None:
        sight_of(tokenizer).processor  # noqa: B018  # a model's folder without one is told before any row
        kept = image_rows.fitting(image_rows.usable(Path(options.image_folder)), tokenizer, options.cutoff_len)
    read = {"train": _read(options, "train", options.train_file, kept)}
    if options.validation_file or not options.train_file:
        read["validation"] = _read(options, "validation", options.validation_file, kept)
    rows = {name: [*found.kept, *found.passages] for name, found in read.items()}
    told = {name: str(found) for name, found in read.items()}
    if options.val_size:
        rows["train"], rows["validation"], told["validation"] = split.apart(
            rows["train"], options.val_size, options.seed
        )
    encoded = {name: encode_rows(name, found, tokenizer, options.cutoff_len) for name, found in rows.items()}
    summary = []
    for name, one in encoded.items():
        summary.append(f"{name}: {told[name]}; {one.told}")
        summary += [f"  {line}" for line in read[name].details()] if name in read else []
    if "validation" not in rows:
        encoded["validation"] = Encoded([], [], "")
        summary.append("validation: none: --validation_file names rows, --val_size takes a part of yours")
    if options.skip_invalid and rejects is not None:
        rejected = [reject for found in read.values() for reject in found.rejected]
        lines = [json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejected]
        rejects.write_text("".join(lines), encoding="utf-8")
    shown = _shown(tokenizer, encoded["train"].examples[0])
    shown = repr(shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}...")
    return Corpus(
        encoded["train"].examples,
        encoded["validation"].examples,
        encoded["validation"].languages,
        [row for row in rows.get("validation", []) if isinstance(row, data.Conversation)],
        "\n".join(summary),
        f"first row: {shown}",
    )


def _shown(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Its text, where an image is one of its tokens and their number."""
    text = tokenizer.decode(example.input_ids)
    if example.sight is None:
        return text
    token = example.sight.token
    return re.sub(f"(?:{re.escape(token)})+", lambda found: f"{token} x {len(found[0]) // len(token)}", text)


def _read(
    options: Options, name: str, files: tuple[str, ...] | None, kept: Callable[[object, Counter[str]], data.Row]
) -> data.Rows:
    """The rows of the user's files, or the shipped ones of that name."""
    return data.read(
        [Path(file) for file in files] if files else sorted(CORPUS.glob(f"{name}.*.jsonl")),
        skip_invalid=options.skip_invalid,
        max_samples=options.max_samples,
        rows_of=readers.reader(options.columns if files else None),
        usable=kept,
    )


def encode_rows(name: str, rows: Sequence[data.Row], tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> Encoded:
    """Conversations as an example each, cut where they are too long; passages as many as hold them whole."""
    conversations = [row for row in rows if isinstance(row, data.Conversation)]
    passages = [row for row in rows if isinstance(row, data.Passage)]
    examples, num_shortened = encode(conversations, tokenizer, cutoff_len) if conversations else ([], 0)
    languages, of_passages = [row.language for row in conversations], encode_passages(passages, tokenizer, cutoff_len)
    for row, found in zip(passages, of_passages, strict=True):
        examples += found
        languages += [row.language] * len(found)
    told = f"{require_labels(name, examples):,} label tokens"
    if num_images := sum(len(row.images) for row in conversations):
        told += f"; {num_images} images in {sum(bool(row.images) for row in conversations)} rows"
    if num_shortened:
        told += f"; {num_shortened} rows shortened to --cutoff_len {cutoff_len}"
    if passages:
        num_examples, num_cut = sum(map(len, of_passages)), sum(len(found) > 1 for found in of_passages)
        told += f"; {len(passages)} texts in {num_examples} examples, {num_cut} of them cut and nothing left out"
    return Encoded(examples, languages, told)


def require_labels(name: str, examples: list[Example]) -> int:
    """The number of label tokens; DataError where there is none: a loss over nothing is no loss."""
    num_labels = sum(example.num_labels for example in examples)
    if num_labels == 0:
        raise DataError(f"{name}: {len(examples)} rows without a single label token: nothing can be learned from them")
    return num_labels
