"""A Hugging Face folder of tensors that come a few at a time: of transformers, of diffusers, or of any module."""

import json
import shutil
import uuid
from pathlib import Path

import torch
import transformers
from torch import nn

from zerolite.checkpoint.diffusers_models import is_diffusers
from zerolite.checkpoint.reversal import Reversal
from zerolite.checkpoint.weight_files import DIFFUSERS, TRANSFORMERS
from zerolite.runtime import atomic_dir as files
from zerolite.runtime import safetensors_file
from zerolite.shards.dtensors import local_of

FILE_BYTES = 2 << 30  # a file of an export, and so the host memory that writing it takes


class FolderWriter:
    """A Hugging Face folder that appears when it is whole; tensors are held until they fill a file of FILE_BYTES."""

    def __init__(self, folder: Path, model: nn.Module, described: dict[str, torch.Tensor]):
        """described: all that will be added, on the meta device."""
        self.folder = folder
        self.model = model
        self.names = DIFFUSERS if is_diffusers(model) else TRANSFORMERS
        self.reversal = Reversal(model, described)
        self.written = files.beside(folder, uuid.uuid4().hex[:12])
        self.pending: dict[str, torch.Tensor] = {}
        self.weight_map: dict[str, int] = {}
        self.pending_bytes = self.total_bytes = 0
        self.num_files = 0

    def open(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no folder, and an export writes one: name another")
        if self.folder.is_dir() and any(path.is_dir() for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds folders, which an export would remove: name another folder")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        files.restore(self.folder)
        files.remove_leftovers(self.folder)
        self.written.mkdir()

    def discard(self) -> None:
        shutil.rmtree(self.written, ignore_errors=True)

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        tensors = self.reversal.add(tensors)
        self.pending.update({name: tensor.contiguous() for name, tensor in tensors.items()})
        self.pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.pending_bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        self.num_files += 1
        path = self.written / f"part-{self.num_files}"
        # safetensors' own save_file makes a file that the owner alone can read; it, too, has wide dtypes first.
        names = sorted(self.pending, key=lambda name: (-self.pending[name].dtype.itemsize, name))
        entries = [(name, self.pending[name].dtype, tuple(self.pending[name].shape)) for name in names]
        safetensors_file.write_safetensors(path, entries, (self.pending[name] for name in names), {"format": "pt"})
        files.sync_file(path)
        self.weight_map.update(dict.fromkeys(self.pending, self.num_files))
        self.total_bytes += sum(tensor.nbytes for tensor in self.pending.values())
        self.pending, self.pending_bytes = {}, 0

    def finish(self, buffers: dict[str, torch.Tensor]) -> None:
        self.add({name: local_of(buffer).cpu() for name, buffer in buffers.items()})
        self.flush()
        expected = self.reversal.expected()
        if expected != set(self.weight_map):
            unlike = sorted(expected ^ set(self.weight_map))
            raise ValueError(
                f"transformers would write other tensors than one unit after the other gives: {', '.join(unlike[:4])}; "
                "call save_pretrained inside zerolite.full_params instead"
            )
        if self.num_files == 1:
            (self.written / "part-1").rename(self.written / self.names.single)
        else:
            names = [self.names.part(number, self.num_files) for number in range(1, self.num_files + 1)]
            for number, name in enumerate(names, start=1):
                (self.written / f"part-{number}").rename(self.written / name)
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {key: names[number - 1] for key, number in sorted(self.weight_map.items())},
            }
            (self.written / self.names.index).write_text(json.dumps(index, indent=1), encoding="utf-8")
        self._write_config()
        self._keep_others()
        files.commit_folder(self.written, self.folder)

    def _write_config(self) -> None:
        model = self.model
        if is_diffusers(model):
            model.save_config(self.written)
        elif isinstance(model, transformers.PreTrainedModel):
            model.config.architectures = [type(model).__name__]
            model.config.dtype = next(iter(model.parameters())).dtype
            model.config.save_pretrained(self.written)
            if model.can_generate():
                model.generation_config.save_pretrained(self.written)

    def _keep_others(self) -> None:
        """Files that are not of the weights (a tokenizer) stay when a folder is replaced."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                is_weights = path.name.endswith(".safetensors") or path.name == self.names.index
                if path.is_file() and not is_weights and not (self.written / path.name).exists():
                    shutil.copy2(path, self.written / path.name)
