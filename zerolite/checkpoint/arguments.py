"""What `save` and `load` are given."""

import os
import warnings
from pathlib import Path

from torch import nn

from zerolite.engine.engine import Engine, sharded_info
from zerolite.optim.base import ShardedOptimizer


def model_and_folder(name: str, model, folder) -> tuple[nn.Module, Path]:
    """The first two arguments of zerolite.`name`, in the order (model, folder); `name` calls this itself.

    The old order (folder, model) still works, with a FutureWarning at the line that calls zerolite.`name`.
    TypeError for anything else.
    """
    if isinstance(model, str | os.PathLike) and isinstance(folder, nn.Module):
        warnings.warn(
            f"zerolite.{name}(folder, model) is the old order: call zerolite.{name}(model, folder)",
            FutureWarning,
            stacklevel=3,
        )
        model, folder = folder, model
    if not (isinstance(model, nn.Module) and isinstance(folder, str | os.PathLike)):
        raise TypeError(
            f"zerolite.{name} takes (model, folder), a torch.nn.Module and a path, "
            f"got ({type(model).__name__}, {type(folder).__name__})"
        )
    return model, Path(folder).resolve()


def check_optimizer(engine: Engine, optimizer: object) -> None:
    """TypeError or ValueError for what is no optimizer of this model; None passes."""
    if not isinstance(optimizer, ShardedOptimizer | None):
        raise TypeError(f"checkpoints take a zerolite optimizer, got {type(optimizer).__name__}")
    groups = optimizer.param_groups if optimizer is not None else []
    if any(sharded_info(parameter).engine is not engine for group in groups for parameter in group["params"]):
        raise ValueError("the optimizer is of another model: give the one that was built on this model's parameters")
