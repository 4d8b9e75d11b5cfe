"""DTensor parameters and pipeline stages: what cannot be sharded beside them, and what torch does to such models."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zerolite.engine import data_reads
from zerolite.engine.extensions import extensions_of
from zerolite.runtime.mesh import RankMesh
from zerolite.shards.dtensors import check_distributed, is_distributed


def check_parallel(model: nn.Module, mesh: RankMesh) -> None:
    """ValueError, by name, for what cannot be trained beside tensor or pipeline parallelism."""
    check_distributed(model, [one.ranks for one in mesh.tensor])
    is_split = bool(mesh.tensor) or any(map(is_distributed, model.parameters()))
    if (is_split or mesh.pipeline) and extensions_of(model):
        raise ValueError(
            f"zerolite's adapters do not work beside {'tensor' if is_split else 'pipeline'} parallelism: their files "
            "hold whole weights of a whole model. Shard the model with adapters over all ranks, or train its weights"
        )
    if mesh.pipeline:
        _refuse_ties_over_stages(model)


def _refuse_ties_over_stages(model: nn.Module) -> None:
    """A weight that transformers ties to one of another stage would part from it at the first step."""
    ties = {}
    for module in model.modules():
        said = getattr(module, "all_tied_weights_keys", None)
        ties.update(said if isinstance(said, dict) else {})
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for tied, source in ties.items():
        ends = [any(name == end or name.endswith(f".{end}") for name in names) for end in (tied, source)]
        if any(ends) and not all(ends):
            here, away = (tied, source) if ends[0] else (source, tied)
            raise ValueError(
                f"{here} is tied to {away}, which is on another pipeline stage: the two would be stepped apart. Untie "
                "them (tie_word_embeddings=False, and give each its own parameter), or keep both on one stage"
            )


@functools.cache
def note_distributed_reads() -> None:
    """As `note_data_reads`, of DTensors, which are no nn.Parameter by class."""
    DTensor.data = property(data_reads.read, torch._C.TensorBase.data.__set__, doc=torch._C.TensorBase.data.__doc__)


def apply_to_others(model: nn.Module, device: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`Module._apply` of a model with DTensor parameters, which torch would exchange for new objects.

    Parameters stay, so `fn` must leave them as they are: ValueError for another device or values. Buffers follow it.
    """
    probe = torch.ones((), device=device)
    if not fn(probe).is_meta and fn(probe).item() != 1:
        raise ValueError("the values of DTensor parameters are not changed by Module._apply here: write into them")
    if fn(probe).device != device:
        raise ValueError(
            f"a model with DTensor parameters stays on the devices of its mesh, and would be moved from {device} to "
            f"{fn(probe).device}: move it before parallelize_module"
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
