"""Who reads `parameter.data` may write through it, which no version counter tells: such a bucket is compared.

`for p in model.parameters(): p.data.clamp_(-c, c)` is how many loops clip weights. `.data` is a C attribute of tensors,
so `nn.Parameter` is given a property over it, once a process. Reading costs a Python call; setting is as it was. A
parameter that was read is compared with its shard where the engine gets control, and what differs is an edit:
parameter_guard.py. An alias that is kept and written later is seen with the next read alone.
"""

import functools

import torch
from torch import nn

_DATA = torch._C.TensorBase.data


@functools.cache
def note_data_reads() -> None:
    """For every parameter of this process, from now on."""
    nn.Parameter.data = property(read, _DATA.__set__, doc=_DATA.__doc__)


def read(parameter: nn.Parameter) -> torch.Tensor:
    info = parameter.__dict__.get("_zerolite_info")
    if info is not None and not info.is_gone:
        info.bucket.parameters.note_data_read(info.index)
    return _DATA.__get__(parameter)
