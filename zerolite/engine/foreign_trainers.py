"""A sharded model in a plain `accelerate.Accelerator`: refused by name, before it is wrapped, moved or half saved."""

import inspect

from torch import nn

from zerolite.errors import ZeroliteError

ACCELERATE_ATTRIBUTE = "_is_accelerate_prepared"


def refuse_accelerate(model: nn.Module) -> None:
    """Have `accelerate.Accelerator.prepare` raise for a sharded model.

    Accelerate would wrap it in DistributedDataParallel, and save the optimizer states of rank 0 alone.
    """
    setattr(model, ACCELERATE_ATTRIBUTE, _RefuseAccelerate())


class _RefuseAccelerate:
    """Stands where Accelerate asks whether a model is prepared.

    `prepare_model(model, evaluation_mode=True)` wraps nothing: to that one it says no.
    """

    def __bool__(self) -> bool:
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if caller is not None and caller.f_locals.get("evaluation_mode"):
            return False
        raise ZeroliteError(
            "a model that zerolite.shard has sharded came to a plain accelerate.Accelerator, which would wrap it in "
            "DistributedDataParallel and save one rank's part of its optimizer states: use `from "
            "zerolite.integrations.accelerate import Accelerator` and Accelerator(zero=dict(stage=...)), which takes "
            "sharded models, too (of transformers' Trainer: zerolite.integrations.transformers)"
        )
