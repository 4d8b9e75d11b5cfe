"""The parameters of one bucket as one flat buffer, and the range of it that this rank owns.

[Note: storage is resized, never replaced]
Autograd saves views of parameters for backward. While a bucket is sharded its `full` storage has zero bytes; when it
is gathered again the same storage is filled, so those views are valid just when backward reads them. Filling writes
through `full`, whose version counter no parameter shares, so autograd does not take it for a modification.

[Note: a sharded parameter reads as NaN]
A parameter of a freed storage would be a null pointer to every kernel. While sharded, each parameter is therefore a
NaN expanded to its shape (one element of memory): shape, dtype and device stay true, a read outside of forward,
backward and `full_params` is loud instead of a crash, and writing to it is an error of torch's.
"""

from collections.abc import Sequence

import torch
from torch import nn

from zerolite.collectives import Group, Pending
from zerolite.config import master_dtype
from zerolite.layout import BucketLayout


class FlatBucket:
    """One bucket's parameters: gathered or sharded, with the range that this rank owns and steps."""

    layout: BucketLayout
    parameters: list[nn.Parameter]  # in slot order
    full: torch.Tensor  # 1D, layout.numel; zero bytes of storage while sharded
    owned: torch.Tensor  # 1D, this rank's range; a view of `full` where that is resident, else its own memory
    master: torch.Tensor | None  # 1D like `owned`, fp32; what the optimizer steps where `owned` has 16 bits

    def __init__(
        self,
        layout: BucketLayout,
        parameters: Sequence[nn.Parameter],
        has_values: bool,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: Group,
        replicas: Group,
        owns_all: bool,
        is_resident: bool,
        is_trainable: bool,
    ):
        """has_values: take what the parameters hold, of any dtype and device; else zeros, for the caller to fill."""
        self.layout = layout
        self.parameters = list(parameters)
        self.group = group
        self.is_resident = is_resident
        self.is_trainable = is_trainable
        self.start, self.stop = (0, layout.numel) if owns_all else layout.piece(group.rank)
        self.pending: Pending | None = None  # a gather in flight
        self.label = f"gathering {layout.slots[0].name} ... {layout.slots[-1].name}"
        self.is_unsharded = True
        needs_master = is_trainable and master_dtype(dtype) != dtype
        # A master keeps the bits that the values have and the parameter's dtype has not.
        staging = torch.zeros(layout.numel, dtype=master_dtype(dtype) if needs_master else dtype, device=device)
        if has_values:
            for slot, parameter in zip(layout.slots, parameters, strict=True):
                staging[slot.offset : slot.stop].view(slot.shape).copy_(parameter.detach())
            replicas.broadcast(staging)  # as DDP does: every rank starts from rank 0's values
            group.broadcast(staging)
        self._adopt(staging, dtype, needs_master)

    def _adopt(self, staging: torch.Tensor, dtype: torch.dtype, needs_master: bool) -> None:
        self.master = staging[self.start : self.stop].clone() if needs_master else None
        self.full = staging.to(dtype)
        mine = self.full[self.start : self.stop]
        self.owned = mine if self.is_resident else mine.clone()
        nan = float("nan") if dtype.is_floating_point else 0
        self._placeholder = torch.full((), nan, dtype=dtype, device=self.full.device)
        self._bind()
        if not self.is_resident:
            self.reshard()

    @property
    def device(self) -> torch.device:
        return self._placeholder.device

    @property
    def owns_all(self) -> bool:
        return self.stop - self.start == self.layout.numel

    @property
    def stepped(self) -> torch.Tensor:
        """1D, this rank's range in the dtype that the optimizer works in."""
        return self.owned if self.master is None else self.master

    def refresh_from_master(self) -> None:
        """Round the stepped master into the parameters' dtype."""
        if self.master is not None:
            self.owned.copy_(self.master)

    def absorb_edits(self) -> None:
        """Take what somebody wrote into the gathered parameters into the owned range and its master."""
        mine = self.full[self.start : self.stop]
        if self.master is not None:
            edited = mine != self.master.to(mine.dtype)
            self.master.copy_(torch.where(edited, mine.to(self.master.dtype), self.master))
        if not self.is_resident:
            self.owned.copy_(mine)

    # Movement #

    def unshard(self) -> bool:
        """Start gathering the full parameters; False where they are here or under way. Collective."""
        if self.is_unsharded or self.pending is not None:
            return False
        storage = self.full.untyped_storage()
        storage.resize_(self.full.numel() * self.full.element_size())
        self.pending = self.group.all_gather(self.full, self.owned, self.label)
        return True

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
        for parameter, slot in zip(self.parameters, self.layout.slots, strict=True):
            parameter.data = self._placeholder.expand(slot.shape)
        self.full.untyped_storage().resize_(0)
        self.is_unsharded = False

    def _bind(self) -> None:
        for parameter, slot in zip(self.parameters, self.layout.slots, strict=True):
            parameter.data = self.full[slot.offset : slot.stop].view(slot.shape)
