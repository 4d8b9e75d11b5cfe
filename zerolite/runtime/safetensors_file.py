"""A safetensors file, written one tensor at a time."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

# Names of dtypes in safetensors files.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_safetensors(
    path: Path,
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Write the tensors of `entries` (name, dtype, shape), in that order, one in memory at a time.

    safetensors.torch.save_file takes them all at once: for states that are decoded or on a device, a copy of them all.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in entries:
        if dtype not in DTYPES:
            raise TypeError(f"{name} is of {dtype}, which safetensors files do not hold: convert it")
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, dtype, shape), tensor in zip(entries, tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, announced {dtype} {shape}")
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
