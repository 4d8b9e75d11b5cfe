"""What a Trainer writes of a sharded model: a Hugging Face folder of whole weights, or PEFT's adapter files."""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers.utils import is_peft_available

from zerolite.api import full_params
from zerolite.checkpoint.export import export
from zerolite.checkpoint.weight_files import TRANSFORMERS
from zerolite.engine.engine import engine_of
from zerolite.errors import ZeroliteError
from zerolite.runtime.rank_errors import on_all_ranks
from zerolite.shards.bucket import Unit

WriteRest = Callable[[dict[str, torch.Tensor] | None], None]


def is_peft_model(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def write_model(model: nn.Module, folder: Path, write_rest: WriteRest) -> None:
    """Write the model to `folder` as Trainer does, whatever else lies there. Collective; rank 0 writes.

    write_rest(state): writes configuration, tokenizer and arguments, on rank 0, and the weights in `state`, which are
        an adapter's; of another model it is empty, and the weights follow.
    ZeroliteError on every rank where rank 0 cannot write.
    """
    engine = engine_of(model)
    engine.guard.check()
    is_first = engine.mesh.rank == 0
    together = partial(on_all_ranks, engine, f"saving {folder}", ZeroliteError)
    if not is_peft_model(model):
        whole = folder / ".zerolite-export"  # export replaces folders, and `folder` may hold checkpoints
        export(model, whole)
        together(lambda: _move_weights(whole, folder, write_rest) if is_first else None)
        return
    with _copied_modules(model) as gathered:
        names = _adapter_names(model)
        if names is not None:
            state = _gather(model, names, gathered)
            together(lambda: write_rest(state) if is_first else None)
            return
    with full_params(model):
        together(lambda: write_rest(None) if is_first else None)


def _move_weights(whole: Path, folder: Path, write_rest: WriteRest) -> None:
    write_rest({})
    for path in folder.glob("*.safetensors"):
        if path.name == TRANSFORMERS.single or path.name.startswith("model-"):
            path.unlink()
    (folder / TRANSFORMERS.index).unlink(missing_ok=True)
    for path in sorted(whole.iterdir()):
        path.replace(folder / path.name)
    shutil.rmtree(whole)


@contextlib.contextmanager
def _copied_modules(model: nn.Module) -> Iterator[list[Unit]]:
    """Inside, the units that own whole modules of an adapter (modules_to_save) are gathered. Collective.

    PEFT asks such a module for its own state dict, though it needs the names alone.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    engine = engine_of(model)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    owned = {id(parameter) for wrapper in wrappers for parameter in wrapper.parameters()}
    units = [unit for unit in engine.units if any(id(p) in owned for b in unit.buckets for _, p in b.slots())]
    for unit in units:
        engine.unshard(unit)
        unit.wait()
    try:
        yield units
    finally:
        for unit in units:
            engine.free(unit)


def _adapter_names(model: nn.Module) -> set[str] | None:
    """Names of the parameters and buffers that PEFT writes; None where it computes what it writes.

    PEFT chooses from a state dict, so it is given one without values.
    """
    from peft import get_peft_model_state_dict

    configs: dict = model.peft_config
    if any(config.is_prompt_learning for config in configs.values()):
        return None
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors}
    names = {id(tensor): name for name, tensor in state.items()}
    chosen = [
        names.get(id(tensor))
        for adapter in configs
        for tensor in get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter).values()
    ]
    return None if None in chosen else {name for name in chosen if name is not None}


@torch.no_grad()
def _gather(model: nn.Module, names: set[str], gathered: Collection[Unit]) -> dict[str, torch.Tensor]:
    """On rank 0 copies on the host of the named parameters and buffers; a unit is gathered at a time. Collective.

    gathered: units that stay so.
    """
    engine = engine_of(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            aliases.setdefault(id(parameter), []).append(name)
    state = {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in names}
    for unit in engine.units:
        parameters = [p for bucket in unit.buckets for _, p in bucket.slots() if id(p) in aliases]
        if not parameters:
            continue
        engine.unshard(unit)
        unit.wait()
        if engine.mesh.rank == 0:
            for parameter in parameters:
                state.update(dict.fromkeys(aliases[id(parameter)], parameter.detach().to("cpu", copy=True)))
        if unit not in gathered:
            engine.free(unit)
    return state
