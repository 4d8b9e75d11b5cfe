"""Whether a new adapter learns: an early error instead of a run that trains nothing."""

from torch import nn

from zerolite.adapters.state import adapter_of
from zerolite.engine.engine import engine_of
from zerolite.errors import ZeroliteError
from zerolite.optim.grad_stats import reduce_grad_stats, slot_norms


def check_gradients(model: nn.Module) -> None:
    """See that the last backward gave every part of the active adapter that can learn a gradient. Collective.

    To be called in the first step, between backward and `zero_grad`. A LoRA's A has none yet, since its B starts at
    zero; all else must. Raises ZeroliteError on every rank, with names, where a gradient is missing or zero
    everywhere: the forward does not reach the adapter, or nothing after it depends on what it adds. Raises ValueError
    for a model that is not sharded or has no adapter.
    """
    engine = engine_of(model)
    adapter = adapter_of(model, None)
    everything = [[True] * len(bucket.layout.slots) for bucket in engine.reducer.order]
    reduce_grad_stats(engine, everything)  # reduces what is late
    norms = slot_norms(engine)
    silent = [name for name in adapter.parameters if name.rpartition(".")[2] != "lora_A" and not norms.get(name)]
    if silent:
        raise ZeroliteError(
            f"adapter {adapter.name!r} learns nothing in {len(silent)} of {len(adapter.parameters)} parameters: after "
            f"the first backward the gradient of {', '.join(silent[:4])} is zero on every rank; look for modules that "
            "the forward does not call, for outputs that the loss does not use, and for reentrant activation "
            "checkpointing, whose inputs need a gradient (use use_reentrant=False)"
        )
