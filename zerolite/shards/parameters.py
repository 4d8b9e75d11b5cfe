"""The parameters of one bucket as one flat buffer, and the range of it that this rank owns.

[Note: storage is resized, never replaced]
Autograd saves views of parameters for backward. While a bucket is sharded its `full` storage has zero bytes; when it
is gathered again the same storage is filled, so those views are valid just when backward reads them. Filling writes
through `full`, whose version counter no parameter shares, so autograd does not take it for a modification.

[Note: a sharded parameter reads as NaN]
A parameter of a freed storage would be a null pointer to every kernel. While sharded, each parameter is therefore a
NaN expanded to its shape (one element of memory): shape, dtype and device stay true, a read outside of forward,
backward and `full_params` is loud instead of a crash, and writing to it is an error of torch's. The same
holds, at every stage, for a parameter that the workers are still stepping.

[Note: the way back]
With offload the owned range is stepped in host memory. `hide` makes the old values unreadable, `ascend` waits for
the workers and starts the copy up, `take_back` the exchange of ranges where full parameters stay; `wait` orders this
stream after both. Copies and gathers run on a stream of their own: the compute stream waits for this unit's alone.
"""

from collections.abc import Sequence

import torch
from torch import nn

from zerolite.config import master_dtype
from zerolite.offload.host_shard import HostBucket, round_bf16
from zerolite.runtime.collectives import Group, Pending
from zerolite.runtime.device import Cpu, Cuda
from zerolite.shards.layout import BucketLayout


class FlatBucket:
    """One bucket's parameters: gathered or sharded, with the range that this rank owns and steps."""

    layout: BucketLayout
    parameters: list[nn.Parameter]  # in slot order
    full: torch.Tensor  # 1D, layout.numel; zero bytes of storage while sharded
    owned: torch.Tensor  # 1D, this rank's range; a view of `full` where that is resident, else its own memory
    master: torch.Tensor | None  # 1D like `owned`, fp32; what the optimizer steps here where `owned` has 16 bits
    host: HostBucket | None  # what is stepped instead, or where `owned` lies, with offload

    def __init__(
        self,
        layout: BucketLayout,
        parameters: Sequence[nn.Parameter],
        has_values: bool,
        *,
        dtype: torch.dtype,
        device: Cpu | Cuda,
        group: Group,
        replicas: Group,
        owns_all: bool,
        is_resident: bool,
        is_trainable: bool,
        host: HostBucket | None = None,
        streams: bool = False,
    ):
        """has_values: take what the parameters hold, of any dtype and device; else zeros, for the caller to fill.

        streams: `owned` lies on the host, and each gather begins with its copy up.
        """
        self.layout = layout
        self.parameters = list(parameters)
        self.group = group
        self.is_resident = is_resident
        self.is_trainable = is_trainable
        self.device, self.host, self.streams = device, host, streams
        self.start, self.stop = (0, layout.numel) if owns_all else layout.piece(group.rank)
        self.pending: Pending | None = None  # a gather in flight
        self._arrived: tuple | None = None  # the event behind a copy up that nobody has taken back yet
        self._last_ascent: tuple | None = None  # the event behind the last copy up
        self.label = f"gathering {layout.name}"
        self.is_unsharded = True
        needs_master = is_trainable and master_dtype(dtype) != dtype
        # A master keeps the bits that the values have and the parameter's dtype has not.
        staging = torch.zeros(layout.numel, dtype=master_dtype(dtype) if needs_master else dtype, device=device.device)
        if has_values:
            for slot, parameter in zip(layout.slots, parameters, strict=True):
                staging[slot.offset : slot.stop].view(slot.shape).copy_(parameter.detach())
            replicas.broadcast(staging)  # as DDP does: every rank starts from rank 0's values
            group.broadcast(staging)
        self._adopt(staging, dtype, needs_master)

    def _adopt(self, staging: torch.Tensor, dtype: torch.dtype, needs_master: bool) -> None:
        mine = staging[self.start : self.stop]
        self.master = mine.clone() if needs_master and self.host is None else None
        self.full = staging.to(dtype)
        if self.host is not None:
            self.host.set_values(mine)
            if needs_master and dtype == torch.bfloat16:
                self.full = round_bf16(staging)  # as the host rounds
        mine = self.full[self.start : self.stop]
        if self.streams:
            self.owned = self.host.parameter.values
        else:
            self.owned = mine if self.is_resident else mine.clone()
        nan = float("nan") if dtype.is_floating_point else 0
        self._placeholder = torch.full((), nan, dtype=dtype, device=self.full.device)
        self._bind()
        if not self.is_resident:
            self.reshard()

    @property
    def owns_all(self) -> bool:
        return self.stop - self.start == self.layout.numel

    @property
    def communicates(self) -> bool:
        """Whether full parameters come from other ranks, or from the host, after a step."""
        return not (self.is_resident and self.owns_all)

    @property
    def is_hidden(self) -> bool:
        """Whether parameters that stay whole are unreadable for now."""
        return self.is_resident and not self.is_unsharded

    @property
    def is_on_host(self) -> bool:
        """Whether workers step it."""
        return self.host is not None and self.is_trainable

    @property
    def stepped_dtype(self) -> torch.dtype:
        """What `values` are of."""
        return master_dtype(self.owned.dtype) if self.is_trainable else self.owned.dtype

    def values(self) -> torch.Tensor:
        """1D, this rank's range in the dtype that the optimizer works in; to change it, give it to `set_values`."""
        if self.is_on_host:
            return self.host.values()
        return self.owned if self.master is None else self.master

    def set_values(self, values: torch.Tensor) -> None:
        """Take this rank's range, and round it into the parameters' dtype."""
        if self.is_on_host:
            self.finish_ascent()
            self.host.set_values(values)
            if not self.streams:
                self.owned.copy_(self.host.parameter.values)
            return
        mine = self.owned if self.master is None else self.master
        if mine.data_ptr() != values.data_ptr():
            mine.copy_(values)
        self.refresh_from_master()

    def refresh_from_master(self) -> None:
        """Round the master, stepped here, into the parameters' dtype."""
        if self.master is not None:
            self.owned.copy_(self.master)

    def absorb_edits(self) -> None:
        """Take what somebody wrote into the full parameters into the owned range and its master."""
        mine, values = self.full[self.start : self.stop], self.values()
        if values.dtype != mine.dtype:
            rounded = round_bf16(values) if self.is_on_host and mine.dtype == torch.bfloat16 else values.to(mine.dtype)
            edited = mine.to(values.device)
            values = torch.where(edited != rounded, edited.to(values.dtype), values)
        elif values.data_ptr() != mine.data_ptr():
            values = mine
        self.set_values(values)

    # Movement #

    def unshard(self) -> bool:
        """Start gathering the full parameters; False where they are here or under way. Collective."""
        if self.is_unsharded or self.pending is not None or self.is_resident:
            return False
        storage = self.full.untyped_storage()
        storage.resize_(self.full.numel() * self.full.element_size())
        if self.host is None:
            self.pending = self.group.all_gather(self.full, self.owned, self.label)
            return True
        with self.device.on(self.host.host.up_stream, after_current=True):
            mine = self.owned
            if self.streams:
                self.host.wait()
                mine = self.full[self.start : self.stop]
                self.device.copy(mine, self.owned)
            self._gather_here(mine)
        return True

    def _gather_here(self, mine: torch.Tensor) -> None:
        """Gather on the current stream; whoever waits is ordered after what the stream held before, too."""
        arrived = self.device.record()
        self._last_ascent = (arrived,)
        gather = self.group.all_gather(self.full, mine, self.label)
        self.pending = Pending((*gather.steps, lambda: self.device.wait(arrived)), gather.keepalive, self.label)

    def hide(self) -> None:
        """The workers are stepping this bucket: make old values unreadable until they are taken back."""
        if self.is_resident and self.is_unsharded:
            self._place_nan()

    def ascend(self, readers_done) -> None:
        """Wait for the workers, and start the copy up to the device.

        readers_done: event behind the last use of the old values on the device.
        """
        if self._arrived is not None:
            return
        self.host.wait()
        with self.device.on(self.host.host.up_stream):
            self.device.wait(readers_done)
            if not self.streams:  # else the next gather begins on the host
                self.device.copy(self.owned, self.host.parameter.values)
            self._arrived = (self.device.record(),)
            self._last_ascent = self._arrived

    def finish_ascent(self) -> None:
        """Have the host wait for the last copy up, before what it reads is written."""
        if self._last_ascent is not None:
            self.device.synchronize(*self._last_ascent)
            self._last_ascent = None

    def take_back(self, readers_done) -> None:
        """Have the stepped values on their way to every rank that needs them. Collective where full parameters stay."""
        self.ascend(readers_done)
        (arrived,), self._arrived = self._arrived, None
        if self.is_resident and self.owns_all:
            self.pending = Pending((lambda: self.device.wait(arrived),), (), self.label)
        elif self.is_resident:
            with self.device.on(self.host.host.up_stream):
                self._gather_here(self.owned)

    def republish(self) -> None:
        """Start sending this rank's stepped range to the ranks that hold full parameters. Collective."""
        if self.is_resident and not self.owns_all:
            self.pending = self.group.all_gather(self.full, self.owned, self.label)

    def wait(self) -> None:
        """Order this stream after the gather in flight; the parameters are whole from here on."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
            if not self.is_unsharded:
                self.is_unsharded = True
                self._bind()

    def reshard(self) -> None:
        """Free the full parameters; what this rank owns stays. A gather nobody waited for is waited for first."""
        self.wait()
        if self.is_resident or not self.is_unsharded:
            return
        self._place_nan()
        self.full.untyped_storage().resize_(0)

    def _place_nan(self) -> None:
        for parameter, slot in zip(self.parameters, self.layout.slots, strict=True):
            parameter.data = self._placeholder.expand(slot.shape)
        self.is_unsharded = False

    def _bind(self) -> None:
        for parameter, slot in zip(self.parameters, self.layout.slots, strict=True):
            parameter.data = self.full[slot.offset : slot.stop].view(slot.shape)
