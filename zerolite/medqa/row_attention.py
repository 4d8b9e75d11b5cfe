"""What a model is given so that no token of a packed sequence attends to another row.

transformers finds packed rows by positions that begin again at 0, where no attention mask is given; for sdpa and eager
attention the model then asks the device whether there are any, which the host waits for in every forward pass. So where
all layers attend to all that came before, the mask is made here, on the device. Windows and chunks are left to
transformers. Flash attention takes one sequence and the places where rows begin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig


def is_flash(config: PretrainedConfig) -> bool:
    return "flash" in str(config.get_text_config()._attn_implementation)


def flattened(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A packed batch as one sequence: (1, rows * longest) each."""
    return {name: values.reshape(1, -1) for name, values in batch.items()}


def varlen(position_ids: torch.Tensor) -> dict[str, object]:
    """Flash attention's arguments for one sequence of rows; `position_ids` (1, tokens) on the CPU."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    ends = F.pad(starts, (0, 1), value=position_ids.shape[1]).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def mask(position_ids: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """`attention_mask` (rows, 1, tokens, tokens) for `position_ids` (rows, tokens) on the device; {}: the model's own.

    bool for sdpa, of the model's dtype for eager attention, which adds it.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager") or not _attends_to_all(config):
        return {}
    row = (position_ids == 0).cumsum(-1)
    allowed = (row[:, None, :, None] == row[:, None, None, :]).tril()
    if attention == "sdpa":
        return {"attention_mask": allowed}
    dtype = next(model.parameters()).dtype
    added = torch.zeros((), dtype=dtype, device=allowed.device)
    return {"attention_mask": torch.where(allowed, added, torch.finfo(dtype).min)}


def _attends_to_all(config: PretrainedConfig) -> bool:
    if types := getattr(config, "layer_types", None):
        return set(types) == {"full_attention"}
    return all(getattr(config, name, None) is None for name in ("sliding_window", "attention_chunk_size"))
