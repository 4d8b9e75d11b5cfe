"""A step that is skipped because gradients hold Inf or NaN: which units', and what is said about it."""

import math
import warnings
from collections.abc import Callable

from zerolite.engine.engine import Engine
from zerolite.engine.grad_stats import GradStats
from zerolite.engine.loss_scale import LossScale
from zerolite.errors import ZeroliteError


def non_finite_units(engine: Engine, stats: GradStats) -> list[str]:
    """Names of the units whose gradients hold Inf or NaN on some rank."""
    buckets = zip(engine.reducer.order, stats.squares, strict=True)
    return sorted({bucket.unit.name for bucket, squares in buckets if not math.isfinite(squares)})


def report_skipped(names: list[str], loss_scale: LossScale | None, drop_gradients: Callable[[], None]) -> None:
    """Warn of a skipped step; with a loss scale, which finds its height by such steps, nothing is said above its floor.

    At the floor no lower scale would help: ZeroliteError, with scale, steps and units. The gradients are dropped then,
    so that whoever goes on does not add to them.
    """
    units = ", ".join(names[:4]) if names else "another pipeline stage"
    where = f"gradients of {units}{' and others' if len(names) > 4 else ''} hold Inf or NaN"
    if loss_scale is None:
        warnings.warn(f"step skipped on every rank, nothing changed: {where}", stacklevel=4)
    elif loss_scale.value <= loss_scale.floor:
        drop_gradients()
        raise ZeroliteError(
            f"{where} at the lowest loss scale, {loss_scale.value}, after {loss_scale.num_overflows + 1} skipped steps "
            "in a row: no lower one will help. Nothing changed, and the gradients are dropped. Look for a loss or "
            "weights that are not finite, or use bfloat16 or float32"
        )
