"""Checks of a new adapter after its first backward: an error in the first step, not a run that trains nothing."""

from torch import nn

from zerolite.adapters.state import adapter_of
from zerolite.engine.engine import engine_of
from zerolite.engine.grad_stats import reduce_grad_stats, slot_norms
from zerolite.errors import ZeroliteError


def check_gradients(model: nn.Module) -> None:
    """Check that the last backward gave each parameter of the active adapter a gradient. Collective.

    Call it in the first step, between `backward` and `zero_grad`. Left out is what has no gradient yet: a LoRA's A as
    long as B is zero, which is how B starts, and an encoder's parameters behind a last layer of zeros.
    Raises ValueError where the model is not sharded or has no adapter. Raises ZeroliteError, on every rank and with the
    parameters' names, where a gradient is missing or zero on all ranks: the forward does not call the module, or the
    loss does not depend on its output.
    """
    engine = engine_of(model)
    adapter = adapter_of(model, None)
    everything = [[True] * len(bucket.layout.slots) for bucket in engine.reducer.order]
    reduce_grad_stats(engine, everything)  # reduces what is late
    norms = slot_norms(engine)
    prompts = getattr(model, "prompts", {})
    later = {id(p) for p in prompts[adapter.name].without_gradient()} if adapter.name in prompts else set()
    silent = [
        name
        for name, parameter in adapter.parameters.items()
        if name.rpartition(".")[2] != "lora_A" and id(parameter) not in later and not norms.get(name)
    ]
    if silent:
        raise ZeroliteError(
            f"adapter {adapter.name!r} learns nothing in {len(silent)} of {len(adapter.parameters)} parameters: after "
            f"the first backward the gradient of {', '.join(silent[:4])} is zero on every rank; look for modules that "
            "the forward does not call, for outputs that the loss does not use, and for reentrant activation "
            "checkpointing, whose inputs need a gradient (use use_reentrant=False)"
        )
