"""The storages that torch makes and frees on the device during one step, and which of them live where they are most.

It asks nothing of a library but that its tensors come from torch's operations, so every contender is counted alike. It
shares no code with `zerolite.plan`, which it judges. Not seen: memory inside an operation, mappings of a file or of
shared memory (the arena that zerolite offloads to), what an allocator keeps.
"""

from __future__ import annotations

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# In the order of a stacked bar. States: alive from step to step; gradients: from backward to the step; in flight:
# gathered for a while, in a collective, or made and freed by the step; activations: the rest, their gradients included.
KINDS = ("states", "gradients", "activations", "in flight")
COLLECTIVES = ("c10d", "_c10d_functional")


class LiveLog(TorchDispatchMode):
    """A mode, open from before the model is built: `begin`, a phase at a time, `end`; then `peak`.

    phase: "forward", "backward" or "step", set by who runs the step.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type, self.phase = device_type, "build"
        self._alive: dict[int, int] = {}  # bytes of a storage, by its number
        self._number_of: dict[int, int] = {}  # of a storage that is alive, by its address
        self._phase_of: dict[int, str] = {}
        self._gathered: set[int] = set()  # filled through resize_, as FSDP2 and zerolite do with what they gather
        self._sent: set[int] = set()  # arguments of a collective
        self._events: list[tuple[int, int]] = []  # (storage, bytes from now on)

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = lambda storage, nbytes: self._resized(storage, nbytes)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def begin(self) -> None:
        self._before, self._events = dict(self._alive), []
        self.after_backward: dict[int, int] = {}

    def end_phase(self) -> None:
        if self.phase == "backward":
            self.after_backward = dict(self._alive)

    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment when most bytes live, of the step since `begin`, which has just ended."""
        alive, total = dict(self._before), sum(self._before.values())
        most, at = total, 0
        for index, (number, nbytes) in enumerate(self._events, 1):
            total += nbytes - alive.get(number, 0)
            alive[number] = nbytes
            if total > most:
                most, at = total, index
        alive = dict(self._before)
        alive.update(self._events[:at])  # the last of each storage
        found = dict.fromkeys(KINDS, 0)
        for number, nbytes in alive.items():
            kept = min(nbytes, self._alive.get(number, 0))
            found["states"] += kept
            found[self._kind_of(number)] += nbytes - kept
        return found

    def states_bytes(self) -> int:
        """What lives at the end of backward but what is gathered for a while."""
        return sum(
            n for number, n in self.after_backward.items() if number not in self._gathered or self._stays(number)
        )

    def _stays(self, number: int) -> bool:
        return self._before.get(number, 0) > 0

    def _kind_of(self, number: int) -> str:
        """Of a storage that does not live from step to step."""
        if number in self._gathered:
            return "in flight"
        if self.after_backward.get(number):
            return "gradients"
        return "in flight" if number in self._sent or self._phase_of[number] == "step" else "activations"

    def _change(self, number: int, nbytes: int) -> None:
        self._alive[number] = nbytes
        self._events.append((number, nbytes))

    def _forget(self, address: int) -> None:
        number = self._number_of.pop(address)
        self._change(number, 0)
        del self._alive[number]

    def _resized(self, storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
        number, before = self._number_of.get(storage._cdata), storage.nbytes()
        result = self._resize(storage, nbytes)
        if number is not None:
            if nbytes > before:
                self._gathered.add(number)
            self._change(number, nbytes)
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # it runs on its local tensors, which come here by themselves
        result = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for address, storage in _storages(result).items():
            # What was given comes back as a view, or written in place.
            if address not in self._number_of and address not in given and storage.device.type == self.device_type:
                number = self._number_of[address] = len(self._phase_of)
                self._phase_of[number] = self.phase
                self._change(number, storage.nbytes())
                weakref.finalize(storage, self._forget, address)
        if func.namespace in COLLECTIVES:
            self._sent |= {self._number_of[address] for address in given if address in self._number_of}
        return result


def _storages(value) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided)
    return {storage._cdata: storage for storage in storages}
