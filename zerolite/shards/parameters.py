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

[Note: who else writes parameters]
Foreign code may give a parameter other memory (`p.data = ...`, `model.to`) or write into it in place. The address tells
the first, the version counter of the parameter the second: binding a view leaves the counter as it is. Where the
engine gets control, `is_intact` compares both; engine/parameter_guard.py stores what changed, or refuses it by name.
What is written in place through `p.data` moves no counter of `p`: slots whose `.data` was read are compared with the
shard, which is a pass over them where somebody reads, and nothing where nobody does.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import nn

from zerolite.runtime import trace
from zerolite.runtime.collectives import Pending
from zerolite.shards.dtensors import is_distributed, local_of, own_local
from zerolite.shards.shard import BucketSpec, Shard
from zerolite.shards.states import LEGAL, ParameterState, illegal

_VERSION, _REQUIRES_GRAD = attrgetter("_version"), attrgetter("requires_grad")
_ADDRESS = torch.Tensor.data_ptr
_NO_ADDRESS = -1


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
        # What is bound: the parameters or, of DTensors, the plain tensors inside, whose `data` is theirs.
        self._locals = list(map(own_local, tensors))
        self._own = set(map(id, self._locals))
        self._address_of = self._address_inside if any(map(is_distributed, tensors)) else _ADDRESS
        self.unsharded, self.shard = unsharded, shard
        self.stays_unsharded = stays_unsharded
        self.is_frozen = spec.gradient_dtype is None
        shard.parameters = self
        self.pending: Pending | None = None  # the gather in flight
        self.state = ParameterState.UNSHARDED
        nan = float("nan") if spec.dtype.is_floating_point else 0
        self.placeholder = torch.full((), nan, dtype=spec.dtype, device=unsharded.device)
        self._views = [slot.range.of(unsharded).view(slot.shape) for slot in spec.layout.slots]
        self._nan_views = [self.placeholder.expand(slot.shape) for slot in spec.layout.slots]
        self._nan_addresses = [view.data_ptr() for view in self._nan_views]
        self._read_slots: set[int] = set()  # whose `.data` somebody has read since the last comparison
        self.accept_edits()
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
        self._keep_edits()
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
        self.accept_edits()

    # What foreign code did, see [Note: who else writes parameters] #

    def is_intact(self) -> bool:
        """Whether every parameter is where it was bound, at the version that is known, and frozen if the bucket is."""
        # Every step asks this of every bucket: `map` over what is written in C makes no Python call a parameter.
        return (
            list(map(_VERSION, self.tensors)) == self._versions
            and list(map(self._address_of, self.tensors)) == self._addresses()
            and not self._read_slots
            and not (self.is_frozen and any(map(_REQUIRES_GRAD, self.tensors)))
        )

    @property
    def is_readable(self) -> bool:
        return self._is_bound and self.pending is None

    def rebound_slots(self) -> list[int]:
        """Slots whose parameter was given other memory."""
        addresses = enumerate(zip(self.tensors, self._addresses(), strict=True))
        return [index for index, (parameter, address) in addresses if self._address_of(parameter) != address]

    def note_data_read(self, index: int) -> None:
        """Somebody has got the slot's memory, and may write there without being seen."""
        if self.is_readable:
            self._read_slots.add(index)

    def edited_slots(self) -> list[int]:
        """Slots that were written in place; of those written through `.data` alone, those that this rank has a part of.

        Comparing those waits for the workers, and for the device.
        """
        versions = enumerate(zip(self.tensors, self._versions, strict=True))
        edited = {index for index, (parameter, version) in versions if parameter._version != version}
        read = sorted(self._read_slots - edited) if self.is_readable else []
        if read:
            values = self.shard.round(self.shard.values())
            for index in read:
                part = self.layout.slots[index].range.intersect(self.shard.range)
                own = part.of(self.unsharded).to(values.device)
                if part.numel > 0 and not torch.equal(part.of(values, self.shard.range), own):
                    edited.add(index)
        return sorted(edited)

    def accept_edits(self) -> None:
        """What was written in place is known."""
        self._read_slots.clear()
        self._versions = [parameter._version for parameter in self.tensors]

    def rebind(self, index: int) -> None:
        """Give a parameter its own memory again."""
        if is_distributed(self.tensors[index]):
            self.tensors[index]._local_tensor = self._locals[index]
        self._locals[index].data = self._views[index] if self._is_bound else self._nan_views[index]

    def restore_nan(self) -> None:
        """A parameter of one element can be written while it reads as NaN, and all share that element."""
        self.placeholder.fill_(float("nan") if self.placeholder.dtype.is_floating_point else 0)
        self.accept_edits()

    @torch.no_grad()
    def store(self, index: int, values: torch.Tensor) -> None:
        """Make `values`, of the slot's shape, dtype and device, those of a parameter, in the shard and master too.

        Every rank must give the same.
        """
        slot, own_range = self.layout.slots[index], self.shard.range
        part = slot.range.intersect(own_range)
        if self.is_readable:
            self._views[index].copy_(values)
        if self.is_readable and self.stays_unsharded:
            self.absorb_edits()
        elif part.numel > 0:
            stored = self.shard.values()
            own, given = part.of(stored, own_range), part.of(values.reshape(-1), slot.range).to(stored.device)
            if own.dtype != given.dtype:  # a master keeps the bits that the values have not
                given = torch.where(given != self.shard.round(own), given.to(own.dtype), own)
            own.copy_(given)
            self.shard.set_values(stored)
        self.rebind(index)

    def _address_inside(self, parameter: torch.Tensor) -> int:
        """Of a DTensor's memory; none where another tensor than the bound one is inside."""
        local = local_of(parameter)
        return local.data_ptr() if id(local) in self._own else _NO_ADDRESS

    def _addresses(self) -> list[int]:
        return list(map(_ADDRESS, self._views)) if self._is_bound else self._nan_addresses

    def _keep_edits(self) -> None:
        """Before the unsharded buffer is freed: store what was written into it, where that needs no other rank."""
        if list(map(_VERSION, self.tensors)) == self._versions and not self._read_slots:
            return
        edited = self.edited_slots()
        if not edited:
            self.accept_edits()
            return
        if self.shard.spec.owns_all:
            self.absorb_edits()
            return
        self.accept_edits()
        names = ", ".join(self.layout.slots[index].name for index in edited)
        raise ValueError(
            f"{names}: written in place while gathered at stage 3, by a module's forward (an average kept in a "
            "parameter, nn.Embedding(max_norm=...)) or between forward and backward; the gathered copy is freed now "
            "and the edit would be lost: edit inside zerolite.full_params(model, writeback=True), keep the value in a "
            "buffer, or use stage 2"
        )

    def _set_state(self, after: ParameterState) -> None:
        if (self.state, after) not in LEGAL:
            raise illegal(self.state, after, self.layout.name)
        self.state = after

    def _place_nan(self) -> None:
        for local, view in zip(self._locals, self._nan_views, strict=True):
            local.data = view
        self._is_bound = False

    def _bind(self) -> None:
        for local, view in zip(self._locals, self._views, strict=True):
            local.data = view
        self._is_bound = True
