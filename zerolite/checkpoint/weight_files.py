"""The safetensors files of a Hugging Face folder, read by name and range."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give a local Hugging Face model folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give a local Hugging Face model folder")
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            names = _indexed(folder / INDEX)
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
        self.handles = [_open(folder / name) for name in names]
        self.entries = {key: handle for handle in self.handles for key in handle.keys()}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.__exit__(*exception)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.entries[key].get_slice(key).get_shape())

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


def _indexed(path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors files ({error}): download it again") from error


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): download it again") from error
