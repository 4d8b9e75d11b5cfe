"""The loss: cross entropy summed over label tokens, and its mean over a validation set."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from zerolite.medqa.batches import collate, micro_batches
from zerolite.medqa.processes import Processes, StopSignals
from zerolite.medqa.prompts import IGNORED, Example


def label_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies (nats) of a batch's label tokens: a scalar of at least fp32; 0 without labels.

    `batch` as `collate` gives it, on the CPU. A sum, for the caller to divide by the tokens of the whole step; a mean
    over each micro-batch would weigh tokens by how rows were split. The prompt's logits are not computed.
    """
    labels = batch["labels"]
    first = int((labels != IGNORED).any(dim=0).int().argmax())  # first position with a label in any row
    num_kept = labels.shape[1] - max(first - 1, 0)
    targets = F.pad(labels[:, -num_kept:][:, 1:], (0, 1), value=IGNORED).flatten()  # (rows * num_kept,)
    positions = (targets != IGNORED).nonzero().flatten()  # found on the CPU: no wait for the device
    device = next(model.parameters()).device
    logits = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        use_cache=False,
        logits_to_keep=num_kept,
    ).logits.flatten(0, 1)  # (rows * num_kept, vocabulary)
    logits = logits.index_select(0, positions.to(device))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets[positions].to(device), reduction="sum")


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    examples: list[Example],
    processes: Processes,
    batch_rows: int,
    pad_token_id: int,
    signals: StopSignals | None = None,
) -> float | None:
    """Mean loss a label token (nats) over all examples and ranks; None once a rank received one of `signals`.

    Every rank must call it, and makes as many forward passes, though rows may not divide evenly: at stage 3 each is
    a collective.
    """
    rows = np.argsort([len(example.input_ids) for example in examples], kind="stable")
    loss_sum, num_labels = 0.0, 0
    model.eval()
    try:
        for micro_batch in micro_batches(rows, processes.rank, processes.world_size, batch_rows):
            if signals is not None and signals.agreed(processes.sum(*signals.counts())):
                return None
            chosen = [examples[row] for row in micro_batch]
            loss_sum += label_loss(model, collate(chosen, pad_token_id)).item()
            num_labels += sum(example.num_labels for example in chosen)
    finally:
        model.train()
    loss_sum, num_labels = processes.sum(loss_sum, num_labels)
    return loss_sum / num_labels
