"""The data of a run: files read, rejects written, rows tokenised, all before any model is built."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zerolite import DataError
from zerolite.medqa import data, readers
from zerolite.medqa.arguments import CORPUS, Options
from zerolite.medqa.prompts import Example, encode

SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Corpus:
    train: list[Example]
    validation: list[Example]
    validation_rows: list[data.Conversation]
    summary: str  # what was read, kept, rejected and shortened, for people
    first_row: str  # the first training row as the model reads it, for people

    @property
    def validation_by_language(self) -> dict[str, list[Example]]:
        """The validation examples of each language that has some, "en" before "zh"."""
        found: dict[str, list[Example]] = {}
        for conversation, example in zip(self.validation_rows, self.validation, strict=True):
            found.setdefault(conversation.language, []).append(example)
        return dict(sorted(found.items()))


def load(options: Options, tokenizer: PreTrainedTokenizerBase, rejects: Path | None) -> Corpus:
    """Read and tokenise the training and the validation files.

    rejects: where `--skip_invalid` writes file, line and reason of each row left out; None: this rank writes nothing.
    Raises DataError as `data.read` does, and for a set without a single label token.
    """
    examples, rows, summary = {}, {}, []
    for name, files in (("train", options.train_file), ("validation", options.validation_file)):
        paths = [Path(file) for file in files] if files else sorted(CORPUS.glob(f"{name}.*.jsonl"))
        rows[name] = data.read(
            paths,
            skip_invalid=options.skip_invalid,
            max_samples=options.max_samples,
            rows_of=readers.reader(options.columns if files else None),
        )
        examples[name], num_shortened = encode(rows[name].kept, tokenizer, options.cutoff_len)
        summary.append(f"{name}: {rows[name]}; {require_labels(name, examples[name]):,} label tokens")
        if num_shortened:
            summary[-1] += f"; {num_shortened} rows shortened to --cutoff_len {options.cutoff_len}"
        summary += [f"  {line}" for line in rows[name].details()]
    if options.skip_invalid and rejects is not None:
        rejected = rows["train"].rejected + rows["validation"].rejected
        lines = [json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejected]
        rejects.write_text("".join(lines), encoding="utf-8")
    shown = tokenizer.decode(examples["train"][0].input_ids)
    shown = repr(shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}...")
    return Corpus(
        examples["train"],
        examples["validation"],
        rows["validation"].kept,
        "\n".join(summary),
        f"first row: {shown}",
    )


def require_labels(name: str, examples: list[Example]) -> int:
    """The number of label tokens; DataError where there is none: a loss over nothing is no loss."""
    num_labels = sum(example.num_labels for example in examples)
    if num_labels == 0:
        raise DataError(f"{name}: {len(examples)} rows without a single label token: nothing can be learned from them")
    return num_labels
