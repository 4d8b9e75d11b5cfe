"""The loss: cross entropy summed over label tokens, and its means over the groups of a validation set.

[Note: the loss in the output layer]
With a large vocabulary the logits are the largest tensor of a step. So the output layer does not compute them: for the
time of a call it takes the hidden states of the label tokens to their summed loss, which the model returns in the
logits' place. The model itself is called, since at stage 3 the layer's weight is whole only inside its forward, and
since in fp16 the loss is scaled where it leaves the model.

That is right only where a model returns what its output layer gives. In transformers 5.24 some fifty classes scale,
cap, cut or mask their logits, under ten names; so no name is looked for, the model is asked: once, with two tokens.
Where it changes its logits, and where its output layer is no plain nn.Linear (an adapter on it), they are computed
whole, those of the label tokens and what lies between them.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from zerolite_kernels.loss import linear_cross_entropy

from zerolite.medqa import row_attention
from zerolite.medqa.batches import collate, micro_batches
from zerolite.medqa.images.sight import SIGHTS
from zerolite.medqa.processes import Processes, StopSignals
from zerolite.medqa.prompts import IGNORED, Example


def label_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies (nats) of a batch's label tokens: a scalar of at least fp32; 0 without labels.

    In a packed batch, which has `position_ids`, no token sees another row.

    `batch` as `collate` gives it, on the CPU. A sum, for the caller to divide by the tokens of the whole step; a mean
    over each micro-batch would weigh tokens by how rows were split. The prompt's logits are not computed, those of the
    label tokens a chunk at a time. See [Note: the loss in the output layer]. At stage 3 every rank must call it.
    """
    return at_labels(model, batch, _of_hidden, _of_logits)


def _of_hidden(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    return linear_cross_entropy(hidden, head.weight, targets, head.bias, ignore_index=None)


def _of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_at_least_fp32(logits), targets, reduction="sum")


def at_labels(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    of_hidden: Callable[[torch.Tensor, torch.Tensor, nn.Linear], torch.Tensor],
    of_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What `of_hidden` makes of the label tokens in the output layer's forward, where that layer gives the logits.

    of_hidden: given hidden states (label tokens, hidden size), label ids (label tokens,), the output layer. of_logits:
    given logits (label tokens, vocabulary) and label ids, for every other model. Label tokens lie row after row. At
    stage 3 every rank must call it. See [Note: the loss in the output layer].
    """
    if "pixel_values" not in batch and model in SIGHTS:
        batch = SIGHTS[model].with_blank(batch)
    is_packed, kept_apart = "position_ids" in batch, {}
    if is_packed and row_attention.is_flash(model.config):
        batch = row_attention.flattened(batch)
        kept_apart = row_attention.varlen(batch["position_ids"])
    labels = batch["labels"]
    first = int((labels != IGNORED).any(dim=0).int().argmax())  # first position with a label in any row
    num_kept = labels.shape[1] - max(first - 1, 0)
    targets = F.pad(labels[:, -num_kept:][:, 1:], (0, 1), value=IGNORED).flatten()  # (rows * num_kept,)
    positions = (targets != IGNORED).nonzero().flatten()  # found on the CPU: no wait for the device
    device = next(model.parameters()).device
    targets, positions = _send(targets[positions], device), _send(positions, device)
    sent = {name: _send(values, device) for name, values in (batch | kept_apart).items() if name != "labels"}
    if is_packed:
        sent |= row_attention.mask(sent["position_ids"], model)
    inputs = _inputs(num_kept, **sent)

    def of_labels(values: torch.Tensor) -> torch.Tensor:
        """(rows, num_kept or more, n) -> (label tokens, n): virtual tokens come before the batch's."""
        return values[:, -num_kept:].flatten(0, 1).index_select(0, positions)

    head = _linear_head(model)
    if head is None or not _returns_its_head(model, head, device):
        return of_logits(of_labels(model(**inputs).logits), targets)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return of_hidden(of_labels(hidden), targets, head)

    output, is_returned = _call(model, head, forward, inputs)
    if not is_returned:
        raise RuntimeError(
            f"{type(model).__name__} returned its output layer's result once and now something else: "
            "its loss cannot be taken in the output layer; have it compute logits in one way"
        )
    return output.logits


def _send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; the host does not wait for it, so that it can be a micro-batch ahead. Numbers stay."""
    if device.type == "cpu" or not isinstance(values, torch.Tensor):
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _inputs(num_kept: int, **tensors: torch.Tensor) -> dict:
    return {**tensors, "use_cache": False, "logits_to_keep": num_kept}


def _at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _linear_head(model: nn.Module) -> nn.Linear | None:
    """The output layer, if it is linear and nothing else."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear and "forward" not in vars(head) else None


_ANSWERS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what `_returns_its_head` found out


def _returns_its_head(model: nn.Module, head: nn.Linear, device: torch.device) -> bool:
    """Whether the model's logits are the very tensor that its output layer returns, (rows, tokens, vocabulary)."""
    if model not in _ANSWERS:
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
        inputs = _inputs(2, input_ids=tokens, attention_mask=torch.ones_like(tokens))
        training = [module for module in model.modules() if module.training]
        model.eval()  # no dropout: nothing is drawn
        try:
            with torch.inference_mode(False), torch.no_grad():
                # In the loss's dtype, so that a model's `logits.float()` changes neither.
                linear = lambda hidden: _at_least_fp32(F.linear(hidden, head.weight, head.bias))  # noqa: E731
                output, is_returned = _call(model, head, linear, inputs)
        finally:
            for module in training:
                module.training = True
        is_untouched = is_returned and output.logits._version == 0  # written to by nobody since
        _ANSWERS[model] = is_untouched and output.logits.dim() == 3 and output.logits.shape[:2] >= (1, 2)
    return _ANSWERS[model]


def _call(
    model: nn.Module, head: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor], inputs: dict
) -> tuple[object, bool]:
    """The model's output with `forward(hidden)` as its output layer's, and whether its logits are that very result.

    The output layer's hooks run as ever: at stage 3 they gather its weight.
    """
    results, is_returned = [], False

    def run(hidden: torch.Tensor) -> torch.Tensor:
        results.append(forward(hidden))
        return results[-1]

    def compare(module, args, output) -> None:
        nonlocal is_returned
        is_returned = len(results) == 1 and output.logits is results[0]

    hook = model.register_forward_hook(compare, prepend=True)  # before the engine's, one of which scales the output
    head.forward = run
    try:
        output = model(**inputs)
    finally:
        del head.forward
        hook.remove()
    return output, is_returned


ALL = "all"


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    groups: dict[str, list[Example]],
    processes: Processes,
    batch_rows: int,
    pad_token_id: int,
    signals: StopSignals | None = None,
) -> dict[str, float] | None:
    """Mean loss a label token (nats), over all ranks, of `ALL` examples and of each group that has a label token.

    None once a rank received one of `signals`. Every rank must call it, and makes as many forward passes, though rows
    may not divide evenly: at stage 3 each is a collective. No forward pass mixes groups.
    """
    sums = []  # of each group: its losses, then its label tokens
    model.eval()
    try:
        for examples in groups.values():
            rows = np.argsort([len(example.input_ids) for example in examples], kind="stable")
            loss_sum, num_labels = 0.0, 0
            for micro_batch in micro_batches(rows, processes.rank, processes.world_size, batch_rows):
                if signals is not None and signals.agreed(processes.sum(*signals.counts())):
                    return None
                chosen = [examples[row] for row in micro_batch]
                loss_sum += label_loss(model, collate(chosen, pad_token_id)).item()
                num_labels += sum(example.num_labels for example in chosen)
            sums += [loss_sum, num_labels]
    finally:
        model.train()
    sums = processes.sum(*sums)
    means = {name: loss / n for name, loss, n in zip(groups, sums[::2], sums[1::2], strict=True) if n}
    return {ALL: sum(sums[::2]) / sum(sums[1::2]), **means}
