"""Load a Hugging Face folder into a sharded model: each rank reads its own slices of the safetensors."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zerolite.checkpoint.conversions import Source, ignored
from zerolite.checkpoint.empty_model import open_model
from zerolite.checkpoint.weight_files import Weights
from zerolite.config import Offload, Precision
from zerolite.engine import build, meta_init
from zerolite.engine.engine import Engine
from zerolite.errors import CheckpointError
from zerolite.runtime import device as devices
from zerolite.runtime.mesh import RankMesh, mesh_of
from zerolite.runtime.rank_errors import Ranks, on_all_ranks
from zerolite.shards.bucket import Bucket
from zerolite.shards.dtensors import is_distributed
from zerolite.shards.layout import Partition, Range
from zerolite.shards.units import UnitRule


def load_pretrained(
    path,
    stage: int,
    mesh: DeviceMesh | None = None,
    offload: Offload | str | None = None,
    precision: Precision | None = None,
    units: UnitRule | None = None,
    adapt: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Build a sharded model, in eval mode, from a local Hugging Face folder with safetensors. Collective.

    path: the folder, of transformers or of diffusers (one model, not a pipeline; in fp32, as its `from_pretrained` has
        it: give a `precision`). No rank builds the whole model: each reads its own ranges, and where unsharded
        parameters stay (stages 0 to 2) ranks gather the rest from each other. What transformers renames, joins or cuts
        on load (vision and language, experts) is read by ranges as well. What it permutes or computes is read whole,
        the tensors of one parameter at a time; `logging` tells which at level INFO.
    adapt: called with the model before it is sharded, its parameters on the meta device, to freeze some or to add
        adapters: `adapt=zerolite.adapters.add_lora`.
    stage, mesh, offload, precision, units: as of `shard`.

    A warning names weights of the folder that have no place in the model. Raises ValueError where the folder has no
    config.json or no weights, misses a file, is damaged or quantised, has other weights than the configuration asks
    for, or needs Python code of its own (`auto_map`), which is never run. Raises ImportError where transformers is
    older than 5.17, or diffusers is needed and missing. Raises CheckpointError on every rank where only some ranks can
    read the folder, or see another one there. Raises what `shard` raises for the other arguments.
    """
    offload = build.check_arguments(stage, offload, precision)
    folder = Path(path)
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Weights, nn.Module, dict[str, Source]]] = []

        def open_folder() -> str:
            weights = stack.enter_context(Weights(folder))
            model, sources = open_model(folder, weights)
            if adapt is not None:
                adapt(model)
            opened.append((weights, model, sources))
            return weights.digest()

        # A rank that cannot open the folder has no model that tells where it trains, and is waited for all the same.
        work = _Attempt(open_folder)
        model: nn.Module = opened[0][1] if opened else nn.Module()
        if any(map(is_distributed, model.parameters())):
            raise ValueError(
                "load_pretrained does not read into DTensor parameters: build the model with from_pretrained, call "
                "parallelize_module on it, then zerolite.shard; or zerolite.load a checkpoint"
            )
        device = devices.target(model, mesh)
        ranks = mesh_of(mesh, device)
        if len(set(work.on_all_ranks(_RanksOf(ranks, device), folder))) > 1:
            raise CheckpointError(f"ranks see different folders at {folder}: give all of them the same files")
        weights, model, sources = opened.pop()
        used = {key for source in sources.values() for key in source.keys}
        unused = sorted(set(weights.entries) - used - ignored(model, list(weights.entries)))
        if unused:
            warnings.warn(f"{folder}: weights without a place: {', '.join(unused[:8])}", stacklevel=2)
        engine = Engine(model, Partition(stage), ranks, device, precision)
        build.build(engine, units, offload, meta_init.leave_meta, has_values=False)
        _Attempt(lambda: _read(engine, weights, sources)).on_all_ranks(engine, folder)
        _gather(engine)
    build.finish(engine)
    return model.eval()


@dataclass(frozen=True)
class _RanksOf:
    """What gathers numbers before there is an engine."""

    mesh: RankMesh
    device: torch.device

    def all_gather_scalars(self, scalars: torch.Tensor) -> torch.Tensor:
        """Every rank's few numbers. Collective."""
        return self.mesh.all_gather_scalars(scalars.to(self.device))


class _Attempt:
    """Work that was done or failed on this rank, while the other ranks wait for its word."""

    def __init__(self, work: Callable[[], str | None]):
        self.failure: Exception | None = None
        self.result = ""
        try:
            self.result = work() or ""
        except Exception as failure:  # whatever it is: see on_all_ranks
            self.failure = failure

    def on_all_ranks(self, ranks: Ranks, folder: Path) -> list[str]:
        """Every rank's result; this rank's failure where all failed, CheckpointError where some did. Collective."""
        failure = self.failure
        word = f"failed: {type(failure).__name__}: {failure}" if failure is not None else f"done: {self.result}"
        words = on_all_ranks(ranks, f"loading {folder}", CheckpointError, lambda: word)
        failed = [f"rank {rank}: {text[8:]}" for rank, text in enumerate(words) if text.startswith("failed: ")]
        if failure is not None and len(failed) == len(words):
            raise failure
        if failed:
            raise CheckpointError(
                f"loading {folder} failed on {len(failed)} of {len(words)} ranks; {'; '.join(failed[:4])}"
            ) from failure
        return words


def _read(engine: Engine, weights: Weights, sources: dict[str, Source]) -> None:
    """Read this rank's shards, and the buffers that the files hold; `sources` is empty then."""
    for bucket in _without_values(engine):
        shard, spec = bucket.shard, bucket.shard.spec
        values = shard.values()
        for slot in bucket.layout.slots:
            part = slot.range.intersect(spec.shard_range)
            sources[slot.name].read(weights, part.relative_to(slot.range), part.of(values, shard.range))
        shard.set_values(values)
    for name, buffer in engine.model.named_buffers():
        if name in sources:
            sources[name].read(weights, Range(0, buffer.numel()), buffer.data.view(-1))
    sources.clear()


def _gather(engine: Engine) -> None:
    """Gather the other ranks' shards where unsharded parameters stay. Collective."""
    for bucket in _without_values(engine):
        shard, spec = bucket.shard, bucket.shard.spec
        if spec.owns_all:
            values = shard.values()
            everything = values.to(engine.device.device)
            own = spec.shard_range.of(everything)
            engine.mesh.shard.all_gather(everything, own, f"gathering {bucket.layout.name}").wait()
            shard.set_values(everything.to(values.device))
        shard.publish()
        bucket.parameters.wait()


def _without_values(engine: Engine) -> list[Bucket]:
    """Buckets whose parameters were on the meta device when the model was sharded."""
    return [bucket for unit in engine.units for bucket in unit.buckets if bucket.group.is_on_meta]
