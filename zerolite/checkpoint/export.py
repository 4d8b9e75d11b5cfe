"""Export a Hugging Face folder, streamed: one unit is gathered at a time."""

import json
import shutil
import uuid
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from zerolite.checkpoint.slices import buffers_of
from zerolite.checkpoint.weight_files import INDEX, SINGLE
from zerolite.engine.engine import all_ranks, engine_of
from zerolite.engine.extensions import extensions_of
from zerolite.errors import ZeroliteError
from zerolite.runtime import atomic_dir as files
from zerolite.runtime import safetensors_file
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.bucket import Unit
from zerolite.shards.dtensors import local_of, whole_of

FILE_BYTES = 2 << 30  # a file of an export, and so the host memory that writing it takes


@torch.no_grad()
def export(model: nn.Module, folder) -> None:
    """Write whole parameters as a Hugging Face folder, in their dtype. Collective.

    Rank 0 writes. At stage 3 one unit is gathered at a time, and host memory has one file (2 GiB) at most.
    `AutoModelForCausalLM.from_pretrained` opens the folder. Tied weights stand once, under the name that transformers
    ties from. A model that is not of transformers gives its safetensors alone. An export that stands there is replaced;
    other files in the folder (a tokenizer) stay. Adapters are left out.

    Parameters that tensor parallelism splits are gathered whole, too, a unit at a time.

    Raises ValueError for a model that is not sharded, for a stage of a pipeline, and while an adapter is on and not
    merged, since the folder would not be the model that runs. Raises ZeroliteError on every rank where rank 0 cannot
    write, or where the folder is a file or holds folders; what stood there still stands then. Raises WorkerError where
    a worker failed.
    """
    engine = engine_of(model)
    if engine.mesh.pipeline:
        raise ValueError(
            "an export is of a whole model, and this rank has a stage of a pipeline: zerolite.save all stages, "
            "zerolite.load that into the whole model without a pipeline, on one process or more, and export it there"
        )
    for extension in extensions_of(model):
        extension.before_export(model)
    folder = Path(folder).resolve()
    ranks = all_ranks(engine)
    together = partial(on_all_ranks, ranks, f"exporting to {folder}", ZeroliteError)
    writer = FolderWriter(folder) if ranks.place()[0] == 0 else None
    engine.guard.check()
    together(lambda: writer.open() if writer is not None else None)
    buffers = buffers_of(model)
    try:
        for unit in engine.units:
            engine.unshard(unit)
            unit.wait()
            whole = {slot.name: whole_of(p) for bucket in unit.buckets for slot, p in bucket.slots() if slot.block}
            together(partial(_add, writer, model, unit, whole))
            engine.free(unit)
        together(lambda: writer.finish(model, buffers) if writer is not None else None)
    except ZeroliteError:
        engine.before_step()  # frees the unit that was gathered
        if writer is not None:
            writer.discard()
        raise


def _add(writer: "FolderWriter | None", model: nn.Module, unit: Unit, whole: dict[str, torch.Tensor]) -> None:
    if writer is not None:
        writer.add(model, _unsharded(model, unit, whole))


def _unsharded(model: nn.Module, unit: Unit, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the unit's parameters on the host, by the names that transformers ties from; without adapters'.

    whole: those that ranks of tensor parallelism have parts of.
    """
    ties = getattr(model, "all_tied_weights_keys", {})
    added = {id(p) for extension in extensions_of(model) for p in extension.adds(model)}
    return {
        ties.get(slot.name, slot.name): whole.get(slot.name, local_of(parameter)).detach().to("cpu", copy=True)
        for bucket in unit.buckets
        for slot, parameter in bucket.slots()
        if id(parameter) not in added
    }


class FolderWriter:
    """A Hugging Face folder that appears when it is whole; tensors are held until they fill a file of FILE_BYTES."""

    def __init__(self, folder: Path):
        self.folder = folder
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

    def add(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(model, transformers.PreTrainedModel):
            tensors = revert_weight_conversion(model, tensors)
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

    def finish(self, model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
        self.add(model, {name: local_of(buffer).cpu() for name, buffer in buffers.items()})
        self.flush()
        if self.num_files == 1:
            (self.written / "part-1").rename(self.written / SINGLE)
        else:
            names = [f"model-{n:05d}-of-{self.num_files:05d}.safetensors" for n in range(1, self.num_files + 1)]
            for number, name in enumerate(names, start=1):
                (self.written / f"part-{number}").rename(self.written / name)
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {key: names[number - 1] for key, number in sorted(self.weight_map.items())},
            }
            (self.written / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        if isinstance(model, transformers.PreTrainedModel):
            model.config.architectures = [type(model).__name__]
            model.config.dtype = next(iter(model.parameters())).dtype
            model.config.save_pretrained(self.written)
            if model.can_generate():
                model.generation_config.save_pretrained(self.written)
        self._keep_others()
        files.commit_folder(self.written, self.folder)

    def _keep_others(self) -> None:
        """Files that are not of the weights (a tokenizer) stay when a folder is replaced."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                is_weights = path.name.endswith(".safetensors") or path.name == INDEX
                if path.is_file() and not is_weights and not (self.written / path.name).exists():
                    shutil.copy2(path, self.written / path.name)
