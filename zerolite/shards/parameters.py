"""The parameters of one bucket as one flat buffer: gathered, readable, freed.

[Note: storage is resized, never replaced]
Autograd saves views of parameters for backward. While a bucket is sharded the storage of `unsharded` has zero bytes;
when it is gathered again the same storage is filled, so those views are valid just when backward reads them. Filling
writes through `unsharded`, whose version counter no parameter shares, so autograd does not see a modification.

[Note: a sharded parameter reads as NaN]
A parameter of a freed storage would be a null pointer to every kernel. While sharded, each parameter is therefore a
NaN expanded to its shape (one element of memory): shape, dtype and device stay true, a read outside of forward,
backward and `full_params` is loud instead of a crash, and writing to it is an error of torch's. The same
holds, at every stage, for a parameter that the workers are still stepping.
"""

from collections.abc import Sequence

import torch
from torch import nn

from zerolite.runtime import trace
from zerolite.runtime.collectives import Pending
from zerolite.shards.shard import BucketSpec, Shard
from zerolite.shards.states import LEGAL, ParameterState, illegal


class FlatParameters:
    """One bucket's parameters: views of `unsharded` while that is readable, else NaN. States: `shards.states`."""

    tensors: list[nn.Parameter]  # in slot order
    unsharded: torch.Tensor  # 1D, layout.numel; zero bytes of storage while sharded
    state: ParameterState

    def __init__(
        self,
        spec: BucketSpec,
        tensors: Sequence[nn.Parameter],
        unsharded: torch.Tensor,
        shard: Shard,
        stays_unsharded: bool,
    ):
        self.layout, self.unit_name, self.tensors = spec.layout, spec.unit_name, list(tensors)
        self.unsharded, self.shard = unsharded, shard
        self.stays_unsharded = stays_unsharded
        shard.parameters = self
        self.pending: Pending | None = None  # the gather in flight
        self.state = ParameterState.UNSHARDED
        nan = float("nan") if spec.dtype.is_floating_point else 0
        self.placeholder = torch.full((), nan, dtype=spec.dtype, device=unsharded.device)
        self._views = [slot.range.of(unsharded).view(slot.shape) for slot in spec.layout.slots]
        self._bind()
        if not stays_unsharded:
            self.reshard()

    def unshard(self) -> bool:
        """Start gathering the bucket; False where it is readable or under way. Collective."""
        if self.state is ParameterState.STALE:
            self.shard.fetch()
        if self.state is not ParameterState.SHARDED:
            return False
        self.unsharded.untyped_storage().resize_(self.unsharded.numel() * self.unsharded.element_size())
        self.start_gather()
        return True

    def start_gather(self) -> None:
        """Start filling `unsharded` from every rank's owned range. Collective."""
        self.expect(self.shard.gather(self.unsharded))

    def expect(self, pending: Pending) -> None:
        """`unsharded` is readable once `pending` is done."""
        self._set_state(ParameterState.GATHERING)
        self.pending = pending
        self._end_flight = trace.flight("all-gather", self.unit_name)

    def wait(self) -> None:
        """Order this stream after the gather in flight; the parameters are readable from here on."""
        if self.pending is not None:
            with trace.phase("all-gather wait", self.unit_name):
                self.pending.wait()
            self.pending = None
            self._end_flight()
            self._set_state(ParameterState.UNSHARDED)
            if not self._is_bound:
                self._bind()

    def reshard(self) -> None:
        """Free `unsharded`; this rank's range stays. A gather that nobody waited for is waited for first."""
        self.wait()
        if self.stays_unsharded or self.state is not ParameterState.UNSHARDED:
            return
        self._set_state(ParameterState.SHARDED)
        self._place_nan()
        self.unsharded.untyped_storage().resize_(0)

    def invalidate(self) -> None:
        """Workers are stepping the bucket: old values that stay unsharded are unreadable until they are fetched."""
        if self.stays_unsharded and self.state is ParameterState.UNSHARDED:
            self._set_state(ParameterState.STALE)
            self._place_nan()

    def absorb_edits(self) -> None:
        """Store what somebody wrote into the unsharded parameters in this rank's shard and its master."""
        own, values = self.shard.range.of(self.unsharded), self.shard.values()
        if values.dtype != own.dtype:
            edited = own.to(values.device)
            values = torch.where(edited != self.shard.round(values), edited.to(values.dtype), values)
        elif values.data_ptr() != own.data_ptr():
            values = own
        self.shard.set_values(values)

    def _set_state(self, after: ParameterState) -> None:
        if (self.state, after) not in LEGAL:
            raise illegal(self.state, after, self.layout.name)
        self.state = after

    def _place_nan(self) -> None:
        for parameter, slot in zip(self.tensors, self.layout.slots, strict=True):
            parameter.data = self.placeholder.expand(slot.shape)
        self._is_bound = False

    def _bind(self) -> None:
        for parameter, view in zip(self.tensors, self._views, strict=True):
            parameter.data = view
        self._is_bound = True
