"""What `save` and `load` are given."""

from zerolite.engine.engine import Zero
from zerolite.optim.base import ShardedOptimizer


def check_optimizer(zero: Zero, optimizer) -> None:
    if not isinstance(optimizer, ShardedOptimizer | None):
        raise TypeError(f"checkpoints take a zerolite optimizer, got {type(optimizer).__name__}")
    groups = optimizer.param_groups if optimizer is not None else []
    if any(parameter._zerolite_place[0] is not zero for group in groups for parameter in group["params"]):
        raise ValueError("the optimizer is of another model: give the one that was built on this model's parameters")
