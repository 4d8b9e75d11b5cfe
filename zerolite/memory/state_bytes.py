"""Bytes of model states by kind, read off the buckets of a dry engine (a plan) or a real one (the tracker)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from zerolite.shards.bucket import Bucket, TrainableBucket, Unit
from zerolite.shards.parameters import FlatParameters

PHASES = ("forward", "backward", "step")
# In the order of a stacked bar: what a rank always has, then what comes and goes.
KINDS = (
    "parameters", "master", "moments", "gradients", "units in flight", "buckets", "activations", "logits",
    "step scratch",
)  # fmt: skip

ResidentStates = Callable[[Bucket], Iterable[torch.Tensor]]  # an optimizer's states of a bucket, in this process


@dataclass(frozen=True)
class Peak:
    """Bytes by kind on one rank's device at one moment."""

    bytes_of: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_of.values())


def fixed_tensors(buckets: Iterable[Bucket], resident_states: ResidentStates) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, tensor) of model states that stay on the device; what lies inside another one's storage is left out."""
    for bucket in buckets:
        whole = bucket.parameters.unsharded
        if bucket.parameters.stays_unsharded:
            yield "parameters", whole
        for kind, tensor, _ in bucket.shard.device_tensors():
            if kind == "optimizer":
                yield "master", tensor
            elif kind == "parameters" and not same_storage(tensor, whole):
                yield "parameters", tensor
        for values in resident_states(bucket):
            yield "moments", values


def fixed_bytes(buckets: Iterable[Bucket], resident_states: ResidentStates) -> dict[str, int]:
    """Bytes of model states that stay on the device, as `measure` counts them."""
    found = dict.fromkeys(("parameters", "master", "moments"), 0)
    for kind, tensor in fixed_tensors(buckets, resident_states):
        found[kind] += tensor.nbytes
    return found


def arena_bytes(buckets: Iterable[Bucket], total_bytes: int) -> dict[str, int]:
    """Bytes in the arena by kind; the rest of `total_bytes` are moments, with what whole pages cost."""
    found: dict[str, int] = {}
    for bucket in buckets:
        memory = getattr(bucket.shard, "memory", None)
        if memory is None:
            continue
        parts = {"parameters": memory.parameter, "master": memory.master, "sums": memory.sum}
        if isinstance(bucket, TrainableBucket):
            parts["gradients"] = memory.gradient
        for kind, shared in parts.items():
            found[kind] = found.get(kind, 0) + (shared.nbytes if shared is not None else 0)
    return {**found, "moments": total_bytes - sum(found.values())} if found else {}


def freed_units(units: Iterable[Unit]) -> Iterator[tuple[FlatParameters, int]]:
    """Of each unit that is gathered and freed: one of its buckets, which is where the others are, and bytes of all."""
    for unit in units:
        freed = [bucket.parameters for bucket in unit.buckets if not bucket.parameters.stays_unsharded]
        if freed:
            yield freed[0], sum(parameters.unsharded.nbytes for parameters in freed)


def gradient_bytes(bucket: TrainableBucket) -> int:
    """Of its shard's gradient on the device, as `measure` counts it: unique storages."""
    return sum(_storages(tensor for kind, tensor, _ in bucket.shard.device_tensors() if kind == "gradients").values())


def kept_gradient_bytes(bucket: TrainableBucket) -> int:
    """What its shard keeps on the device until the step."""
    return 0 if bucket.shard.steps_in_background else gradient_bytes(bucket)


def buffer_bytes(bucket: TrainableBucket) -> int:
    """Of the bucket's gradient on its way: the local sum, what is being reduced, and what is copied to the host."""
    storages = _storages(bucket.gradients.buffers())
    if bucket.shard.steps_in_background:
        storages |= _storages(tensor for kind, tensor, _ in bucket.shard.device_tensors() if kind == "gradients")
    return sum(storages.values())


def same_storage(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
