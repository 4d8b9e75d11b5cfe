"""What a rank takes out of the files while it loads a Hugging Face folder: elements by ranges, and tensors whole."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

import zerolite
from zerolite.checkpoint import weight_files


def count_reads(folder: Path, stage: int = 3) -> tuple[int, int, set[str]]:
    """(elements read by ranges, parameters, tensors read whole) of this rank."""
    read, whole = 0, set()

    class Slice:
        def __init__(self, inner) -> None:
            self.inner = inner
            self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

        def __getitem__(self, key):
            nonlocal read
            values = self.inner[key]
            read += values.numel()
            return values

    class Handle:
        def __init__(self, *args, **options) -> None:
            self.inner = safe_open(*args, **options)
            self.keys = self.inner.keys

        def get_slice(self, key):
            return Slice(self.inner.get_slice(key))

        def get_tensor(self, key):
            whole.add(key)
            return self.inner.get_tensor(key)

        def __exit__(self, *exception):
            return self.inner.__exit__(*exception)

    weight_files.safe_open = Handle
    try:
        model = zerolite.load_pretrained(folder, stage=stage)
    finally:
        weight_files.safe_open = safe_open
    return read, sum(parameter.numel() for parameter in model.parameters()), whole
