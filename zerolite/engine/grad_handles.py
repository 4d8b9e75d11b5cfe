"""The `.grad` of an engine's parameters: when handles are there, what was cleared, and by what gradients were scaled.

    withdraw    a backward begins      handles make place for what autograd accumulates; scales go into the gradients
    place       a backward has ended   each parameter that has a gradient, on any rank, has a handle
    check       before norms and steps a handle that is gone clears its gradient, a foreign tensor is an error

[Note: handles on all ranks]
Which parameters got a gradient is known to this rank only until ranks exchange it. A norm, however, is one over all of
them, and every rank must ask for it. So with several ranks every trainable parameter has a handle after a backward; one
that no rank used has the norm 0 and is not stepped.

[Note: scales]
A scaled gradient is a number a slot; the next step multiplies by it. The next backward adds to the gradient as it was
scaled, so the number goes into the elements there, which is all that scaling ever costs a device.
"""

import math
import weakref
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from zerolite.engine.grad_handle import GradHandle
from zerolite.engine.grad_stats import GradStats, slot_squares
from zerolite.engine.graph_task import is_in_backward
from zerolite.errors import ZeroliteError
from zerolite.shards.bucket import Bucket, TrainableBucket

if TYPE_CHECKING:
    from zerolite.engine.engine import Engine


class HandledSlot:
    """One trainable parameter and its handle. It refers weakly to what owns it: see `GradHandle`."""

    __slots__ = ("_bucket", "_handles", "expected", "handle", "index", "name")

    def __init__(self, handles: "GradHandles", bucket: TrainableBucket, index: int):
        self._handles, self._bucket = weakref.ref(handles), weakref.ref(bucket)
        self.index = index
        self.name = bucket.layout.slots[index].name
        self.handle: GradHandle | None = None  # made once, used after every backward
        self.expected: GradHandle | None = None  # what `.grad` is, unless somebody has changed it

    @property
    def bucket(self) -> TrainableBucket:
        bucket = self._bucket()
        if bucket is None:
            raise ZeroliteError(f"the gradient of {self.name} was of a model that is gone")
        return bucket

    @property
    def _of_engine(self) -> "GradHandles":
        handles = self._handles()
        if handles is None:
            raise ZeroliteError(f"the gradient of {self.name} was of a model that is gone")
        return handles

    def norm(self) -> float:
        """Collective, where no norm of these gradients was asked for before."""
        return self._of_engine.norm(self.bucket, self.index)

    def scale(self, factor: float) -> None:
        self._of_engine.scale_by_hand(self, factor)

    def zero_(self) -> None:
        self._of_engine.zero_(self)

    def forget_scales(self) -> None:
        self._of_engine.forget_scales()

    def number(self, factor: torch.Tensor) -> float:
        return self._of_engine.number(factor)


class GradHandles:
    """The handles of one engine, and the scales of its gradients."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self._slots: list[tuple[torch.nn.Parameter, HandledSlot, TrainableBucket]] = []
        self._first_slot: dict[Bucket, int] = {}  # in `_slots`
        self._scales: dict[Bucket, list[float]] = {}  # a slot; of buckets where one is not 1
        self._squares: tuple[int, dict[Bucket, list[float]]] | None = None  # with the gradients' version
        self._asked: tuple[int, dict[Bucket, list[float]]] | None = None  # version and scales of the first norm
        self._factor: tuple[torch.Tensor, int, float] | None = None  # a tensor that was read, at a version of it
        self.num_scalings_by_hand = 0  # by foreign code, which ranks have yet to compare

    def add(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            if isinstance(bucket, TrainableBucket):
                self._first_slot[bucket] = len(self._slots)
                for index, parameter in enumerate(bucket.parameters.tensors):
                    self._slots.append((parameter, HandledSlot(self, bucket, index), bucket))

    # When handles are there #

    def withdraw(self) -> None:
        """A backward begins: autograd finds no gradient, or one that somebody put there, and adds to that.

        What is gone or was replaced is cleared.
        """
        cleared: dict[Bucket, list[int]] = {}
        for parameter, slot, bucket in self._slots:
            gradient = parameter.grad
            if gradient is not slot.expected and not _is_of(gradient, slot):
                cleared.setdefault(bucket, []).append(slot.index)
            elif gradient is not None:
                parameter.grad = None
            slot.expected = None
        if cleared:
            self._clear(cleared)
        if self._scales:
            for bucket in self._engine.reducer.order:
                bucket.gradients.scale(self.scales_of(bucket))
            self._engine.reducer.version += 1
            self._scales.clear()

    def show(self, bucket: TrainableBucket, index: int) -> None:
        """The gradient is in the bucket, and hooks of others are called next: they may look at it, or clear it."""
        parameter, slot, _ = self._slots[self._first_slot[bucket] + index]
        self._place(parameter, slot)

    def place(self) -> None:
        """A backward has ended. See [Note: handles on all ranks]."""
        on_all_ranks = not self._engine.mesh.is_alone
        cleared: dict[Bucket, list[int]] = {}
        for parameter, slot, bucket in self._slots:
            if (on_all_ranks or bucket.gradients.was_used[slot.index]) and parameter.grad is None:
                if slot.expected is None:
                    self._place(parameter, slot)
                else:  # it was there, for a hook
                    slot.expected = None
                    cleared.setdefault(bucket, []).append(slot.index)
        if cleared:
            self._clear(cleared)

    def _place(self, parameter: torch.nn.Parameter, slot: HandledSlot) -> None:
        if slot.handle is None:
            slot.handle = GradHandle(parameter, slot)
        parameter.grad = slot.expected = slot.handle

    def check(self) -> None:
        """Drop gradients that somebody cleared. ZeroliteError for a tensor that somebody put in a handle's place."""
        for slot in self.drop_cleared():
            raise ZeroliteError(
                f"{slot.name}.grad was set to a tensor, and zerolite's gradients lie in its shards: set gradients by a "
                "backward (one that follows adds to the tensor), scale them in place, or clear them with None"
            )

    def drop_cleared(self) -> list[HandledSlot]:
        """Drop gradients whose handle is gone; the slots where another tensor is."""
        odd = [(parameter, slot) for parameter, slot, _ in self._slots if parameter.grad is not slot.expected]
        odd = [(parameter, slot) for parameter, slot in odd if not _is_of(parameter.grad, slot)]
        cleared: dict[Bucket, list[int]] = {}
        for parameter, slot in odd:
            if parameter.grad is None:
                slot.expected = None
                cleared.setdefault(slot.bucket, []).append(slot.index)
        if cleared:
            self._clear(cleared)
        return [slot for parameter, slot in odd if parameter.grad is not None]

    def clear(self, slots: Mapping[Bucket, Sequence[int]] | None, set_to_none: bool) -> None:
        """The gradients of some slots, or of all, are cleared: take their handles away, or leave them."""
        wanted = {bucket: set(indices) for bucket, indices in (slots or {}).items()}
        for parameter, slot, bucket in self._slots:
            if slots is None or (bucket in wanted and slot.index in wanted[bucket]):
                if self._scales:
                    self._set_scale(bucket, slot.index, 1.0)
                if set_to_none:
                    parameter.grad = slot.expected = None

    def _clear(self, cleared: Mapping[Bucket, Sequence[int]]) -> None:
        self._engine.reducer.clear(cleared, True)
        for bucket, indices in cleared.items():
            for index in indices:
                self._set_scale(bucket, index, 1.0)

    # Norms #

    def squares(self) -> dict[Bucket, list[float]]:
        """A bucket's and slot's sum of squares over all ranks, unscaled; asked for once a gradient. Collective."""
        engine = self._engine
        if is_in_backward():
            raise ZeroliteError("norms of gradients are known after backward: ask for them there, not in a hook")
        if self._squares is None or self._squares[0] != engine.reducer.version:
            engine.end_open_backward()
            self.check()
            squares = slot_squares(engine)  # it may reduce, which is a new version
            self._squares = (engine.reducer.version, squares)
        return self._squares[1]

    def norm(self, bucket: Bucket, index: int) -> float:
        """Of one slot's gradient as it was scaled, without the loss scale. Collective."""
        squares = self.squares()[bucket][index]
        self.remember_scales()
        loss_scale = self._engine.loss_scale.value if self._engine.loss_scale is not None else 1.0
        return math.sqrt(squares) * abs(self.scale_of(bucket, index)) / loss_scale

    # Scales #

    def scale_of(self, bucket: Bucket, index: int) -> float:
        scales = self._scales.get(bucket)
        return 1.0 if scales is None else scales[index]

    def scales_of(self, bucket: Bucket) -> Sequence[float]:
        """A slot."""
        return self._scales.get(bucket) or [1.0] * len(bucket.layout.slots)

    def remember_scales(self) -> None:
        """A norm is known now: what scales the gradients from here on clips them, for `scaled_before_clip`."""
        version = self._engine.reducer.version
        if self._asked is None or self._asked[0] != version:
            self._asked = (version, {bucket: list(scales) for bucket, scales in self._scales.items()})

    def forget_scales(self) -> None:
        """What scaled the gradients was no clip."""
        self._asked = None

    def scaled(self, stats: GradStats, counts: Sequence[Sequence[bool | None]]) -> GradStats:
        """`stats` of the slots that count, for the gradients as they are scaled. Collective."""
        return self._scaled(stats, counts, self._scales)

    def scaled_before_clip(self, stats: GradStats, counts: Sequence[Sequence[bool | None]]) -> GradStats:
        """The same as they were scaled when the first norm of them was asked for. Collective."""
        is_clipped = self._asked is not None and self._asked[0] == self._engine.reducer.version
        return self._scaled(stats, counts, self._asked[1] if is_clipped and self._asked else self._scales)

    def _scaled(
        self, stats: GradStats, counts: Sequence[Sequence[bool | None]], by_bucket: Mapping[Bucket, Sequence[float]]
    ) -> GradStats:
        """Collective, where scales differ."""
        if not by_bucket:
            return stats
        order = self._engine.reducer.order
        scales = [by_bucket.get(bucket) or [1.0] * len(bucket.layout.slots) for bucket in order]
        if len({scale for row in scales for scale in row}) == 1:
            return replace(stats, squares=[squares * scales[0][0] ** 2 for squares in stats.squares])
        of_slots = self.squares()
        squares = [
            math.fsum(one * scale**2 for one, scale, count in zip(of_slots[bucket], row, flags, strict=True) if count)
            for bucket, row, flags in zip(order, scales, counts, strict=True)
        ]
        return replace(stats, squares=squares)

    def scale(self, slots: Mapping[Bucket, Sequence[int]], factor: float) -> None:
        """Multiply the gradients of some slots; the same on every rank."""
        for bucket, indices in slots.items():
            for index in indices:
                self._set_scale(bucket, index, self.scale_of(bucket, index) * factor)

    def scale_by_hand(self, slot: HandledSlot, factor: float) -> None:
        if is_in_backward():
            raise ZeroliteError(f"the gradient of {slot.name} is scaled after backward, not in a hook")
        self._set_scale(slot.bucket, slot.index, self.scale_of(slot.bucket, slot.index) * factor)
        self.num_scalings_by_hand += 1

    def zero_(self, slot: HandledSlot) -> None:
        self._engine.clear_gradients(False, {slot.bucket: [slot.index]})

    def number(self, factor: torch.Tensor) -> float:
        """The value of a tensor of one element, read once: clipping multiplies every gradient by the same tensor."""
        if self._factor is None or self._factor[0] is not factor or self._factor[1] != factor._version:
            self._factor = (factor, factor._version, float(factor))
        return self._factor[2]

    def digest(self) -> float:
        """A number that tells other scales apart, 0 where there are none."""
        if not self._scales:
            return 0.0
        order = self._engine.reducer.order
        scales = array("d", [self.scale_of(bucket, i) for bucket in order for i in range(len(bucket.layout.slots))])
        return 1.0 + zlib.crc32(scales.tobytes())

    def _set_scale(self, bucket: Bucket, index: int, scale: float) -> None:
        scales = self._scales.get(bucket)
        if scales is None:
            if scale == 1.0:
                return
            scales = self._scales[bucket] = [1.0] * len(bucket.layout.slots)
        scales[index] = scale
        if scale == 1.0 and all(one == 1.0 for one in scales):
            del self._scales[bucket]


def _is_of(gradient: torch.Tensor | None, slot: HandledSlot) -> bool:
    """Whether it is the slot's handle, or one made from it by `detach` or `.data`, while the gradient is there."""
    return isinstance(gradient, GradHandle) and gradient.slot is slot and slot.expected is not None
