"""The safetensors files of a Hugging Face folder, read by name and range.

Their numbers are weights only where the folder says nothing else: a folder quantised by another tool holds codes, of
8 or 4 bits, that its scales turn into weights. Those are refused by name.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zerolite.runtime.safetensors_file import DTYPES


@dataclass(frozen=True)
class FileNames:
    """How a library names the files of one model."""

    stem: str

    @property
    def single(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    def part(self, number: int, of: int) -> str:
        return f"{self.stem}-{number:05d}-of-{of:05d}.safetensors"


TRANSFORMERS, DIFFUSERS = FileNames("model"), FileNames("diffusion_pytorch_model")
FLOATS = {"F64", "F32", "F16", "BF16"}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
END_BYTES = 1 << 20  # of each end of a file, in a digest
# Tensors beside or in place of weights: DeepSeek's and compressed-tensors' fp8, bitsandbytes, GPTQ and AWQ.
QUANTISED = re.compile(
    r"(_scale_inv|\.weight_scale|\.input_scale|\.SCB|\.weight_format|\.absmax|\.quant_map|\.quant_state\.\w+|"
    r"\.qweight|\.qzeros|\.weight_packed)$"
)


class Weights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give a local Hugging Face model folder")
        if (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
            models = sorted(path.parent.name for path in folder.glob("*/config.json"))
            raise ValueError(
                f"{folder} is a pipeline of diffusers, and a model is loaded: give the folder of one of its models "
                f"({', '.join(models[:8]) or 'it holds none'})"
            )
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give a local Hugging Face model folder")
        for library in (TRANSFORMERS, DIFFUSERS):
            if (folder / library.single).is_file():
                names = [library.single]
                break
            if (folder / library.index).is_file():
                names = _indexed(folder / library.index)
                break
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        missing = [name for name in names if not (folder / name).is_file()]
        if not names or missing:
            what = f"misses {', '.join(missing[:4])}" if missing else "holds no safetensors weights"
            raise ValueError(
                f"{folder} {what}: download all of the model, or convert its pytorch_model.bin with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        self.folder = folder
        self.names = names
        _check_config(folder)
        self.handles = [_open(folder / name) for name in names]
        self.entries = {key: handle for handle in self.handles for key in handle.keys()}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.__exit__(*exception)

    def digest(self) -> str:
        """A hash that tells folders apart: of config.json, and of the ends of every file. Not of all of their bytes."""
        found = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in self.names:
            with open(self.folder / name, "rb") as file:
                size = file.seek(0, 2)
                found.update(f"{name} {size}".encode())
                for start in (0, max(0, size - END_BYTES)):
                    file.seek(start)
                    found.update(file.read(END_BYTES))
        return found.hexdigest()

    def check_unquantised(self, names: Collection[str]) -> None:
        """ValueError for tensors that only a quantised folder has; `names`: the model's own parameters and buffers."""
        own = {name.rpartition(".")[2] for name in names}
        found = [key for key in self.entries if QUANTISED.search(key) and key.rpartition(".")[2] not in own]
        if found:
            raise _is_quantised(self.folder, f"holds {', '.join(sorted(found)[:4])}")

    def check_dtype(self, key: str, dtype: torch.dtype) -> None:
        """ValueError where the tensor is not of floats and is to be, or the other way round."""
        saved = self.entries[key].get_slice(key).get_dtype()
        if (saved in FLOATS) != dtype.is_floating_point:
            raise ValueError(
                f"{key} in {self.folder} is of {saved} and the model's of {dtype}: numbers of one are none of the "
                "other, so use a folder of weights in 16 or 32 bits"
            )

    def first_float_dtype(self) -> torch.dtype:
        """Of the first tensor of floats, as transformers takes it where config.json says none; else fp32."""
        found = (BY_NAME.get(self.entries[key].get_slice(key).get_dtype(), torch.float32) for key in self.entries)
        return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.entries[key].get_slice(key).get_shape())

    def whole(self, key: str) -> torch.Tensor:
        return self.entries[key].get_tensor(key)

    def read(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        """out (stop - start,) = elements [start, stop) of the flattened tensor; reads the rows that hold them."""
        if start == stop:
            return
        tensor, shape = self.entries[key].get_slice(key), self.shape(key)
        if not shape:
            out.copy_(self.entries[key].get_tensor(key).view(-1))
            return
        row_numel = 1
        for length in shape[1:]:
            row_numel *= length
        first, last = start // row_numel, -(-stop // row_numel)
        rows = tensor[first:last].reshape(-1)
        out.copy_(rows[start - first * row_numel : stop - first * row_numel])


def _check_config(folder: Path) -> None:
    """ValueError for a configuration that is no JSON, or that says that the weights are quantised."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({type(error).__name__}: {error}): download it again") from error
    for name in ("quantization_config", "compression_config"):
        method = config.get(name) if isinstance(config, dict) else None
        if method:
            kind = method.get("quant_method") if isinstance(method, dict) else method
            raise _is_quantised(folder, f"has a {name} of {kind or 'an unnamed method'} in config.json")


def _is_quantised(folder: Path, why: str) -> ValueError:
    return ValueError(
        f"{folder} is quantised: it {why}. load_pretrained reads weights, not codes and scales: use the folder of the "
        "same model in 16 or 32 bits, or save one with from_pretrained(...).dequantize() and save_pretrained"
    )


def _indexed(path: Path) -> list[str]:
    """The files that an index names, all in its own folder. They may be links, as in Hugging Face's cache."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of safetensors files ({error}): download it again") from error
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or name != Path(name).name:
            raise ValueError(f"{path} names {str(name)[:100]!r}, which is no safetensors file of its folder")
    return names


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): download it again") from error
