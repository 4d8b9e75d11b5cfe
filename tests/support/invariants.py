"""What must be true of an engine's buckets and of its workers' queue at any moment, checked against facts."""

from __future__ import annotations

from collections import Counter

from torch import nn
from zerolite_kernels.cpu_worker import RING_NUMEL

CHECKED = (
    "pre_forward", "post_forward", "pre_backward", "post_backward", "accumulate_gradient", "finish_backward",
    "before_step", "clear_gradients",
)  # fmt: skip


def parameter_state(parameters) -> str:
    """The state that memory and the nn.Parameters show, whatever `parameters.state` says."""
    has_memory = parameters.unsharded.untyped_storage().nbytes() > 0 or parameters.unsharded.numel() == 0
    begin = parameters.unsharded.data_ptr()
    is_bound = all(tensor.data_ptr() >= begin > 0 or tensor.numel() == 0 for tensor in parameters.tensors) and all(
        tensor.untyped_storage().data_ptr() == parameters.unsharded.untyped_storage().data_ptr()
        for tensor in parameters.tensors
    )
    if parameters.pending is not None:
        assert has_memory, "a gather has where to go"
        return "GATHERING"
    if is_bound:
        return "UNSHARDED"
    return "STALE" if has_memory and parameters.stays_unsharded else "SHARDED"


def slot_state(shard) -> str:
    """Of a host shard's place in the arena: free, filling, ready, stepping, stepped or returning; exactly one."""
    is_done = shard.memory.fence <= shard.host.pool.num_done()
    is_filling, has_gradient = shard._reduced is not None, shard.has_gradient
    if shard.state.name == "FETCHING":
        assert is_done and not is_filling
        return "returning"
    if shard.state.name == "STEPPING":
        assert not is_filling, "no gradient is copied over what workers read"
        return "stepped" if is_done else "stepping"
    if is_filling:
        return "filling"
    return "ready" if has_gradient else "free"


def check(engine) -> tuple[Counter, Counter]:
    """The two equations; (parameter states, slot states) that were seen."""
    buckets = [bucket for unit in engine.units for bucket in unit.buckets]
    states: Counter = Counter()
    for bucket in buckets:
        assert parameter_state(bucket.parameters) == bucket.parameters.state.name, bucket.layout.name
        states[bucket.parameters.state.name] += 1
    assert states["SHARDED"] + states["GATHERING"] + states["UNSHARDED"] + states["STALE"] == len(buckets)
    slots = Counter(slot_state(shard) for shard in engine.fetch_queue.shards)
    names = ("free", "filling", "ready", "stepping", "stepped", "returning")
    assert sum(slots[name] for name in names) == len(engine.fetch_queue.shards)
    host = engine.placement.host
    if host is not None:
        done, submitted = host.pool.num_done(), host.pool.submitted
        assert done <= submitted <= host.pool.num_done() + RING_NUMEL
    return states, slots


def watch(model: nn.Module) -> tuple[Counter, Counter]:
    """Check before and after everything that the engine does from now on; the states that were seen, as it goes on."""
    engine = model._zerolite
    seen_states: Counter = Counter()
    seen_slots: Counter = Counter()

    def note() -> None:
        states, slots = check(engine)
        seen_states.update(states)
        seen_slots.update(slots)

    def checked(method):
        def call(*args, **kwargs):
            note()
            result = method(*args, **kwargs)
            note()
            return result

        return call

    for name in CHECKED:
        setattr(engine, name, checked(getattr(engine, name)))
    return seen_states, seen_slots
