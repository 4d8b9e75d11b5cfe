"""Export a Hugging Face folder, streamed: one unit is gathered at a time."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from zerolite.checkpoint.folder_writer import FolderWriter
from zerolite.checkpoint.slices import buffers_of
from zerolite.engine.engine import Engine, all_ranks, engine_of
from zerolite.engine.extensions import extensions_of
from zerolite.errors import ZeroliteError
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.bucket import Unit
from zerolite.shards.dtensors import local_of, whole_of


@torch.no_grad()
def export(model: nn.Module, folder) -> None:
    """Write whole parameters as a Hugging Face folder, in their dtype. Collective.

    Rank 0 writes. At stage 3 one unit is gathered at a time, and host memory has one file (2 GiB) at most.
    `from_pretrained` of the model's class opens the folder, and so does `load_pretrained`: the tensors are those that
    `save_pretrained` writes, under the names and in the shapes of the original files where transformers converts on
    load. Tied weights stand once, under the name that transformers ties from. A model of neither transformers nor
    diffusers gives its safetensors alone. An export that stands there is replaced; other files in the folder (a
    tokenizer) stay. Adapters are left out.

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
    buffers = buffers_of(model)
    writers: list[FolderWriter] = []

    def open_folder() -> None:
        if ranks.place()[0] == 0:
            writers.append(FolderWriter(folder, model, _described(engine, buffers)))
            writers[0].open()

    engine.guard.check()
    together(open_folder)
    writer = writers[0] if writers else None
    try:
        for unit in engine.units:
            engine.unshard(unit)
            unit.wait()
            whole = {slot.name: whole_of(p) for bucket in unit.buckets for slot, p in bucket.slots() if slot.block}
            together(partial(_add, writer, unit, whole))
            engine.free(unit)
        together(lambda: writer.finish(buffers) if writer is not None else None)
    except ZeroliteError:
        engine.before_step()  # frees the unit that was gathered
        if writer is not None:
            writer.discard()
        raise


def _described(engine: Engine, buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the folder, on the meta device, by the names that transformers ties from."""
    model, found = engine.model, {name: local_of(buffer) for name, buffer in buffers.items()}
    ties, added = _ties(model), _adapters(model)
    described = {name: torch.empty_like(buffer, device="meta") for name, buffer in found.items()}
    for bucket in (bucket for unit in engine.units for bucket in unit.buckets):
        for slot, parameter in bucket.slots():
            if id(parameter) not in added:
                shape, dtype = slot.whole_shape or slot.shape, bucket.shard.spec.dtype
                described[ties.get(slot.name, slot.name)] = torch.empty(shape, dtype=dtype, device="meta")
    return described


def _add(writer: FolderWriter | None, unit: Unit, whole: dict[str, torch.Tensor]) -> None:
    if writer is not None:
        writer.add(_unsharded(writer.model, unit, whole))


def _unsharded(model: nn.Module, unit: Unit, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the unit's parameters on the host, by the names that transformers ties from; without adapters'.

    whole: those that ranks of tensor parallelism have parts of.
    """
    ties, added = _ties(model), _adapters(model)
    return {
        ties.get(slot.name, slot.name): whole.get(slot.name, local_of(parameter)).detach().to("cpu", copy=True)
        for bucket in unit.buckets
        for slot, parameter in bucket.slots()
        if id(parameter) not in added
    }


def _ties(model: nn.Module) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _adapters(model: nn.Module) -> set[int]:
    return {id(p) for extension in extensions_of(model) for p in extension.adds(model)}
