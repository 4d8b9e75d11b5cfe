"""The order of rows: length-grouped global batches that depend on the seed and on the rows alone.

A global batch is what one optimizer step learns from: world size x micro-batch x accumulation rows. Ranks divide it
only afterwards, so (batch 8), (batch 4 x accumulation 2) and (2 ranks x batch 4) learn from the same rows at each
step. The order is a function of (seed, epoch), so a position in the data is one number, the step.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from zerolite.medqa.prompts import IGNORED, Example

# Rows are sorted by length inside windows of so many global batches: little padding, and still another mixture of
# rows in each epoch.
WINDOW_BATCHES = 16


class Order:
    """Which rows each optimizer step sees."""

    def __init__(self, lengths: list[int], global_batch_rows: int, seed: int):
        self.lengths = np.asarray(lengths)
        self.global_batch_rows = global_batch_rows
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(lengths) / global_batch_rows)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of each step; every row once. One batch has fewer rows where they do not divide evenly."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = rng.permutation(len(self.lengths))
        window = WINDOW_BATCHES * self.global_batch_rows
        batches = []
        for start in range(0, len(rows), window):
            inside = rows[start : start + window]
            inside = inside[np.argsort(self.lengths[inside], kind="stable")]
            batches += [inside[i : i + self.global_batch_rows] for i in range(0, len(inside), self.global_batch_rows)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, row numbers) for the steps `start` to `stop` - 1 of a run."""
        batches: list[np.ndarray] = []
        for step in range(start, stop):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0 or not batches:
                batches = self.epoch(epoch)
            yield step, batches[index]


def micro_batches(rows: np.ndarray, rank: int, world_size: int, batch_rows: int) -> list[np.ndarray]:
    """This rank's part of a global batch: as many micro-batches on every rank, of at most `batch_rows` rows each.

    Ranks take the rows of a micro-batch in turn, so that each has long and short ones. In a batch that does not
    divide evenly the last ranks have fewer rows, or none: then a micro-batch is empty, and it still takes part in
    the collectives.
    """
    together = world_size * batch_rows
    return [rows[start : start + together][rank::world_size] for start in range(0, len(rows), together)]


def collate(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (rows, longest) int64, padded on the right.

    Where an example holds several rows, `position_ids` in place of the mask: each row, and the padding, begins at 0. No
    example at all gives one row of one padding token without labels: a forward pass that adds nothing. Images of the
    examples are read here, and are there as the model's image processor gives them (`pixel_values` ...).
    """
    rows, longest = max(len(examples), 1), max((len(e.input_ids) for e in examples), default=1)
    batch = {
        "input_ids": torch.full((rows, longest), pad_token_id),
        "attention_mask": torch.zeros((rows, longest), dtype=torch.int64),
        "labels": torch.full((rows, longest), IGNORED),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.from_numpy(example.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = torch.from_numpy(example.labels)
    if not examples:
        batch["attention_mask"][:] = 1  # a row that attends to nothing would be NaN in some attention kernels
    if any(len(example.starts) > 1 for example in examples):
        del batch["attention_mask"]
        batch["position_ids"] = torch.stack([_positions(example, longest) for example in examples])
    images = [image for example in examples for image in example.images]
    sight = next((example.sight for example in examples if example.sight is not None), None)
    if sight is not None:
        batch |= sight.inputs(images, batch["input_ids"])
    return batch


def _positions(example: Example, longest: int) -> torch.Tensor:
    starts = [*example.starts, len(example.input_ids), longest]  # the padding is a row of its own
    return torch.cat([torch.arange(end - start) for start, end in zip(starts, starts[1:], strict=False)])


def fingerprint(examples: list[Example]) -> str:
    """Hash of all token ids and labels in order: two ranks, or a run and its resumption, read the same data or not."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(4, "little"))
        digest.update(example.input_ids.tobytes() + example.labels.tobytes())
        digest.update("".join(image.digest for image in example.images).encode())
    return digest.hexdigest()[:16]
